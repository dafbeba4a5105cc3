"""A thousand open runs fit one worker: those used longest ago leave its memory, and come back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from holdfast.engine.interface import EngineError
from holdfast.runs import bodies
from holdfast.runs.bodies import FORWARD, FORWARD_BACKWARD, OPTIM_STEP
from holdfast.runs.driver import IDLE_BEFORE_EVICTION
from holdfast.runs.engines import DEFAULT_ADAPTER_MEMORY
from holdfast.runs.publishing import Publisher
from holdfast.runs.residents import Residents

from .sim import World
from .test_service import OWNER, Clients, steps
from .toy import NAME, ToyEngine, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

RUNS = 60


def opened(adapter_memory: int) -> Clients:
    """Clients that have opened many runs and use each in turn, now and then."""
    clients = Clients()
    clients.world = World(1, adapter_memory=adapter_memory)
    clients.open_session("python")
    for _ in range(RUNS):
        clients.create(pick=1, rank=1)
        clients._world.let(0.1)
    for x in range(2):
        for run in clients.all:
            clients._submit(run, FORWARD_BACKWARD, batch(x))
            clients._submit(run, OPTIM_STEP, steps())
            clients._world.let(1.0)
    return clients


@pytest.fixture
def few() -> Iterator[Clients]:
    clients = opened(adapter_memory=6000)  # about ten of the toy's states
    yield clients
    clients.close()


def test_a_worker_holds_no_more_runs_than_its_memory_is_for(few: Clients) -> None:
    (worker,) = few._world.lives
    host = few._world.runs.engines[NAME]
    assert 2 <= len(worker.states) == len(host.residents) <= 20
    assert host.residents.size <= 6000
    few.all_end()  # all of them, whichever had left
    for run in few.all:
        few._submit(run, bodies.FORWARD_BACKWARD, batch(3))
    few._world.let(30.0)
    few.all_end()
    few._check_logs()
    assert host.residents.size <= 6000


def test_without_that_limit_it_holds_them_all() -> None:
    clients = opened(adapter_memory=DEFAULT_ADAPTER_MEMORY)
    (worker,) = clients._world.lives
    assert len(worker.states) == RUNS
    clients.close()


def test_no_more_leave_than_have_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the snapshot is taken with which one leaves."""
    left = list[int]()
    gone = Residents.gone

    def counted(residents: Residents, key: str) -> None:
        before = len(residents)
        gone(residents, key)
        left.append(before - len(residents))

    monkeypatch.setattr(Residents, "gone", counted)
    clients = opened(adapter_memory=6000)
    stay = len(clients._world.runs.engines[NAME].residents)
    clients.close()
    # Each comes three times: new, and for each of two uses.
    assert sum(left) <= 3 * RUNS - stay


def test_the_return_of_an_evicted_run_is_no_recovery() -> None:
    """Whatever it did since its snapshot that leaves the state as it is."""
    clients = Clients()
    clients.begin(seed=1, client="python")
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    clients._world.let(20.0)  # idle: a snapshot
    clients._submit(run, FORWARD, batch(2))
    clients._world.let(IDLE_BEFORE_EVICTION + 20.0)
    assert not clients._world.lives[-1].states
    clients._submit(run, OPTIM_STEP, steps())
    clients.all_end()
    record = clients._do(lambda: clients._world.runs.record(run.id, OWNER))
    assert (record.recoveries, record.replayed) == (0, 0)
    clients.close()


def test_a_burst_of_new_runs_waits_for_others_to_leave() -> None:
    """Each is written before it leaves, which takes longer than making it."""
    clients = Clients()
    clients.world = World(1, adapter_memory=6000)
    clients.open_session("python")
    sizes = []
    for _ in range(RUNS):
        clients.create(pick=1, rank=1)
        sizes.append(clients._world.runs.engines[NAME].residents.size)
    for run in clients.all:
        clients._submit(run, FORWARD_BACKWARD, batch(1))
    while any(run.ops[1].seen is None for run in clients.all):
        clients._world.let(0.05)
        sizes.append(clients._world.runs.engines[NAME].residents.size)
        for run in clients.all:
            run.ops[1].seen = run.ops[1].seen or clients._poll(run.ops[1], 0.0)[0]
    clients.all_end()
    clients._check_logs()
    clients.close()
    assert max(sizes) <= 6000 + 2 * 600


def test_a_recovery_that_waits_keeps_no_other_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replay ran out of memory: nobody can say when it would leave the worker."""
    monkeypatch.setattr(Publisher, "due", False)
    clients = Clients()
    clients.world = World(1, adapter_memory=1700)  # two of the toy's states
    clients.open_session("python")
    clients.create(pick=1, rank=1)
    (waits,) = clients.all
    clients._world.let(1.0)
    for x in (2, 3):
        clients._submit(waits, FORWARD_BACKWARD, batch(x))
    clients._world.let(1.0)
    honest = ToyEngine.forward_backward

    async def forward_backward(engine: ToyEngine, run: str, seq: int, body: bytes) -> bytes:
        if body == batch(3):
            raise EngineError("out_of_memory", "it ran out of memory", "server")
        return await honest(engine, run, seq, body)

    monkeypatch.setattr(ToyEngine, "forward_backward", forward_backward)
    clients.kill_the_worker()
    clients._submit(waits, OPTIM_STEP, steps())
    clients._world.let(3.0)
    for _ in range(5):
        started = clients._now
        clients.create(pick=1, rank=1)
        run = clients.all[-1]
        clients._submit(run, FORWARD_BACKWARD, batch(4))
        outcome, _ = clients._poll(run.ops[1], 300.0)
        assert outcome is not None and outcome.failure is None
        assert clients._now - started < 20.0
    clients._check_logs()
    clients.close()


@pytest.mark.anyio
async def test_room_that_comes_of_a_smaller_size_is_noticed() -> None:
    residents = Residents(100)
    for key in "ab":
        residents.put(key, lambda: None)
        residents.takes(key, 50)
    waiting = asyncio.create_task(residents.come())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    residents.takes("b", 10)
    async with asyncio.timeout(1.0):
        await waiting


@pytest.mark.anyio
async def test_room_is_waited_for_as_long_as_somebody_is_about_to_leave() -> None:
    residents = Residents(100)
    for key in "ab":
        residents.put(key, lambda: None)
        residents.takes(key, 40)
    waiting = asyncio.create_task(residents.come())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    residents.gone("a")
    await waiting
    assert not residents.has_room  # it is kept for that one
    residents.came()
    residents.put("c", lambda: None)  # taken to be as large as the last
    assert residents.size == 80
    waiting = asyncio.create_task(residents.come())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    residents.stays("b")  # nobody can leave: the worker is given more than it should have
    await waiting


@pytest.mark.anyio
async def test_nobody_waits_for_the_room_of_one_that_is_fixed() -> None:
    residents, asked = Residents(100), list[str]()
    for key in "abc":
        residents.put(key, lambda key=key: asked.append(key))  # type: ignore[misc]
        residents.takes(key, 30)
    residents.fix("a")
    waiting = asyncio.create_task(residents.come())
    await asyncio.sleep(0.01)
    assert asked == ["b"]  # in its place
    assert not waiting.done()
    residents.fix("b")
    async with asyncio.timeout(1.0):
        await waiting


def test_those_used_longest_ago_leave_first() -> None:
    residents, asked = Residents(100), list[str]()
    for key in "abc":
        residents.put(key, lambda key=key: asked.append(key))  # type: ignore[misc]
        residents.takes(key, 40)
    assert asked == ["a"]
    residents.used("a")  # busy: it stays, and is not the oldest any more
    assert asked == ["a", "b"]
    residents.gone("b")
    residents.used("c")
    assert asked == ["a", "b"] and residents.size == 80
    residents.clear()
    assert len(residents) == residents.size == 0


def test_what_is_written_of_one_that_leaves_is_no_use_of_it() -> None:
    residents, asked = Residents(100), list[str]()
    for key in "abc":
        residents.put(key, lambda key=key: asked.append(key))  # type: ignore[misc]
        residents.takes(key, 40)
    residents.takes("a", 41)  # its last snapshot
    assert asked == ["a"]


def test_one_that_is_larger_than_the_limit_stays_while_it_is_used() -> None:
    residents = Residents(100)
    residents.put("a", lambda: pytest.fail("the only one was asked to leave"))
    residents.takes("a", 1000)
    assert len(residents) == 1
