"""A server that stops in good order: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import sqlalchemy as sa

from holdfast.catalog.tables import operations, sessions
from holdfast.runs.bodies import FORWARD_BACKWARD, OPTIM_STEP
from holdfast.runs.driver import Driver
from holdfast.runs.errors import Unavailable
from holdfast.runs.order import Entry
from holdfast.runs.publishing import Publisher
from holdfast.runs.stopping import Stopping

from .test_recovery import check_all, save, train
from .test_service import OWNER, Clients, steps
from .toy import NAME, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def stop_in_the_middle(clients: Clients, kind: str) -> None:
    """Stop the server while an operation computes that takes longer than it has, and go on."""
    train(clients, 1)
    clients.all_end()
    world, (run,) = clients._world, clients.all
    world.pause = lambda what: 3.0 if what == kind else 0.01  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    clients._submit(run, OPTIM_STEP, steps())
    world.let(0.5)
    world.restart(within=4.0)
    train(clients, 3)
    save(clients, "a")
    check_all(clients)


@pytest.mark.parametrize("kind", [FORWARD_BACKWARD, OPTIM_STEP])
def test_an_operation_in_whose_middle_the_server_stops_is_not_executed_twice(
    clients: Clients, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    stop_in_the_middle(clients, kind)


@pytest.mark.parametrize("kind", [FORWARD_BACKWARD, OPTIM_STEP])
def test_a_state_that_is_kept_behind_the_operation_under_way_is_found(
    clients: Clients, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    monkeypatch.setattr(Driver, "_state_is_known", True)
    with pytest.raises(AssertionError):
        stop_in_the_middle(clients, kind)


def end_after_a_defect_in_the_middle(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of ours meets a run when the worker has computed; then its session ends."""
    train(clients, 1)
    clients.all_end()
    world, (run,) = clients._world, clients.all
    honest = Driver._passed
    met: list[int] = []

    def passed(driver: Driver, entry: Entry) -> None:
        if not met:
            met.append(entry.seq)
            raise ZeroDivisionError("a defect")
        honest(driver, entry)

    monkeypatch.setattr(Driver, "_passed", passed)
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    world.let(1.0)
    session = clients.sessions.pop()
    clients._do(lambda: world.runs.end_session(session.id, "success"))
    world.let(5.0)
    last = [key for key, _ in world.store.names()]
    assert [key.name for key in last] == ["auto.2"]
    run.interpret(2, clients._now)
    clients._check_state(last[0], run.history[2], optimizer=True)


def test_a_defect_in_the_middle_of_an_operation_leaves_the_state_before_it(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_after_a_defect_in_the_middle(clients, monkeypatch)


def test_a_last_state_that_holds_an_operation_too_many_is_found(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Driver, "_state_is_known", True)
    with pytest.raises(AssertionError):
        end_after_a_defect_in_the_middle(clients, monkeypatch)


# --- What comes while it stops --------------------------------------------------------------


class Asked:
    """Requests of all kinds that are sent one after the other from just before a stop on."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self.begun = 0
        """How many of them were sent before the stop had begun."""
        self.taken: dict[str, str] = {}
        """Those that were taken, and the requests for whose outcomes they may be polled."""
        self.refused: set[str] = set()

    async def send(self) -> None:
        """More than a stop of this simulation takes: every pause is one in which it may begin."""
        runs, (run,) = self._clients._world.runs, self._clients.all
        (session,) = self._clients.sessions

        async def operation(number: int) -> str:
            live = await runs.live(run.id, OWNER)
            return await live.submit(number, FORWARD_BACKWARD, batch(number))

        async def create(number: int) -> str:
            made = await runs.create(
                session,
                100 + number,
                base_model=NAME,
                lora={"rank": 1, "seed": 1},
                optimizer="adamw",
                user_metadata=None,
                idempotency_key=f"run beside {number}",
            )
            return made.key.request_id(0)

        async def open_session(number: int) -> str:
            opened = await runs.sessions.create(
                OWNER,
                client="python",
                idempotency_key=f"beside {number}",
                sdk_version=None,
                tags=[],
                user_metadata=None,
                project_id=None,
                display_name=None,
            )
            return opened.id

        async def sample(number: int) -> str:
            sampler = await runs.samplers.create_from_base(session.id, OWNER, number, NAME)
            return runs.samplers.submit(sampler, 1, b"x", b"x")

        async def one(name: str, call: Callable[[int], Awaitable[str]], number: int) -> None:
            try:
                self.taken[f"{name} {number}"] = id = await call(number)
            except Unavailable as error:
                assert error.code == "stopping"
                self.refused.add(f"{name} {number}")
                return
            if name != "session":
                await runs.outcome(id, OWNER, 0.0)  # it is known from then on

        kinds = {
            "operation": operation,
            "create": create,
            "session": open_session,
            "sample": sample,
        }
        sending = []
        for number in range(1, 60):
            self.begun += not runs.stopping.begun.is_set()
            sending += [
                asyncio.create_task(one(name, call, number)) for name, call in kinds.items()
            ]
            await asyncio.sleep(0.0 if number % 3 else 0.001)
        await asyncio.gather(*sending)


def stop_while_asked(clients: Clients) -> Asked:
    """What was taken must be there after the stop, and nothing else."""
    clients.all_end()
    world = clients._world
    asked = Asked(clients)
    world.restart(beside=asked.send)
    assert world.left == set()
    with world.catalog._engine.connect() as connection:
        known = {f"{row.run_id}:{row.seq}" for row in connection.execute(sa.select(operations))}
        known |= set(connection.scalars(sa.select(sessions.c.id)))
    known -= {clients.all[0].ops[0].request_id, clients.sessions[0].id}
    durable = {id for name, id in asked.taken.items() if not name.startswith("sample")}
    assert durable == known, "more or less was taken than is there"
    assert len({name.partition(" ")[0] for name in asked.refused}) == 4
    last = max(int(name.partition(" ")[2]) for name in asked.taken)
    assert last <= asked.begun, "a request was taken that came after the stop had begun"
    for name, id in asked.taken.items():
        if name.startswith(("operation", "create")):
            outcome, _ = clients._do(partial(world.runs.outcome, id, OWNER, 1000.0))
            assert outcome is not None and outcome.failure is None, (name, outcome)
    return asked


@pytest.mark.parametrize("seed", range(4))
def test_a_request_is_taken_in_full_or_refused_for_now_when_the_server_stops(seed: int) -> None:
    clients = Clients()
    clients.begin(seed=seed, client="python")
    try:
        asked = stop_while_asked(clients)
        assert asked.taken
        clients._check_logs()
    finally:
        clients.close()


@pytest.mark.parametrize("at", [0.0, 0.012, 0.5])
def test_a_session_may_end_while_the_server_stops(clients: Clients, at: float) -> None:
    """Whoever ends it is answered; what is left to do is done by the next start."""
    train(clients, 2)
    clients.all_end()
    world, (run,), session = clients._world, clients.all, clients.sessions.pop()
    world.pause = lambda what: 1.0 if what == FORWARD_BACKWARD else 0.01  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    clients._submit(run, FORWARD_BACKWARD, batch(2))

    async def end() -> None:
        await asyncio.sleep(at)
        await world.runs.end_session(session.id, "success")

    world.restart(beside=end)
    assert world.left == set()
    world.let(10.0)
    last = run.highest
    outcome, _ = clients._poll(run.ops[last], 60.0)
    assert outcome is not None
    position = last if outcome.failure is None else last - 1
    assert outcome.failure is None or outcome.failure.code == "session_ended"
    (key,) = (key for key, _ in world.store.names())
    assert key.name == f"auto.{position}"
    assert clients._do(partial(world.runs.record, run.id, OWNER)).state == "unloaded"
    run.interpret(position, clients._now)
    clients._check_state(key, run.history[position], optimizer=True)
    clients._check_logs()


def test_a_request_that_is_taken_by_a_server_that_stops_is_found(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopping, "check", lambda _: None)
    with pytest.raises(AssertionError):
        stop_while_asked(clients)
