"""What is not to be had for a while (a process, room, a base model) delays a run, and ends none."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog import CatalogUnavailable
from holdfast.catalog.tables import snapshots
from holdfast.engine.interface import ADAPTER_WEIGHTS, EngineError
from holdfast.runs import bodies, order
from holdfast.runs.bodies import FORWARD_BACKWARD, OPTIM_STEP, Load, Save
from holdfast.runs.driver import LAST_STATE_WAITED_FOR, MOST_STALLED
from holdfast.runs.engines import HUNG_AFTER, Engines
from holdfast.runs.errors import Unavailable
from holdfast.runs.journal import Failure
from holdfast.runs.publishing import Publisher
from holdfast.runs.recovery import UNREADABLE_FOR
from holdfast.runs.samplers import Sampler
from holdfast.store import Blob, CorruptManifest, DiskFull, IOFailed, NameKey

from . import toy
from .sim import World
from .test_service import OWNER, Clients, steps
from .toy import NAME, ToyEngine, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def train(clients: Clients, x: int) -> None:
    for run in clients.all:
        clients._submit(run, FORWARD_BACKWARD, batch(x))
        clients._submit(run, OPTIM_STEP, steps())


def save(clients: Clients, name: str, *, overwrite: bool = False) -> None:
    clients._submit(clients.all[0], bodies.SAVE_WEIGHTS, Save(name, None, overwrite))


def load(clients: Clients, name: str) -> None:
    (run,) = clients.all
    clients._submit(run, bodies.LOAD_WEIGHTS, Load(run.id, "weights", name, True, [OWNER]))


def check_all(clients: Clients) -> None:
    clients.all_end()
    clients._check_checkpoints()
    clients._check_logs()


# --- Room for operations --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "most"), [("MOST_UNSETTLED", 4), ("MOST_UNSETTLED_BYTES", 4 * len(batch(1)))]
)
def test_a_client_that_does_not_wait_for_results_is_held_up_and_loses_nothing(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    (run,), world = clients.all, clients._world
    clients.all_end()
    monkeypatch.setattr(order, bound, most)
    world.pause = lambda what: 5.0 if what == FORWARD_BACKWARD else 0.001  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    for x in range(4):
        clients._submit(run, FORWARD_BACKWARD, batch(x))
    world.kill()  # the next server knows what there is

    async def one_more() -> None:
        live = await world.runs.live(run.id, OWNER)
        for _ in range(2):
            with pytest.raises(Unavailable) as refused:
                await live.submit(run.highest + 1, FORWARD_BACKWARD, batch(4))
            assert refused.value.code == "too_many_operations"
        again = await live.submit(run.highest, FORWARD_BACKWARD, batch(3))
        assert again == run.ops[run.highest].request_id, "what is known is no more"

    clients._do(one_more)
    started = clients._now
    for x in range(4, 9):
        clients._submit(run, FORWARD_BACKWARD, batch(x))
    assert clients._now - started > 20.0, "the client sends it again until there is room"
    clients._submit(run, OPTIM_STEP, steps())
    check_all(clients)


# --- Workers --------------------------------------------------------------------------------


def next_starts(
    clients: Clients, count: int, start: Callable[[ToyEngine], Awaitable[ToyEngine]]
) -> list[int]:
    """Let the next starts of a worker go like that; how many are left to come."""
    host = clients._world.runs.engines[NAME]
    honest, left = host._start, [count]

    async def one(name: str) -> Any:
        worker = await honest(name)
        if not left[0]:
            return worker
        left[0] -= 1
        assert isinstance(worker, ToyEngine)
        return await start(worker)

    host._start = one
    return left


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EMFILE, errno.ENOMEM])
def test_a_worker_that_cannot_be_started_for_want_of_something_is_started_later(
    clients: Clients, error: int
) -> None:
    train(clients, 1)
    clients.all_end()

    async def fail(worker: ToyEngine) -> ToyEngine:
        raise OSError(error, "there is none left")

    left = next_starts(clients, 7, fail)
    clients.kill_the_worker()
    train(clients, 2)
    check_all(clients)
    assert left == [0]


async def cannot_load(worker: ToyEngine) -> ToyEngine:
    """The memory of the one before is not free yet."""

    async def ready() -> Any:
        await asyncio.sleep(1.0)
        raise EngineError("model_not_loadable", "no memory is left", "server")

    worker.ready = ready  # type: ignore[method-assign]
    return worker


@pytest.mark.parametrize("replay", [False, True])
def test_a_base_model_that_is_not_loaded_at_once_delays_what_waits_for_its_turn(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, replay: bool
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    clients.create(pick=0, rank=1)
    clients.all_end()
    world = clients._world
    world.pause = lambda what: 0.5 if what == FORWARD_BACKWARD else 0.001  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    train(clients, 1)
    if replay:
        clients.all_end()
        clients.kill_the_worker()
        train(clients, 2)
    left = next_starts(clients, 1, cannot_load)
    world.let(0.2)  # one computes, the other waits for its turn
    clients.kill_the_worker()
    check_all(clients)
    assert left == [0]


@pytest.mark.parametrize("what", ["create", "create_from_state"])
def test_a_base_model_that_is_not_loaded_at_once_delays_a_creation(
    clients: Clients, what: str
) -> None:
    save(clients, "a")
    clients.all_end()
    left = next_starts(clients, 1, cannot_load)
    clients.kill_the_worker()
    clients._world.let(0.1)
    if what == "create":
        clients.create(pick=0, rank=1)
    else:
        clients.create_from_state(pick=0, optimizer=True, exists=True, beside=0)
    check_all(clients)
    assert left == [0]


def test_a_creation_does_not_wait_for_ever_for_a_base_model(clients: Clients) -> None:
    clients._world.unloadable = 1 << 20
    clients.kill_the_worker()
    clients._world.let(0.1)
    clients.create(pick=0, rank=1)
    run = clients.all[-1]
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    found = []
    for seq in (0, 1):
        outcome, _ = clients._poll(run.ops[seq], MOST_STALLED + 60.0)
        assert outcome is not None and outcome.failure is not None
        found.append(outcome.failure)
    assert [failure.code for failure in found] == ["model_not_loadable", "creation_failed"]
    assert found[0].message in found[1].message
    clients._world.let(60.0)
    assert run.id not in clients._world.runs._live


def sampler_of(clients: Clients) -> Sampler:
    """Of a new checkpoint "a"."""
    save(clients, "a")
    clients.all_end()
    (session,), (run, *_) = clients.sessions, clients.all
    key = NameKey(run.id, "weights", "a")
    create = clients._world.runs.samplers.create_from_path
    sampler: Sampler = clients._do(lambda: create(session.id, OWNER, 9, key, None))
    return sampler


@pytest.mark.parametrize("again", [True, False])
def test_a_base_model_that_is_not_loaded_at_once_delays_a_sample(
    clients: Clients, again: bool
) -> None:
    sampler, world = sampler_of(clients), clients._world
    world.unloadable = 1 if again else 1 << 20
    clients.kill_the_worker()
    world.let(0.1)

    async def sample() -> Failure | None:
        world.runs.samplers.submit(sampler, 1, b"x", b"x")
        outcome = await world.runs.samplers.outcome(sampler.id, 1, 720.0)
        assert outcome is not None
        return outcome.failure

    began, failure = world.clock.now, clients._do(sample)
    if again:
        assert failure is None and world.unloadable == 0
    else:
        assert failure is not None and failure.code == "model_not_loadable"
        assert world.clock.now - began > 500.0


def test_a_sampler_is_to_be_created_again_when_the_base_model_is_loaded(clients: Clients) -> None:
    sampler, world = sampler_of(clients), clients._world
    next_starts(clients, 1, cannot_load)
    clients.kill_the_worker()
    world.let(0.1)
    create, key = world.runs.samplers.create_from_path, NameKey(clients.all[0].id, "weights", "a")

    async def once() -> str:
        try:
            return (await create(sampler.session_id, OWNER, 10, key, None)).id
        except Unavailable as error:
            return error.code

    assert clients._do(once) == "base_model_loading"
    world.let(30.0)
    assert clients._do(once) == f"{sampler.session_id}:sample:10"


def test_a_base_model_that_was_never_loaded_fails_a_creation_at_once() -> None:
    clients = Clients()
    clients.world = World(1)
    clients.open_session("python")
    next_starts(clients, 1, cannot_load)
    clients.create(pick=0, rank=1)
    outcome, _ = clients._poll(clients.all[0].ops[0], 10.0)
    assert outcome is not None and outcome.failure is not None
    assert outcome.failure.code == "model_not_loadable"
    clients.close()


def last_states(clients: Clients) -> list[str]:
    return [key.name for key, _ in clients._world.store.names() if key.name.startswith("auto.")]


@pytest.mark.parametrize("what", ["the base model", "memory"])
def test_the_last_state_of_a_run_waits_for_a_worker(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    train(clients, 1)
    clients.all_end()
    clients._world.let(15.0)  # idle: a snapshot
    train(clients, 2)
    clients.all_end()
    if what == "memory":
        clients._world.short_in = 0
    else:
        next_starts(clients, 1, cannot_load)
    clients.kill_the_worker()
    clients._world.let(0.1)
    session = clients.sessions.pop()
    clients._do(lambda: clients._world.runs.end_session(session.id, "success"))
    clients._world.let(60.0)
    assert last_states(clients) == ["auto.4"]
    clients._check_checkpoints()


def test_the_last_state_of_a_run_is_its_snapshot_when_no_worker_is_to_be_had(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before it was waited for, and then without waiting on."""
    monkeypatch.setattr(Publisher, "due", False)
    train(clients, 1)
    clients.all_end()
    clients._world.let(15.0)  # idle: a snapshot
    train(clients, 2)
    clients.all_end()
    clients._world.unloadable = 1 << 20
    clients.kill_the_worker()
    clients._world.let(0.1)
    session = clients.sessions.pop()
    clients._do(lambda: clients._world.runs.end_session(session.id, "success"))
    clients._world.let(LAST_STATE_WAITED_FOR - 20.0)
    assert last_states(clients) == []
    clients._world.let(60.0)
    assert last_states(clients) == ["auto.2"]


def serve(clients: Clients, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Start the server again with another base model."""

    async def start(_: str) -> Any:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(clients._world, "_engines", lambda: Engines([name], start))
    clients.restart()


@pytest.mark.parametrize("snapshots_there", [False, True])
def test_runs_of_a_base_model_that_is_not_served_wait_until_it_is(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, snapshots_there: bool
) -> None:
    if not snapshots_there:

        async def snapshot(*_: Any, **__: Any) -> None: ...

        monkeypatch.setattr(Publisher, "snapshot", snapshot)
    train(clients, 1)
    clients.all_end()
    with monkeypatch.context() as planted:
        serve(clients, planted, "other")
        (run,) = clients.all
        clients._submit(run, FORWARD_BACKWARD, batch(2))
        outcome, note = clients._poll(run.ops[run.highest], 5.0)
        assert outcome is None
        assert note == "base model 'toy' is not served here; there is 'other'"
    clients.restart()
    train(clients, 3)
    check_all(clients)


def test_what_waits_for_a_base_model_that_is_not_served_ends(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(clients, 1)
    clients.all_end()
    serve(clients, monkeypatch, "other")
    (run,) = clients.all
    clients._submit(run, OPTIM_STEP, steps())
    outcome, _ = clients._poll(run.ops[run.highest], MOST_STALLED + 60)
    assert outcome is not None and outcome.failure is not None
    assert outcome.failure.code == "base_model_not_found"


# --- The storage ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["publish", "resolve", "read_manifest"])
@pytest.mark.parametrize("what", [load, save])
def test_what_needs_the_storage_waits_until_it_answers(
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    what: Callable[[Clients, str], None],
) -> None:
    world = clients._world
    train(clients, 1)
    save(clients, "a")
    clients.all_end()
    answers_at, failed = world.clock.now + 20, []
    honest = getattr(world.store, step)

    def call(*args: Any, **options: Any) -> Any:
        if world.clock.now < answers_at:
            failed.append(args)
            raise DiskFull("no space left")
        return honest(*args, **options)

    monkeypatch.setattr(world.store, step, call)
    what(clients, "a" if what is load else "b")
    clients.all_end()
    monkeypatch.undo()
    assert failed or (what, step) == (save, "read_manifest")
    check_all(clients)


def test_a_catalog_that_cannot_be_asked_for_the_epoch_ends_no_run(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store asks for it before each change, also where a snapshot makes another obsolete."""
    left = [0]

    def verify_epoch() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise CatalogUnavailable("there is no file descriptor left")

    monkeypatch.setattr(clients._world.store, "_before_change", [verify_epoch])
    save(clients, "a")
    clients.all_end()
    for count in (1, 2, 3):
        left[0] = count
        load(clients, "a")
        train(clients, count)
        clients.all_end()
        left[0] = count
        clients._world.let(30.0)  # idle: a snapshot
        assert left[0] < 0
    check_all(clients)


def test_a_save_replaces_a_checkpoint_that_is_damaged(clients: Clients) -> None:
    save(clients, "a")
    train(clients, 1)
    clients.all_end()
    key = NameKey(clients.all[0].id, "weights", "a")
    manifest_id = clients._world.store.resolve(key)
    assert manifest_id is not None
    (path,) = clients._world.root.rglob(manifest_id)
    path.chmod(0o600)
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(CorruptManifest):
        clients._world.store.read_manifest(manifest_id)
    save(clients, "a", overwrite=True)
    check_all(clients)


@pytest.mark.parametrize("seconds", [100.0, 3 * 3600.0])
def test_an_idle_state_that_the_disk_had_no_room_for_is_kept_once_it_has(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """And then leaves the worker's memory, which it could not before."""
    monkeypatch.setattr(Publisher, "due", False)
    world, (run,) = clients._world, clients.all
    train(clients, 1)
    clients.all_end()
    world.full_until = world.clock.now + seconds
    while world.clock.now < world.full_until:
        clients._beat()
        world.let(min(600.0, world.full_until - world.clock.now))
    standing = world.runs._live[run.id].driver.standing
    assert (points(clients)[0][0], standing) == (0, "idle")
    for _ in range(2):
        clients._beat()
        world.let(600.0)
    standing = world.runs._live[run.id].driver.standing
    assert (points(clients)[0][0], standing) == (2, "evicted")
    tried = [e for e in clients.events if e["event"] == "no snapshot"]
    assert len(tried) < 10 + seconds / 600.0
    check_all(clients)


# --- Bad sectors ----------------------------------------------------------------------------


def points(clients: Clients) -> list[tuple[int, str]]:
    with clients._world.catalog._engine.connect() as connection:
        rows = connection.execute(sa.select(snapshots).order_by(snapshots.c.seq.desc())).all()
    return [(row.seq, row.manifest) for row in rows]


def cannot_be_read(
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
    manifests: Collection[str],
    until: float = float("inf"),
) -> None:
    """The disk gives an error for the weights of these."""
    store, clock = clients._world.store, clients._world.clock
    bad = [store.read_manifest(id).files[ADAPTER_WEIGHTS].hash for id in manifests]
    honest = type(store).read_blob

    def read_blob(store: Any, blob: Blob, *, what: str) -> bytes:
        if blob.hash in bad and clock.now < until:
            raise IOFailed(f"reading {what}: Input/output error")
        return honest(store, blob, what=what)

    monkeypatch.setattr(type(store), "read_blob", read_blob)


@pytest.fixture
def two_snapshots(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> Clients:
    monkeypatch.setattr(Publisher, "due", False)
    for x in range(3):
        train(clients, x)
        clients.all_end()
        clients._world.let(30.0)  # idle: a snapshot
    assert [seq for seq, _ in points(clients)] == [6, 4]
    return clients


def test_a_snapshot_on_a_bad_sector_is_as_good_as_a_damaged_one(
    two_snapshots: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = two_snapshots
    (_, newest), _ = points(clients)
    cannot_be_read(clients, monkeypatch, [newest])
    clients.kill_the_worker()
    train(clients, 4)
    check_all(clients)
    assert [seq for seq, _ in points(clients)] == [4]
    assert [e["position"] for e in clients.events if e["event"] == "restored"] == [4]


def test_a_disk_that_fails_for_a_moment_costs_no_snapshot(
    two_snapshots: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = two_snapshots
    (_, newest), (_, older) = points(clients)
    until = clients._now + UNREADABLE_FOR / 2
    cannot_be_read(clients, monkeypatch, [newest, older], until)
    clients.kill_the_worker()
    train(clients, 4)
    check_all(clients)
    assert [seq for seq, _ in points(clients)] == [6, 4]
    assert [e["position"] for e in clients.events if e["event"] == "restored"] == [6]


def test_a_disk_that_fails_for_an_hour_ends_no_run(
    two_snapshots: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = two_snapshots
    cannot_be_read(clients, monkeypatch, [id for _, id in points(clients)], clients._now + 3600)
    clients.kill_the_worker()
    (run,) = clients.all
    clients._submit(run, OPTIM_STEP, steps())
    op = run.ops.pop(run.highest)
    outcome, _ = clients._poll(op, MOST_STALLED + 60)
    assert outcome is not None and outcome.failure is not None
    assert outcome.failure.code == "io_failed"
    for _ in range(4):
        clients._world.let(900.0)
        clients._beat()
    clients._submit(run, FORWARD_BACKWARD, batch(9), seq=op.seq + 1)
    outcome, _ = clients._poll(run.ops[run.highest], 60.0)
    assert outcome is not None and outcome.failure is None
    clients._check_logs()


def hangs(clients: Clients, monkeypatch: pytest.MonkeyPatch, what: str) -> int:
    """How often a worker was taken for hung until all had ended, writing a save for twenty minutes
    or, after another one's death, reading a snapshot."""
    train(clients, 1)
    clients.all_end()
    clients._world.let(30.0)  # idle: a snapshot
    honest = World.pause
    moving = {"save": {"write"}, "recovery": {"restore", "restore anew"}}[what]

    def pause(world: World, what: str) -> float:
        return 2 * HUNG_AFTER if what in moving else honest(world, what)

    monkeypatch.setattr(World, "pause", pause)
    for worker in clients._world.lives:
        worker._pause = clients._world.pause
    if what == "save":
        save(clients, "a")
    else:
        clients._world.kill_worker()
        train(clients, 2)
    until = clients._now + 6 * HUNG_AFTER
    (run,) = clients.all
    for op in run.ops.values():
        while op.seen is None and clients._poll(op, 30.0)[0] is None and clients._now < until:
            pass
    return sum(event["event"].startswith("worker hangs") for event in clients.events)


@pytest.mark.parametrize("what", ["save", "recovery"])
def test_a_storage_that_is_slow_is_no_worker_that_hangs(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert hangs(clients, monkeypatch, what) == 0
    check_all(clients)


@pytest.mark.parametrize("what", ["save", "recovery"])
def test_one_whose_storage_stands_still_is_replaced(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(toy, "PIECE_TAKES", 2 * HUNG_AFTER)
    assert hangs(clients, monkeypatch, what) > 1
