"""What outlives a worker, a session, a locked database, and a client that goes away."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog import CatalogUnavailable
from holdfast.catalog.tables import operations
from holdfast.runs import bodies
from holdfast.runs.bodies import Save
from holdfast.runs.driver import IDLE_BEFORE_EVICTION, Driver
from holdfast.runs.run import Run
from holdfast.runs.sessions import Sessions
from holdfast.store import NameKey

from .model import Op
from .test_service import OWNER, Clients, steps
from .toy import batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

DAY = 24 * 3600.0


def train(clients: Clients, run: int = 0) -> None:
    clients._submit(clients.all[run], bodies.FORWARD_BACKWARD, batch(1))
    clients._submit(clients.all[run], bodies.OPTIM_STEP, steps())
    clients._submit(clients.all[run], bodies.FORWARD_BACKWARD, batch(2))


def expire(clients: Clients) -> NameKey:
    """Let the session expire; where its run's last state must be."""
    (run,) = clients.all
    run.ending = "session_ended"
    clients._world.let(31 * 60)
    clients.sessions.clear()
    return NameKey(run.id, "weights", f"auto.{run.highest}")


@pytest.mark.parametrize("what", ["nothing", "restart", "kill", "worker"])
def test_the_last_state_of_an_expired_session_is_kept(clients: Clients, what: str) -> None:
    train(clients)
    clients.all_end()
    match what:
        case "restart":
            clients.restart()
        case "kill":
            clients.kill()
        case "worker":
            clients.kill_the_worker()
    key = expire(clients)
    assert clients._world.store.resolve(key) is not None
    clients._check_checkpoints()


def test_the_last_state_is_lost_when_only_a_worker_that_holds_it_is_asked(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def keep(driver: Driver, kept: float) -> bool:
        if driver._placement.held:
            await driver._publisher.keep_as("auto.3", kept)
        return True

    monkeypatch.setattr(Driver, "keep_last_state", keep)
    train(clients)
    clients.all_end()
    clients._world.let(IDLE_BEFORE_EVICTION + 60)
    assert clients._world.store.resolve(expire(clients)) is None


@pytest.mark.parametrize("jump", [+2 * DAY, -2 * DAY, 0.0])
@pytest.mark.parametrize("again", ["nothing", "restart", "kill"])
def test_what_was_read_is_kept_for_ten_minutes_whatever_the_clock_says(
    clients: Clients, jump: float, again: str
) -> None:
    train(clients)
    clients.all_end()
    (run,) = clients.all
    op = run.ops[run.highest]
    clients._world.runs.delivered(op.request_id)
    clients._world.let(60.0)  # it is noted
    clients._world.clock.wall += jump
    if again != "nothing":
        getattr(clients, again)()
    for minutes in range(1, 9):
        clients._world.let(60.0)
        found, _ = clients._poll(op, 1.0)
        assert found is not None and found.result is not None, f"gone after {minutes} minutes"
    clients._world.let(11 * 60.0)
    found, _ = clients._poll(op, 1.0)
    assert found is not None and found.failure is not None
    assert found.failure.code == "result_expired"


def test_a_session_whose_end_was_interrupted_is_ended_at_the_next_start(clients: Clients) -> None:
    (run,) = clients.all
    train(clients)
    run.ending = "session_ended"
    session = clients.sessions.pop()
    clients._do(lambda: clients._world.runs.end_session(session.id, "success"))
    clients.kill()  # before the runs were ended
    clients._world.let(10.0)
    clients.all_end()
    record = clients._do(lambda: clients._world.runs.record(run.id, OWNER))
    assert record.state == "unloaded"


@pytest.mark.parametrize("refused", range(1, 8))
def test_a_locked_database_delays_a_save_and_fails_nothing(clients: Clients, refused: int) -> None:
    (run,) = clients.all
    train(clients)
    clients._submit(run, bodies.SAVE_WEIGHTS, Save("a"))
    clients.refuse_commits(commits=refused)
    clients._submit(run, bodies.FORWARD_BACKWARD, batch(3))
    clients.all_end()
    clients._check_checkpoints()


def test_a_killing_operation_is_not_laid_to_its_neighbours(clients: Clients) -> None:
    clients.create(pick=0, rank=1)
    first, second = clients.all
    clients._submit(first, bodies.FORWARD_BACKWARD, batch(1, kills=True))
    train(clients, 1)
    clients.all_end()
    with clients._world.catalog._engine.connect() as connection:
        blamed = connection.scalars(
            sa.select(operations.c.run_id).where(operations.c.attempts > 0)
        ).all()
    assert blamed == [first.id]
    assert second.highest == 3


def test_a_submission_whose_client_goes_away_is_in_its_place(clients: Clients) -> None:
    (run,) = clients.all
    body = batch(1)

    async def leave() -> None:
        live = await clients._world.runs.live(run.id, OWNER)
        asking = asyncio.create_task(live.submit(1, bodies.FORWARD_BACKWARD, body))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])

    clients._do(leave)
    clients._submit(run, bodies.FORWARD_BACKWARD, body, seq=1)
    clients.all_end()


def end_in_part(clients: Clients) -> None:
    """A session ends, and the server is killed once its pending operations have failed."""
    (run,) = clients.all
    train(clients)
    clients.all_end()
    for x in range(30):  # some are done when the end comes
        clients._submit(run, bodies.FORWARD_BACKWARD, batch(x))
    run.ending = "session_ended"
    session = clients.sessions.pop()
    clients._do(lambda: clients._world.runs.end_session(session.id, "success"))
    failed: list[int] = []
    for _ in range(1000):
        if failed:
            break
        clients._world.let(0.01)
        with clients._world.catalog._engine.connect() as connection:
            query = sa.select(operations.c.seq).where(operations.c.state == "failed")
            failed = list(connection.scalars(query))
    assert failed
    clients.kill()
    clients._world.let(10.0)
    clients.all_end()
    clients._check_checkpoints()
    position = min(failed) - 1
    assert clients._world.store.resolve(NameKey(run.id, "weights", f"auto.{position}"))


def test_what_an_interrupted_end_overtook_is_no_part_of_the_last_state(clients: Clients) -> None:
    end_in_part(clients)


def test_what_the_end_overtook_would_be_taken_for_failures(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.runs.journal.ENDS", frozenset())
    with pytest.raises(AssertionError):
        end_in_part(clients)


def test_what_came_first_stays_first_when_the_clock_is_set_back(clients: Clients) -> None:
    (run,) = clients.all
    for _ in range(2):
        clients.leave_a_gap(pick=1)  # 1 and 3 are missing
    clients.all_end()
    for number in (1, 0):  # the later one comes first
        clients.fill_a_gap(pick=0, which=number, kind=bodies.FORWARD_BACKWARD)
        clients._world.clock.wall -= DAY
        clients.restart()
    clients._submit(run, bodies.OPTIM_STEP, steps())
    clients.all_end()  # and its message is the one that the model expects
    outcome = run.ops[run.highest].seen
    assert outcome is not None and outcome.failure is not None
    assert "request 3 " in outcome.failure.message


def give_up_a_number(clients: Clients) -> Run:
    """1, to which no replay goes back."""
    (run,) = clients.all
    clients._submit(run, bodies.FORWARD_BACKWARD, batch(1), seq=2)
    clients.all_end()
    for _ in range(3):
        clients._submit(run, bodies.OPTIM_STEP, steps())
        clients.all_end()
        clients._world.let(30.0)  # idle: a snapshot
    live = clients._do(lambda: clients._world.runs.live(run.id, OWNER))
    assert isinstance(live, Run)
    assert live.order.was_skipped(1)
    return live


def test_a_number_that_was_given_up_is_forgotten_together_with_its_row(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = give_up_a_number(clients)
    (run,) = clients.all
    clients._world.let(900.0)
    assert live.order.was_skipped(1) and clients._in_journal(run, 1) is not None
    monkeypatch.setattr("holdfast.runs.retention.SKIPPED_KEPT", 0.0)
    clients._world.let(60.0)
    assert not live.order.was_skipped(1) and clients._in_journal(run, 1) is None
    for again in ("_beat", "kill"):
        getattr(clients, again)()
        request = clients._send(run, Op(1, bodies.FORWARD_BACKWARD, batch(9)))
        outcome, _ = clients._do(partial(clients._world.runs.outcome, request, OWNER, 30.0))
        assert outcome is not None and outcome.failure is not None
        assert outcome.failure.code == "result_expired"
    clients._submit(run, bodies.OPTIM_STEP, steps())
    clients.all_end()
    clients._check_logs()


def test_a_number_that_comes_while_it_is_forgotten_is_late(clients: Clients) -> None:
    live = give_up_a_number(clients)

    async def both() -> None:
        coming = asyncio.create_task(live.submit(1, bodies.FORWARD_BACKWARD, batch(9)))
        await asyncio.sleep(0)
        await asyncio.gather(coming, live.forget_skipped([1]))

    clients._do(both)
    assert not live.order.was_skipped(1)
    (run,) = clients.all
    clients._enter(run, Op(1, bodies.FORWARD_BACKWARD, batch(9)), clients._now)
    clients._submit(run, bodies.OPTIM_STEP, steps())
    clients.all_end()
    assert run.ops[run.highest].seen is not None
    clients._check_logs()


# --- Sessions whose clients the server does not answer --------------------------------------


async def beat(clients: Clients, session_id: str) -> None:
    """Ask every ten seconds, as clients do, whatever is answered."""
    while True:
        with suppress(CatalogUnavailable):
            await clients._world.runs.sessions.live(session_id, OWNER)
        await asyncio.sleep(10.0)


async def is_open(clients: Clients, session_id: str) -> bool:
    return (await clients._world.runs.sessions.get(session_id, OWNER)).ended is None


def survives_an_outage(clients: Clients, seconds: float, beats: bool) -> bool:
    """Whether a session is open after the database has not answered for a while."""
    world, (session,) = clients._world, clients.sessions

    async def outage() -> bool:
        beating = asyncio.create_task(beat(clients, session.id) if beats else asyncio.sleep(0))
        await asyncio.sleep(60.0)
        world.refuse_reads = world.refuse_commits = 1 << 30
        await asyncio.sleep(seconds)
        world.refuse_reads = world.refuse_commits = 0
        await asyncio.sleep(60.0)
        beating.cancel()
        return await is_open(clients, session.id)

    return world.loop.run_until_complete(outage())


# They end at different moments between two looks for silent sessions.
@pytest.mark.parametrize("seconds", [32 * 60.0 + later for later in range(0, 30, 3)])
def test_a_session_outlives_a_database_that_answers_none_of_its_beats(
    clients: Clients, seconds: float
) -> None:
    assert survives_an_outage(clients, seconds, beats=True)


def test_a_session_without_beats_ends_though_the_database_did_not_answer(clients: Clients) -> None:
    assert not survives_an_outage(clients, 32 * 60.0, beats=False)


def test_a_beat_of_somebody_unknown_makes_no_session(clients: Clients) -> None:
    clients._world.refuse_reads = 1
    with pytest.raises(CatalogUnavailable):
        clients._world.loop.run_until_complete(clients._world.runs.sessions.live("none", OWNER))
    clients._world.let(31 * 60.0)
    assert clients._world.runs.sessions.silent() == []


def test_a_session_that_beats_while_others_are_ended_goes_on(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients.open_session("python")
    first, second = clients.sessions
    honest = Sessions.end

    async def end(sessions: Sessions, session_id: str, *args: Any, **also: Any) -> bool:
        sessions.seen(second.id if session_id == first.id else first.id)
        return await honest(sessions, session_id, *args, **also)

    monkeypatch.setattr(Sessions, "end", end)
    clients._world.let(31 * 60.0)
    clients.all[0].ending = "session_ended"
    found = [clients._do(partial(is_open, clients, x.id)) for x in (first, second)]
    assert sorted(found) == [False, True]
