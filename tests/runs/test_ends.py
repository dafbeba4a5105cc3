"""Whatever ends a run, each request that was accepted has an outcome and nothing is left over."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import Callable, Coroutine, Iterator
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog import CatalogUnavailable
from holdfast.catalog.tables import operations, runs, sessions, snapshots
from holdfast.engine.interface import EngineError
from holdfast.runs import bodies, journal
from holdfast.runs.bodies import CreateFromState, Save
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.driver import Driver
from holdfast.runs.errors import Reason, RunError, Waiting, storage_failed
from holdfast.runs.journal import Failure, Outcome, RunKey
from holdfast.runs.publishing import Publisher
from holdfast.runs.run import Run
from holdfast.runs.service import RunRecord
from holdfast.runs.sessions import Sessions
from holdfast.store import LocalStore, NameKey, Unavailable

from .sim import World
from .test_service import OWNER, Clients, create_run, steps
from .toy import NAME, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


@pytest.fixture(params=[1, 3])
def clients(request: pytest.FixtureRequest) -> Iterator[Clients]:
    clients = Clients()
    clients.begin(seed=request.param, client="python")
    yield clients
    clients.close()


def unsettled(clients: Clients) -> list[tuple[str, int]]:
    """Requests that wait for their outcome, as the journal has them."""
    with clients._world.catalog._engine.connect() as connection:
        query = sa.select(operations.c.run_id, operations.c.seq).where(
            operations.c.settled.is_(None)
        )
        return [(row.run_id, row.seq) for row in connection.execute(query)]


# --- Requests that come while the run ends --------------------------------------------------


def submit_beside(
    clients: Clients, model_id: str, end: Callable[[], Coroutine[Any, Any, None]]
) -> list[str]:
    """Send requests one after the other without waiting, and end the run; those accepted."""
    accepted: list[str] = []

    async def submit(number: int) -> None:
        try:
            run = await clients._world.runs.live(model_id, OWNER)
            accepted.append(await run.submit(number, bodies.FORWARD_BACKWARD, batch(number)))
        except RunError as error:
            assert error.code in ("model_unloaded", "session_ended", "creation_failed")

    async def both() -> None:
        requests = [asyncio.create_task(submit(number)) for number in range(1, 20)]
        await asyncio.gather(end(), *requests)

    clients._do(both)
    return accepted


async def nothing() -> None:
    """It ends by itself."""


def outcomes(clients: Clients, accepted: list[str]) -> list[Outcome | None]:
    async def poll() -> list[Outcome | None]:
        return [(await clients._world.runs.outcome(id, OWNER, 60.0))[0] for id in accepted]

    found: list[Outcome | None] = clients._do(poll)
    return found


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003])
@pytest.mark.parametrize("whole_session", [False, True])
def test_a_request_that_is_accepted_while_its_run_ends_has_an_outcome(
    clients: Clients, whole_session: bool, delay: float
) -> None:
    (run,), (session,) = clients.all, clients.sessions
    clients.all_end()

    async def end() -> None:
        await asyncio.sleep(delay)
        if whole_session:
            await clients._world.runs.end_session(session.id, "success")
        else:
            await clients._world.runs.unload(run.id, OWNER)

    accepted = submit_beside(clients, run.id, end)
    assert accepted
    assert None not in outcomes(clients, accepted)
    clients._world.let(60.0)
    assert unsettled(clients) == []
    assert None not in outcomes(clients, accepted)


def test_a_request_that_is_accepted_while_the_creation_fails_has_an_outcome(
    clients: Clients,
) -> None:
    (session,) = clients.sessions
    for number in range(100, 105):
        body = CreateFromState("nobody", "weights", "nowhere", True, [OWNER])

        async def create(number: int = number, body: CreateFromState = body) -> str:
            run = await clients._world.runs.create_from_state(
                session, number, body, user_metadata=None, idempotency_key=None
            )
            return run.key.id

        accepted = submit_beside(clients, clients._do(create), nothing)
        found = outcomes(clients, accepted)
        assert {x.failure.code for x in found if x and x.failure} <= {"creation_failed"}
        assert None not in found
    clients._world.let(60.0)
    assert unsettled(clients) == []


def test_a_run_that_is_created_while_its_session_ends_ends_with_it(clients: Clients) -> None:
    (session,) = clients.sessions
    world = clients._world

    async def create(number: int) -> str | None:
        lora = {"rank": 1, "seed": 1}
        try:
            run = await world.runs.create(
                session,
                number,
                base_model=NAME,
                lora=lora,
                optimizer="adamw",
                user_metadata=None,
                idempotency_key=None,
            )
        except RunError as error:
            assert error.code == "session_ended"
            return None
        return run.key.id

    async def both() -> list[str | None]:
        creations = [asyncio.create_task(create(number)) for number in range(10, 16)]
        await asyncio.sleep(0.002)
        await world.runs.end_session(session.id, "success")
        return await asyncio.gather(*creations)

    created = [id for id in clients._do(both) if id is not None]
    world.let(60.0)

    async def states() -> set[str]:
        return {(await world.runs.record(id, OWNER)).state for id in created}

    assert clients._do(states) <= {"unloaded"}
    assert unsettled(clients) == []


# --- Defects --------------------------------------------------------------------------------


def train(clients: Clients, count: int = 3) -> None:
    for x in range(count):
        clients._submit(clients.all[0], bodies.FORWARD_BACKWARD, batch(x))
        clients._submit(clients.all[0], bodies.OPTIM_STEP, steps())
    clients.all_end()


def state_of(clients: Clients) -> str:
    record = clients._do(lambda: clients._world.runs.record(clients.all[0].id, OWNER))
    assert isinstance(record, RunRecord)
    return record.state


def rows(clients: Clients, table: sa.Table) -> int:
    with clients._world.catalog._engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def last_states(clients: Clients) -> list[int]:
    """The positions of a run's states that were kept at its end."""
    found = [key.name for key, _ in clients._world.store.names()]
    return [int(name.removeprefix("auto.")) for name in found if name.startswith("auto.")]


def test_an_outcome_that_cannot_be_recorded_ends_the_run_and_leaves_nobody_waiting(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(clients)
    clients._world.let(15.0)  # a snapshot
    run = clients.all[0]
    left = [4]

    def settle(*args: Any, **others: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise ValueError("a defect in settling")
        honest(*args, **others)

    honest = journal.settle
    monkeypatch.setattr(journal, "settle", settle)
    clients._submit(run, bodies.FORWARD_BACKWARD, batch(9))
    clients._submit(run, bodies.OPTIM_STEP, steps())
    for seq in (7, 8):
        outcome, _ = clients._poll(run.ops[seq], 60.0)
        assert outcome is not None and outcome.failure is not None
        assert outcome.failure.code == "internal_error"
    clients._world.let(100.0)
    assert unsettled(clients) == []
    assert state_of(clients) == "unloaded"
    assert last_states(clients) == [6]  # not what followed, which was answered as failed
    again, _ = clients._poll(run.ops[7], 60.0)
    assert again is not None and again.failure is not None
    assert again.failure.code == "internal_error"


def test_no_snapshot_overtakes_an_outcome_that_cannot_be_recorded(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(clients)
    clients._world.let(15.0)
    run = clients.all[0]
    honest = journal.settle

    def settle(c: Any, segments: Any, key: Any, seq: int, outcome: Outcome, **others: Any) -> None:
        if seq == 7 and outcome.failure is None:
            raise ValueError("a defect in settling")
        honest(c, segments, key, seq, outcome, **others)

    monkeypatch.setattr(journal, "settle", settle)
    monkeypatch.setattr(Publisher, "due", True)
    clients._submit(run, bodies.FORWARD_BACKWARD, batch(9))
    clients._world.let(100.0)
    assert last_states(clients) == [6]


@pytest.mark.parametrize("where", ["driver", "publishing"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_run_that_met_a_defect_is_over_and_its_last_state_kept(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, where: str, restart: bool
) -> None:
    train(clients)
    run = clients.all[0]
    met: list[Any] = []
    honest = Driver.compute

    async def compute(*args: Any) -> bytes:
        if not met:
            met.append(args)
            raise ZeroDivisionError("a defect")
        return await honest(*args)

    async def finish_save(*_: Any) -> None:
        raise ZeroDivisionError("a defect")

    if where == "driver":
        monkeypatch.setattr(Driver, "compute", compute)
        clients._submit(run, bodies.FORWARD_BACKWARD, batch(1))
    else:
        monkeypatch.setattr(Publisher, "_finish_save", finish_save)
        clients._submit(run, bodies.SAVE_WEIGHTS, Save("a"))
    outcome, _ = clients._poll(run.ops[7], 60.0)
    clients._world.let(10.0)
    assert outcome is not None and outcome.failure is not None
    assert outcome.failure.code == "internal_error"
    if restart:
        clients.restart()
    assert state_of(clients) == "unloaded"
    assert last_states(clients) == ([6] if where == "driver" else [7])
    run.interpret(6, clients._now)
    (key,) = (key for key, _ in clients._world.store.names())
    clients._check_state(key, run.history[6], optimizer=True)
    with pytest.raises(RunError) as refused:
        clients._submit(run, bodies.FORWARD_BACKWARD, batch(2))
    assert refused.value.code == "model_unloaded"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "too many open files"),
        sa.exc.TimeoutError("no connection is free"),
        sa.exc.OperationalError("SELECT", {}, Exception("disk I/O error")),
    ],
)
def test_a_catalog_that_cannot_be_read_for_a_while_delays_a_recovery(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    train(clients)
    left = [5]

    def entered(name: str) -> Callable[..., Any]:
        honest = getattr(journal, name)

        def query(*args: Any, **others: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                raise error
            return honest(*args, **others)

        return query

    clients.kill_the_worker()
    for name in ("recovery_points", "record", "body"):
        monkeypatch.setattr(journal, name, entered(name))
    clients._submit(clients.all[0], bodies.FORWARD_BACKWARD, batch(9))
    clients.all_end()
    assert left[0] < 0
    clients._check_logs()


# --- The last state -------------------------------------------------------------------------


def end_without_a_worker(clients: Clients) -> None:
    run, session = clients.all[0], clients.sessions.pop()
    run.ending = "session_ended"
    clients._world.deadly = frozenset(["restore", "capture"])
    clients._world.kill_worker()
    clients._do(lambda: clients._world.runs.end_session(session.id, "success"))


def test_the_newest_snapshot_is_the_last_state_that_no_worker_gives(clients: Clients) -> None:
    train(clients)
    clients._world.let(15.0)
    end_without_a_worker(clients)
    ended = clients._world.clock.time()
    clients._world.let(400.0)
    assert last_states(clients) == [6]
    (manifest_id,) = (id for _, id in clients._world.store.names())
    last = clients._world.store.read_manifest(manifest_id)
    assert last.created >= ended
    assert last.expires == last.created + clients._world.runs.lifetimes.last_state_kept
    clients._check_checkpoints()
    assert state_of(clients) == "unloaded"
    assert rows(clients, snapshots) == 0
    assert list(clients._world.store.unnamed()) == []


@pytest.mark.parametrize("restart", [False, True])
def test_a_last_state_that_the_store_does_not_take_is_kept_once_it_does(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    train(clients)
    clients._world.let(15.0)
    with monkeypatch.context() as planted:
        planted.setattr(LocalStore, "publish", full)
        end_without_a_worker(clients)
        clients._world.let(100.0)
        assert state_of(clients) == "live"
        if restart:
            clients.restart()
            clients._world.let(10.0)
    clients._world.let(400.0)
    assert last_states(clients) == [6]
    assert state_of(clients) == "unloaded"


def full(*_: Any) -> str:
    raise Unavailable("No space left on device")


def end_after_a_snapshot(clients: Clients) -> None:
    """A session, whose run was trained since its newest snapshot."""
    run, world = clients.all[0], clients._world
    train(clients)
    world.let(15.0)
    train(clients, 1)
    run.ending = "session_ended"
    session = clients.sessions.pop()
    clients._do(lambda: world.runs.end_session(session.id, "success"))


def detail_of(clients: Clients) -> str:
    record = clients._do(lambda: clients._world.runs.record(clients.all[0].id, OWNER))
    statuses = clients._do(lambda: clients._world.runs.statuses([record]))
    note = statuses[record.key].note
    assert isinstance(note, str)
    return note


@pytest.mark.parametrize("what", ["blobs", "manifests"])
def test_a_last_state_is_no_older_one_because_the_storage_took_nothing_for_an_hour(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    world = clients._world
    monkeypatch.setattr(Publisher, "due", False)
    step = "put_blob" if what == "blobs" else "publish"
    honest, ended = getattr(LocalStore, step), []

    def take(*args: Any) -> Any:
        if not clients.sessions:
            ended.append(world.clock.now)
            if world.clock.now < ended[0] + 3600.0:
                full()
        return honest(*args)

    monkeypatch.setattr(LocalStore, step, take)
    end_after_a_snapshot(clients)
    world.let(0.2)
    assert detail_of(clients) == "its last state is not stored yet"
    world.let(130.0)
    assert detail_of(clients) == "its last state is not stored yet: No space left on device"
    world.let(3600.0 - 130.2)
    assert last_states(clients) == []
    assert state_of(clients) == "live"
    world.let(200.0)
    assert last_states(clients) == [8]
    assert state_of(clients) == "unloaded"
    assert "last state" not in detail_of(clients)
    clients._check_checkpoints()


@pytest.mark.parametrize("what", ["put_blob", "publish"])
def test_a_last_state_is_kept_from_when_it_is_stored(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Also where that is later than the time for which it is kept."""
    world, kept = clients._world, 3600.0
    world.runs.lifetimes = dataclasses.replace(world.runs.lifetimes, last_state_kept=kept)
    monkeypatch.setattr(Publisher, "due", False)
    with monkeypatch.context() as planted:
        honest = getattr(LocalStore, what)
        planted.setattr(
            LocalStore, what, lambda *args: honest(*args) if clients.sessions else full()
        )
        end_after_a_snapshot(clients)
        world.let(2 * kept)
    world.let(200.0)
    (key,) = (key for key, _ in world.store.names())
    last = world.store.read_manifest(dict(world.store.names())[key])
    assert last.expires is not None
    assert kept - 200.0 < last.expires - world.clock.time() <= kept
    world.let(kept - 300.0)
    _, found = clients._do(lambda: world.runs.checkpoints.resolve(key, [OWNER]))
    assert found == last


@pytest.mark.parametrize("lasts", [300.0, 1000.0])
def test_a_last_state_is_no_older_one_because_the_store_did_not_answer(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, lasts: float
) -> None:
    """Longer than a call of it is waited for, which goes on."""
    world = clients._world
    monkeypatch.setattr(Publisher, "due", False)
    honest, asked = Checkpoints._in_thread, []

    async def in_thread(self: Checkpoints, call: Callable[..., Any], *args: Any) -> Any:
        if not clients.sessions and call == self.store.publish:
            asked.append(world.clock.now)
            await asyncio.sleep(asked[0] + lasts - world.clock.now)
        return await honest(call, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoints, "_in_thread", in_thread)
    end_after_a_snapshot(clients)
    world.let(lasts)
    assert last_states(clients) == []
    world.let(500.0)
    assert last_states(clients) == [8]
    assert state_of(clients) == "unloaded"
    assert "last state" not in detail_of(clients)
    clients._check_checkpoints()


UNAVAILABLE: list[type[Unavailable]] = [Unavailable, *Unavailable.__subclasses__()]


def a_refusal(reason: Reason) -> RunError:
    return RunError("of_whatever_code", "", reason=reason)


@pytest.mark.parametrize(
    "error",
    [
        a_refusal("unavailable"),
        Waiting(a_refusal("unavailable")),
        *(EngineError(kind.code, "") for kind in UNAVAILABLE),
    ],
)
def test_whatever_the_storage_takes_nothing_for_is_waited_for(
    error: RunError | EngineError,
) -> None:
    assert storage_failed(error)


@pytest.mark.parametrize(
    "error",
    [a_refusal("damaged"), Waiting(a_refusal("not_found")), EngineError("out_of_memory", "")],
)
def test_nothing_else_is_laid_to_the_storage(error: RunError | EngineError) -> None:
    assert not storage_failed(error)


def test_a_last_state_that_can_only_be_an_older_one_is_said_to_be_so(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is never room for its blobs again, as there is for the name of a snapshot."""
    world = clients._world
    monkeypatch.setattr(Publisher, "due", False)
    honest = LocalStore.put_blob
    monkeypatch.setattr(
        LocalStore,
        "put_blob",
        lambda *args: honest(*args) if clients.sessions else full(),
    )
    monkeypatch.setattr("holdfast.runs.driver.LAST_STATE_STORED_WITHIN", 3600.0)
    end_after_a_snapshot(clients)
    world.let(3000.0)
    assert last_states(clients) == []
    world.let(1200.0)
    assert last_states(clients) == [6]
    assert state_of(clients) == "unloaded"
    found = detail_of(clients)
    assert (
        "its last state is that of position 6" in found and "2 later operations, up to 8" in found
    )


def test_a_run_without_an_intact_snapshot_keeps_what_can_be_repaired(clients: Clients) -> None:
    train(clients)
    clients._world.let(15.0)
    for path in clients._world.root.glob("store/blobs/**/*"):
        if path.is_file():
            path.chmod(0o600)
            path.write_bytes(b"?" + path.read_bytes()[1:])
    end_without_a_worker(clients)
    clients._world.let(400.0)
    assert last_states(clients) == []
    assert state_of(clients) == "lost"
    assert rows(clients, snapshots) > 0


# --- Housekeeping ---------------------------------------------------------------------------


def sessions_open(clients: Clients) -> int:
    with clients._world.catalog._engine.connect() as connection:
        query = sa.select(sessions.c.id).where(sessions.c.ended.is_(None))
        return len(connection.execute(query).all())


def test_a_session_expires_though_its_end_was_refused_once(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Sessions.end
    tried = []

    async def end(self: Sessions, *args: Any, **also: Any) -> bool:
        tried.append(args)
        if len(tried) == 1:
            clients._world.refuse_commits = 1
        return await honest(self, *args, **also)

    monkeypatch.setattr(Sessions, "end", end)
    clients._world.let(40 * 60)
    assert len(tried) == 2
    assert sessions_open(clients) == 0


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "too many open files"), ValueError()])
def test_housekeeping_goes_on_after_an_error(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    left = [2]

    def closed() -> dict[str, int]:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return honest()

    honest = clients._world.segments.closed
    monkeypatch.setattr(clients._world.segments, "closed", closed)
    clients._world.let(40 * 60)
    assert left[0] < 0
    assert sessions_open(clients) == 0


# --- Kills beside an end --------------------------------------------------------------------


Ending = Callable[[Clients, pytest.MonkeyPatch], Callable[[], Coroutine[Any, Any, None]]]
"""Prepares an end; what is called then brings it about."""


def unloading(clients: Clients, _: pytest.MonkeyPatch) -> Callable[[], Coroutine[Any, Any, None]]:
    return lambda: clients._world.runs.unload(clients.all[0].id, OWNER)


def finishing(clients: Clients, _: pytest.MonkeyPatch) -> Callable[[], Coroutine[Any, Any, None]]:
    session = clients.sessions.pop()
    return lambda: clients._world.runs.end_session(session.id, "success")


def meeting_a_defect(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Coroutine[Any, Any, None]]:
    honest = Driver.compute
    met: list[Any] = []

    async def compute(*args: Any) -> bytes:
        result = await honest(*args)
        if not met:
            met.append(args)
            raise ZeroDivisionError("a defect")
        return result

    monkeypatch.setattr(Driver, "compute", compute)
    return nothing


def losing_its_outcomes(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Coroutine[Any, Any, None]]:
    """A defect because of which no outcome can be recorded, until the server is started again."""
    honest, kills = journal.settle, clients._world.kills

    def settle(*args: Any, **others: Any) -> None:
        if clients._world.kills == kills:
            raise ValueError("a defect in settling")
        honest(*args, **others)

    monkeypatch.setattr(journal, "settle", settle)
    return nothing


CODES: dict[Ending, str] = {
    unloading: "model_unloaded",
    finishing: "session_ended",
    meeting_a_defect: "internal_error",
    losing_its_outcomes: "internal_error",
}


def kill_once_shown(clients: Clients, end: Callable[[], Coroutine[Any, Any, None]], by: str) -> str:
    """End the run while three requests wait, and kill the server as soon as anybody is told."""
    world, run = clients._world, clients.all[0]
    runs = world.runs

    async def polled() -> str:
        outcome = None
        while outcome is None:
            outcome, _ = await runs.outcome(run.ops[9].request_id, OWNER, 30.0)
        assert outcome.failure is not None
        return outcome.failure.code

    async def refused() -> str:
        for number in count(10):
            try:
                live = await runs.live(run.id, OWNER)
                await live.submit(number, bodies.FORWARD_BACKWARD, batch(number))
            except RunError as error:
                return error.code
            await asyncio.sleep(0.003)
        raise AssertionError

    async def both() -> str:
        ending = asyncio.create_task(end())
        shown = await (polled() if by == "a poll" else refused())
        assert ending is not None
        return shown

    code: str = world.loop.run_until_complete(both())
    world.kill()
    return code


@pytest.mark.parametrize("by", ["a poll", "a refusal"])
@pytest.mark.parametrize("ending", list(CODES))
def test_an_end_that_was_shown_is_final(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, ending: Ending, by: str
) -> None:
    train(clients)
    world, run = clients._world, clients.all[0]
    end = ending(clients, monkeypatch)
    world.lives[-1]._pause = lambda what: 0.2 if what == bodies.FORWARD_BACKWARD else 0.001
    for x in range(3):
        clients._submit(run, bodies.FORWARD_BACKWARD, batch(x))
    code = CODES[ending]
    assert kill_once_shown(clients, end, by) == code
    found = [clients._poll(run.ops[seq], 60.0)[0] for seq in (7, 8, 9)]
    codes = [None if x is None or x.failure is None else x.failure.code for x in found]
    assert code in codes
    done = codes.index(code)
    assert codes == [None] * done + [code] * (3 - done), "what follows an end was executed"
    world.let(60.0)
    assert unsettled(clients) == []
    assert state_of(clients) == "unloaded"
    assert last_states(clients) == [6 + done]
    with pytest.raises(RunError) as refused:
        clients._submit(run, bodies.FORWARD_BACKWARD, batch(2))
    assert refused.value.code == "model_unloaded"


@pytest.mark.parametrize("by", ["a poll", "a refusal"])
@pytest.mark.parametrize("ending", [unloading, meeting_a_defect])
def test_an_end_that_is_shown_before_it_is_noted_is_found(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, ending: Ending, by: str
) -> None:
    monkeypatch.setattr(journal, "note_end", lambda *_: None)
    with pytest.raises(AssertionError):
        test_an_end_that_was_shown_is_final(clients, monkeypatch, ending, by)


def test_a_model_that_was_created_anew_stays_replaced(clients: Clients) -> None:
    world, (session,) = clients._world, clients.sessions

    async def create(rank: int) -> str:
        run = await world.runs.create(
            session,
            100,
            base_model=NAME,
            lora={"rank": rank, "seed": 1},
            optimizer="adamw",
            user_metadata=None,
            idempotency_key=f"rank {rank}",
        )
        return run.key.request_id(0)

    async def anew() -> list[str]:
        return [await create(1), await create(2)]

    first, second = world.loop.run_until_complete(anew())
    world.kill()  # when the answer was just given
    (created,) = outcomes(clients, [second])
    assert created is not None and created.failure is None
    world.let(60.0)
    assert unsettled(clients) == []
    with world.catalog._engine.connect() as connection:
        query = sa.select(runs.c.state).where(runs.c.id == first.rpartition(":")[0])
        assert list(connection.scalars(query.order_by(runs.c.generation))) == ["replaced", "live"]


# --- Models that are created anew -----------------------------------------------------------


def test_requests_to_a_model_that_was_created_anew_have_an_outcome(clients: Clients) -> None:
    """Though the database does not take it at once: whoever asks meanwhile waits for it."""
    (session,), world = clients.sessions, clients._world
    world.kill_worker()
    world.hangs = 1

    async def create(seed: int) -> Run:
        return await create_run(world, session, 77, {"rank": 1, "seed": seed})

    before = clients._do(lambda: create(1))
    first = clients._do(lambda: before.submit(1, bodies.FORWARD_BACKWARD, batch(1)))
    after = clients._do(lambda: create(2))
    world.refuse_commits = 5
    assert (after.key.id, after.key.generation) == (before.key.id, 1)
    found = outcomes(clients, [before.key.request_id(0), first])
    assert [x.failure.code for x in found if x and x.failure] == ["model_replaced"] * 2


def test_requests_to_an_older_model_are_known_also_when_the_newer_one_has_ended_first(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    (session,), world = clients.sessions, clients._world
    world.kill_worker()
    world.hangs = 1

    async def create(seed: int) -> Run:
        return await create_run(world, session, 77, {"rank": 1, "seed": seed})

    honest, older = journal.settle, clients._do(lambda: create(1))

    def settle(
        connection: sa.Connection, segments: Any, key: RunKey, *args: Any, **kw: Any
    ) -> None:
        if key == older.key:
            raise CatalogUnavailable("there is no room for this one")
        honest(connection, segments, key, *args, **kw)

    with monkeypatch.context() as planted:
        planted.setattr(journal, "settle", settle)
        newer = clients._do(lambda: create(2))
        world.kill_worker()
        clients._do(lambda: world.runs.unload(newer.key.id, OWNER))
        assert outcomes(clients, [older.key.request_id(0)]) == [None]
    (found,) = outcomes(clients, [older.key.request_id(0)])
    assert found is not None and found.failure is not None
    assert found.failure.code == "model_replaced"


@pytest.mark.parametrize("generation", ["g²", "g", "g-1", "g7"])
def test_a_request_of_no_generation_is_not_known(clients: Clients, generation: str) -> None:
    request_id = f"{clients.all[0].id}:{generation}:0"
    with pytest.raises(RunError) as refused:
        clients._do(lambda: clients._world.runs.outcome(request_id, OWNER, 1.0))
    assert refused.value.reason == "not_found"


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 10**20, "9" * 5000, f"g{2**63}:0"])
def test_a_request_of_no_number_is_not_known_whether_its_run_goes_on_or_has_ended(
    clients: Clients, number: object
) -> None:
    (run,), world = clients.all, clients._world

    def refused() -> str:
        with pytest.raises(RunError) as error:
            clients._do(lambda: world.runs.outcome(f"{run.id}:{number}", OWNER, 1.0))
        return error.value.reason

    assert refused() == "not_found"
    clients._do(lambda: world.runs.unload(run.id, OWNER))
    assert refused() == "not_found"


# --- What an end follows, when the server dies ----------------------------------------------


def ends_under_way(clients: Clients, whole_session: bool) -> list[Outcome | None]:
    """The server dies while the first of two requests is executed and the end was asked for."""
    (run,), (session,), world = clients.all, clients.sessions, clients._world
    clients.all_end()
    world.lives[-1]._pause = lambda what: 0.5 if what == bodies.FORWARD_BACKWARD else 0.001
    for x in (1, 2):
        clients._submit(run, bodies.FORWARD_BACKWARD, batch(x))

    async def end() -> None:
        runs = world.runs
        work = (
            runs.end_session(session.id, "success") if whole_session else runs.unload(run.id, OWNER)
        )
        task = asyncio.create_task(work)
        await asyncio.sleep(0.2)
        assert task.done()

    world.loop.run_until_complete(end())
    world.kill()
    found = outcomes(clients, [run.ops[seq].request_id for seq in (1, 2)])
    world.let(60.0)
    assert unsettled(clients) == []
    return found


@pytest.mark.parametrize("whole_session", [False, True])
def test_what_an_end_is_to_follow_is_finished_when_the_server_dies(
    clients: Clients, whole_session: bool
) -> None:
    (run,) = clients.all
    first, second = ends_under_way(clients, whole_session)
    assert first is not None and first.failure is None
    assert second is not None and second.failure is not None
    assert second.failure.code == ("session_ended" if whole_session else "model_unloaded")
    kept = NameKey(run.id, "weights", "auto.1")
    assert kept in [key for key, _ in clients._world.store.names()]
    run.interpret(1, clients._now)
    clients._check_state(kept, run.history[1], optimizer=True)


@pytest.mark.parametrize("noted", [True, False])
def test_a_session_ends_together_with_the_note_of_what_is_finished_first(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    """The server dies before any of the session's runs has been told."""
    told, first_life = Run.note_end, clients._world.runs

    async def not_told(run: Run, reason: Failure) -> None:
        if clients._world.runs is first_life:
            await asyncio.Event().wait()
        await told(run, reason)

    monkeypatch.setattr(Run, "note_end", not_told)
    if not noted:
        monkeypatch.setattr(Run, "end_note", lambda *_: lambda _: None)
    first, second = ends_under_way(clients, whole_session=True)
    assert first is not None and second is not None and second.failure is not None
    assert second.failure.code == "session_ended"
    assert (first.failure is None) is noted


def test_what_an_end_is_to_follow_ends_when_no_worker_is_to_be_had(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: Any, name: str) -> Any:
        raise EngineError("model_not_loadable", f"{name} is gone", "server")

    boot = World.boot

    def boot_without_a_worker(world: World) -> None:
        monkeypatch.setattr(World, "_start_engine", never)
        boot(world)

    monkeypatch.setattr(World, "boot", boot_without_a_worker)
    found = ends_under_way(clients, whole_session=False)
    codes = [x.failure.code for x in found if x is not None and x.failure is not None]
    assert codes == ["model_unloaded"] * 2


# --- An unload that is answered before the end ----------------------------------------------


def unload_with(clients: Clients, what: str) -> None:
    """Unload a model whose end takes long, by a client that waits for five seconds."""
    world, (run,) = clients._world, clients.all
    if what == "a full disk":
        world.full_until = world.clock.now + 1e9
    else:
        world.lives[-1]._pause = lambda what: 200.0 if what == bodies.FORWARD_BACKWARD else 0.001
        clients._submit(run, bodies.FORWARD_BACKWARD, batch(9))
        world.let(1.0)

    async def unload() -> None:
        async with asyncio.timeout(5.0):
            await world.runs.unload(run.id, OWNER)

    for _ in range(2):
        world.loop.run_until_complete(unload())


def refused(clients: Clients) -> str:
    """The code by which another request is refused."""
    with pytest.raises(RunError) as error:
        clients._submit(clients.all[0], bodies.OPTIM_STEP, steps())
    return error.value.code


@pytest.mark.parametrize("what", ["a full disk", "an operation that takes long"])
@pytest.mark.parametrize("kill", [False, True])
def test_an_unload_is_answered_at_once_and_holds(clients: Clients, what: str, kill: bool) -> None:
    train(clients)
    world, (run,) = clients._world, clients.all
    unload_with(clients, what)
    if kill:
        world.kill()
    assert refused(clients) == "model_unloaded"
    assert state_of(clients) == "live"
    world.full_until = 0.0
    if what != "a full disk" and not kill:
        world.let(200.0)
    world.let(400.0)
    assert refused(clients) == "model_unloaded"
    assert state_of(clients) == "unloaded"
    assert last_states(clients) == [run.highest]  # with what was under way
    assert unsettled(clients) == []


def test_an_unload_that_is_not_noted_does_not_hold(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "note_end", lambda *_: None)
    train(clients)
    unload_with(clients, "a full disk")
    clients._world.kill()
    clients._world.full_until = 0.0
    clients._submit(clients.all[0], bodies.OPTIM_STEP, steps())


def test_an_unload_that_cannot_be_noted_is_not_answered_as_done(clients: Clients) -> None:
    world, (run,) = clients._world, clients.all
    world.refuse_commits = 1
    with pytest.raises(CatalogUnavailable):
        world.loop.run_until_complete(world.runs.unload(run.id, OWNER))
    clients._submit(run, bodies.OPTIM_STEP, steps())
    clients.all_end()
