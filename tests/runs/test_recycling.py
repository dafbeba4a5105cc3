"""A worker that has grown too much is replaced. Its runs leave it first: nothing is replayed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from holdfast.runs.bodies import FORWARD, FORWARD_BACKWARD, OPTIM_STEP, SAVE_WEIGHTS, Save
from holdfast.runs.driver import LEAVES_WITHIN
from holdfast.runs.engines import LEAVING_TAKES, Host
from holdfast.runs.placement import Placement
from holdfast.runs.publishing import Publisher
from holdfast.runs.residents import Residents
from holdfast.runs.run import Run
from holdfast.runs.worker_memory import GROWN, SHORTEST_LIFE
from holdfast.store import DiskFull, LocalStore, Manifest, NameKey

from .sim import World
from .test_recovery import check_all
from .test_service import OWNER, Clients, create_run, steps
from .toy import NAME, ToyEngine, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

LIMIT = 10_000 << 20
FRESH = 1000 << 20
OPERATIONS = 60


@contextmanager
def served(worker_memory: int = LIMIT, fresh: int = FRESH) -> Iterator[Clients]:
    """A server with such a limit, a session of the Python client, and a run."""
    clients = Clients()
    clients.world = World(1, worker_memory=worker_memory)
    clients.world.fresh = fresh
    try:
        clients.open_session("python")
        clients.create(0, 1)
        yield clients
    finally:
        clients.close()


@pytest.fixture
def clients() -> Iterator[Clients]:
    with served() as clients:
        yield clients


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each batch was computed, by whichever worker."""
    counted = Counter[bytes]()
    honest = ToyEngine.forward_backward

    async def forward_backward(engine: ToyEngine, run: str, seq: int, body: bytes) -> bytes:
        counted[body] += 1
        return await honest(engine, run, seq, body)

    monkeypatch.setattr(ToyEngine, "forward_backward", forward_backward)
    return counted


def host(clients: Clients) -> Host:
    return clients._world.runs.engines[NAME]


def grow(clients: Clients, memory: int = LIMIT + (2000 << 20)) -> None:
    clients._world.lives[-1].resident_memory = memory


def recycle(clients: Clients) -> None:
    async def begin() -> None:
        host(clients).recycle()

    clients._do(begin)


def queue_training(clients: Clients, operations: int = OPERATIONS) -> None:
    """For every run, far more than is done in a moment."""
    for x in range(operations // 2):
        for run in clients.all:
            clients._submit(run, FORWARD_BACKWARD, batch(x))
            clients._submit(run, OPTIM_STEP, steps())


def pending(clients: Clients) -> int:
    return sum(len(live.run.order.unsettled) for live in clients._world.runs._live.values())


def until(clients: Clients, what: Callable[[], bool], seconds: float = 300.0) -> None:
    ends = clients._now + seconds
    while not what():
        assert clients._now < ends, "it does not come"
        clients._world.let(0.05)


def counts(clients: Clients) -> list[tuple[int, int]]:
    """Recoveries and replayed operations of every run."""
    record = clients._world.runs.record
    records = [clients._do(partial(record, run.id, OWNER)) for run in clients.all]
    return [(record.recoveries, record.replayed) for record in records]


def said(clients: Clients, event: str) -> list[Any]:
    return [e for e in clients.events if event in e["event"]]


def recycle_in_the_middle(clients: Clients) -> None:
    """A worker grows while two runs train on it."""
    clients.create(1, 1)
    clients._world.let(SHORTEST_LIFE)
    queue_training(clients)
    clients._world.let(1.0)
    grow(clients)
    until(clients, lambda: len(clients._world.lives) == 2)
    assert 0 < pending(clients) < 2 * OPERATIONS  # in the middle
    check_all(clients)


def test_a_worker_that_has_grown_is_replaced_and_nothing_is_replayed(
    clients: Clients, computed: Counter[bytes]
) -> None:
    recycle_in_the_middle(clients)
    old, new = clients._world.lives
    assert old.dead and not new.dead
    assert counts(clients) == [(0, 0), (0, 0)]
    assert computed == {batch(x): 2 for x in range(OPERATIONS // 2)}  # once a run
    (event,) = said(clients, "worker recycled")
    assert (event["model"], event["life"]) == (NAME, 1)
    assert (event["memory_mib"], event["limit_mib"]) == (12_000, 10_000)
    assert host(clients).life == 2
    assert not said(clients, "worker died")


def leave_without_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Publisher, "behind", False)
    monkeypatch.setattr(Publisher, "due", False)


def do_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    async def have_left(_: Residents, patience: float) -> None:
        pass

    monkeypatch.setattr(Residents, "have_left", have_left)


@pytest.mark.parametrize("plant", [leave_without_a_snapshot, do_not_leave])
def test_what_is_replayed_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    clients: Clients,
    computed: Counter[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    recycle_in_the_middle(clients)
    assert max(computed.values()) > 2
    assert any(recoveries and replayed for recoveries, replayed in counts(clients))


def test_without_a_limit_no_worker_is_replaced() -> None:
    with served(worker_memory=0) as clients:
        grow(clients, 1 << 50)
        clients._world.let(10 * SHORTEST_LIFE)
        assert len(clients._world.lives) == 1


def test_where_its_size_is_not_known_no_worker_is_replaced(clients: Clients) -> None:
    clients._world.lives[-1].resident_memory = None
    clients._world.let(10 * SHORTEST_LIFE)
    assert len(clients._world.lives) == 1


def test_a_limit_below_what_a_worker_needs_does_not_replace_it_over_and_over() -> None:
    with served(fresh=LIMIT + 1) as clients:
        clients._world.let(10 * SHORTEST_LIFE)
        grow(clients, int(GROWN * (LIMIT + 1)))
        clients._world.let(10 * SHORTEST_LIFE)
        assert len(clients._world.lives) == 1
        grow(clients, int(GROWN * (LIMIT + 1)) + 2)  # a leak is none the less noticed
        until(clients, lambda: len(clients._world.lives) == 2)
        clients._world.let(10 * SHORTEST_LIFE)
        assert len(clients._world.lives) == 2
    (event,) = said(clients, "worker-memory is too low")
    assert (event["limit_mib"], event["after_load_mib"]) == (10_000, 10_000)
    assert event["replaced_above_mib"] == 15_000


def test_a_limit_that_is_always_exceeded_costs_one_load_in_a_while(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a worker that was just started, but by what training takes in any case."""
    honest = ToyEngine.forward_backward

    async def forward_backward(engine: ToyEngine, run: str, seq: int, body: bytes) -> bytes:
        engine.resident_memory = 2 * LIMIT
        return await honest(engine, run, seq, body)

    monkeypatch.setattr(ToyEngine, "forward_backward", forward_backward)
    for x in range(50):
        clients._submit(clients.all[0], FORWARD_BACKWARD, batch(x))
        clients._world.let(30.0)
    assert len(clients._world.lives) <= 1 + 1500 / SHORTEST_LIFE
    assert counts(clients) == [(0, 0)]


@pytest.mark.parametrize(
    "last", [FORWARD_BACKWARD, FORWARD, SAVE_WEIGHTS, "gap"], ids=lambda last: str(last)
)
def test_a_run_leaves_whatever_it_did_or_waits_for(last: str, clients: Clients) -> None:
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    clients._submit(run, OPTIM_STEP, steps())
    if last == "gap":
        clients._submit(run, FORWARD_BACKWARD, batch(2), seq=run.highest + 2)
    elif last == SAVE_WEIGHTS:
        clients._submit(run, last, Save("a"))
    else:
        clients._submit(run, last, batch(2))
    clients._world.let(1.5)
    recycle(clients)
    clients._world.let(2.0)
    assert len(clients._world.lives) == 2 and not clients._world.lives[-1].states
    if last == "gap":
        clients._submit(run, OPTIM_STEP, steps(), seq=run.highest - 1)
    queue_training(clients, 4)
    check_all(clients)
    assert counts(clients) == [(0, 0)]


def test_what_needs_a_worker_meanwhile_waits_for_the_next_one(clients: Clients) -> None:
    world = clients._world
    slow = {"write": 5.0, "ready": 20.0}
    world.pause = lambda what: slow.get(what, 0.01)  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    queue_training(clients, 4)
    world.let(0.03)
    recycle(clients)
    runs, (session,) = world.runs, clients.sessions

    async def ask() -> tuple[float, float]:
        began = clients._now
        sampler = await runs.samplers.create_from_base(session.id, OWNER, 1, NAME)
        runs.samplers.submit(sampler, 1, b"prompt", b"prompt")
        created = await create_run(world, session, 99, {"rank": 1, "seed": 1})
        await runs.samplers.outcome(sampler.id, 1, 100.0)
        sampled = clients._now - began
        outcome = await created.outcome(0, 100.0)
        assert outcome is not None and outcome.failure is None
        return sampled, clients._now - began

    assert all(took > 25.0 for took in clients._do(ask))
    assert len(world.lives) == 2
    check_all(clients)
    assert counts(clients) == [(0, 0)]


def test_a_poll_says_that_the_base_model_is_loaded_and_tells_of_no_recovery(
    clients: Clients,
) -> None:
    world, (run,) = clients._world, clients.all
    world.pause = lambda what: 20.0 if what == "ready" else 0.01  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    queue_training(clients, 2)
    world.let(1.0)
    recycle(clients)
    clients._submit(run, FORWARD_BACKWARD, batch(9))
    outcome, note = clients._poll(run.ops[run.highest], 5.0)
    assert outcome is None
    assert note == f"base model {NAME!r} is being loaded"


def recycle_and_die(clients: Clients, point: int) -> bool:
    """The worker dies at that step after its recycling has begun; whether it came so far."""
    clients.create(1, 1)
    queue_training(clients, 8)
    clients._world.let(0.5)
    recycle(clients)
    clients._world.die_in = point
    until(clients, lambda: len(clients._world.lives) > 1)
    died = clients._world.die_in is None
    clients._world.die_in = None
    queue_training(clients, 2)
    check_all(clients)
    *before, last = clients._world.lives
    assert all(worker.dead for worker in before) and not last.dead
    assert len(before) <= 1 + died
    assert host(clients)._recycling is None and not host(clients).recycles(host(clients).life)
    if not died:
        assert counts(clients) == [(0, 0), (0, 0)]
    return died


def test_a_worker_may_die_while_its_runs_leave() -> None:
    point = 0
    while True:
        with served() as clients:
            if not recycle_and_die(clients, point):
                break
        point += 1
    assert point > 8


def test_a_worker_may_die_while_others_wait_for_their_turn_on_it(clients: Clients) -> None:
    """They get the next one, which is not waited for with the old one's leaving."""
    world = clients._world
    clients.all_end()
    world.lives[-1]._pause = lambda what: 10.0 if what == FORWARD_BACKWARD else 0.01
    clients._submit(clients.all[0], FORWARD_BACKWARD, batch(1))
    world.let(1.0)
    clients.create(1, 1)
    world.let(1.0)
    recycle(clients)
    world.let(1.0)
    clients.kill_the_worker()
    queue_training(clients, 2)
    check_all(clients)
    assert not said(clients, "worker recycled")


def test_runs_that_cannot_leave_are_recovered_in_the_next_worker(
    clients: Clients, computed: Counter[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their snapshots fail: they go on until they are waited for no longer."""
    clients.create(1, 1)
    monkeypatch.setattr(Publisher, "allowed", False)
    queue_training(clients, 4)
    clients._world.let(3.0)
    began = clients._now
    recycle(clients)
    clients._submit(clients.all[0], FORWARD_BACKWARD, batch(100))
    clients._world.let(2.0)
    assert computed[batch(100)] == 1  # on the old one
    until(clients, lambda: len(clients._world.lives) == 2, 3 * LEAVING_TAKES)
    assert clients._now - began >= LEAVING_TAKES
    queue_training(clients, 4)
    check_all(clients)
    (event,) = said(clients, "runs do not leave")
    assert event["runs"] == 2
    assert all(recoveries == 1 and replayed for recoveries, replayed in counts(clients))


def test_a_run_that_cannot_leave_and_computes_nothing_is_waited_for_once(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "allowed", False)
    queue_training(clients, 4)
    clients._world.let(3.0)
    began = clients._now
    recycle(clients)
    until(clients, lambda: len(clients._world.lives) == 2, 3 * LEAVING_TAKES)
    assert LEAVING_TAKES <= clients._now - began < 1.1 * LEAVING_TAKES


def end_without_storing(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, *, behind: bool = True
) -> None:
    """Of two runs, one ends. There is no room for its last state, as there is for snapshots."""
    honest = LocalStore.publish

    def publish(store: LocalStore, manifest: Manifest) -> str:
        if manifest.name is not None:
            raise DiskFull("no room left on the disk")
        return honest(store, manifest)

    monkeypatch.setattr(LocalStore, "publish", publish)
    monkeypatch.setattr(Publisher, "due", False)
    clients.open_session("python")
    clients.create(1, 1)
    queue_training(clients, 2)
    clients._world.let(20.0)
    queue_training(clients, 2 if behind else 0)
    clients.all_end()
    clients.all[0].ending = "session_ended"
    session = clients.sessions.pop(0)
    clients._do(lambda: clients._world.runs.end_session(session.id, "success"))


def recycled_beside_one_that_has_ended(clients: Clients) -> float:
    """Seconds for which a run that goes on stood still."""
    began = clients._now
    recycle(clients)
    clients._submit(clients.all[1], FORWARD_BACKWARD, batch(3))
    until(clients, lambda: not pending(clients) and len(clients._world.lives) == 2, 1000.0)
    return clients._now - began


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("since", [0.0, 100.0])
def test_a_run_that_has_ended_and_is_not_kept_yet_is_not_waited_for(
    since: float, behind: bool, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as planted:
        end_without_storing(clients, planted, behind=behind)
        clients._world.let(since)
        assert recycled_beside_one_that_has_ended(clients) < LEAVES_WITHIN + 5.0
    clients._world.let(200.0)
    assert host(clients).residents.size < 1000  # of the other one alone
    check_all(clients)
    seq = 4 if behind else 2
    assert clients._world.store.resolve(NameKey(clients.all[0].id, "weights", f"auto.{seq}"))


def test_one_that_has_ended_and_is_waited_for_is_found(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Placement, "fix", lambda _: None)
    end_without_storing(clients, monkeypatch)
    clients._world.let(100.0)
    assert recycled_beside_one_that_has_ended(clients) > LEAVING_TAKES


def test_one_that_can_leave_a_while_later_is_waited_for(clients: Clients) -> None:
    """The disk is full for a moment."""
    queue_training(clients, 4)
    clients._world.let(2.0)
    clients._world.full_until = clients._now + 100.0
    recycle(clients)
    until(clients, lambda: len(clients._world.lives) == 2)
    queue_training(clients, 4)
    check_all(clients)
    assert counts(clients) == [(0, 0)]


@pytest.mark.parametrize("begun", [False, True])
def test_an_operation_that_takes_long_is_waited_for(
    begun: bool, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is about to begin."""
    world, (run,) = clients._world, clients.all
    clients.all_end()
    world.lives[-1]._pause = lambda what: 1.5 * LEAVING_TAKES if what == FORWARD_BACKWARD else 0.01
    honest = Run.body

    async def body(run: Run, seq: int) -> bytes:
        if not begun:
            recycle_now()
            await asyncio.sleep(1.0)
        return await honest(run, seq)

    recycle_now = host(clients).recycle
    monkeypatch.setattr(Run, "body", body)
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    world.let(2.0)
    monkeypatch.undo()
    recycle(clients)
    until(clients, lambda: len(world.lives) == 2, 2000.0)
    check_all(clients)
    assert counts(clients) == [(0, 0)]
    assert not said(clients, "runs do not leave")


@pytest.mark.parametrize("trouble", ["unstartable", "unloadable"])
def test_a_next_worker_that_does_not_start_at_once_is_waited_for(
    trouble: str, clients: Clients
) -> None:
    queue_training(clients, 20)
    clients._world.let(0.5)
    setattr(clients._world, trouble, 2)
    recycle(clients)
    check_all(clients)
    assert counts(clients) == [(0, 0)]


@pytest.mark.parametrize("moment", [0.0, 0.005, 0.02, 0.1, 0.5, 1.0, 6.0, 12.0])
def test_a_stop_meanwhile_ends_and_loses_nothing(moment: float, clients: Clients) -> None:
    world = clients._world
    slow = {"write": 0.5, "ready": 5.0, "drop": 0.01}
    world.pause = lambda what: slow.get(what, 0.1)  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    clients.create(1, 1)
    queue_training(clients, 20)
    world.let(0.3)
    recycle(clients)
    world.let(moment)
    began = clients._now
    world.restart()
    assert clients._now - began < 21.0 and not world.left
    check_all(clients)
    # A stop in good order, too, keeps what there is.
    assert all(replayed == 0 for _, replayed in counts(clients))


def test_a_stop_does_not_wait_for_a_run_that_cannot_leave(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_training(clients, 4)
    clients.all_end()
    monkeypatch.setattr(Publisher, "allowed", False)
    recycle(clients)
    clients._world.let(1.0)
    began = clients._now
    clients._world.restart()
    assert clients._now - began < 21.0 and not clients._world.left
    queue_training(clients, 4)
    check_all(clients)


def test_there_are_never_two_workers_at_once(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def close(engine: ToyEngine) -> None:
        await asyncio.sleep(5.0)
        engine.kill()

    monkeypatch.setattr(ToyEngine, "close", close)
    clients._world.let(1.0)
    recycle(clients)
    clients._world.let(1.0)
    queue_training(clients, 2)
    (old,) = clients._world.lives
    assert old.states == {} and not old.dead
    clients._world.let(2.0)
    assert clients._world.lives == [old]
    check_all(clients)
    assert counts(clients) == [(0, 0)]


def test_an_old_worker_that_does_not_close_is_ended_with_its_server(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def close(engine: ToyEngine) -> None:
        await engine.wait_died()

    monkeypatch.setattr(ToyEngine, "close", close)
    recycle(clients)
    clients._world.let(1.0)
    (old,) = clients._world.lives
    assert not old.dead
    clients._world.runs.engines.kill()
    assert old.dead


@pytest.mark.anyio
async def test_the_last_to_leave_is_waited_for() -> None:
    residents, asked = Residents(100), list[str]()
    for key in "ab":
        residents.put(key, lambda key=key: asked.append(key))  # type: ignore[misc]
    residents.all_leave()
    assert asked == ["a", "b"]
    waiting = asyncio.create_task(residents.have_left(60.0))
    residents.gone("a")
    await asyncio.sleep(0.01)
    assert not waiting.done()
    residents.gone("b")
    await waiting


@pytest.mark.anyio
async def test_patience_is_for_the_next_to_leave() -> None:
    residents = Residents(100)
    for key in "abc":
        residents.put(key, lambda: None)
    waiting = asyncio.create_task(residents.have_left(0.2))
    for key in "ab":
        await asyncio.sleep(0.15)
        residents.gone(key)
    await asyncio.sleep(0.15)
    assert not waiting.done()
    async with asyncio.timeout(1.0):
        await waiting
    assert len(residents) == 1


@pytest.mark.anyio
async def test_one_that_is_fixed_is_neither_asked_nor_waited_for() -> None:
    residents, asked = Residents(100), list[str]()
    for key in "ab":
        residents.put(key, lambda key=key: asked.append(key), fixed=key == "a")  # type: ignore[misc]
    residents.all_leave()
    assert asked == ["b"]
    waiting = asyncio.create_task(residents.have_left(60.0))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    residents.fix("b")  # meanwhile
    async with asyncio.timeout(1.0):
        await waiting
    assert len(residents) == 2
