"""What a run is rebuilt from when something of it is damaged or late, and how it ends meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog.tables import contents, operations, samplers, snapshots
from holdfast.engine.interface import ADAPTER_WEIGHTS, EngineError
from holdfast.runs import bodies, journal
from holdfast.runs.bodies import FORWARD_BACKWARD, OPTIM_STEP, Load, Save
from holdfast.runs.driver import MOST_STALLED, Driver
from holdfast.runs.engines import HUNG_AFTER, LOADING_TAKES
from holdfast.runs.errors import RunError, Unavailable
from holdfast.runs.gate import Gate
from holdfast.runs.journal import Outcome
from holdfast.runs.order import GAP_LEASE_ELIXIR, Entry, State
from holdfast.runs.poison import MOST_BEGUN_AGAIN, MOST_DEATHS, count_death
from holdfast.runs.publishing import MOST_SNAPSHOT_DEATHS, Publisher
from holdfast.runs.run import Run
from holdfast.store import DiskFull, Manifest, NameKey

from .model import Op
from .sim import Killed, World
from .test_service import OWNER, Clients, create_run, steps
from .toy import NAME, OTHER, ToyEngine, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def train(clients: Clients, x: int) -> None:
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(x))
    clients._submit(run, OPTIM_STEP, steps())


def train_with_pauses(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have snapshots when the run is idle, and at no other time."""
    monkeypatch.setattr(Publisher, "due", False)
    for x in range(3):
        train(clients, x)
        clients.all_end()
        clients._world.let(30.0)


def save(clients: Clients, name: str) -> None:
    clients._submit(clients.all[0], bodies.SAVE_WEIGHTS, Save(name))


def check_all(clients: Clients) -> None:
    clients.all_end()
    clients._check_checkpoints()
    clients._check_logs()


# --- A run's end ----------------------------------------------------------------------------


def end_in_the_middle_of_saves(clients: Clients, point: int, *, worker: bool) -> bool:
    """End a session after a death at that point, while saves are under way; whether it came."""
    clients.begin(seed=1, client="python")
    world, (run,) = clients._world, clients.all
    train(clients, 1)
    clients.all_end()
    save(clients, "a")
    if worker:
        world.die_in = point
        train(clients, 2)
    else:
        world.kill_at = frozenset(("commit", "committed"))
        world.kill_in = point
    until = world.clock.now + 0.1
    while world.clock.now < until and (world.die_in, world.kill_in) != (None, None):
        world.let(0.001)
    reached = world.die_in is None and world.kill_in is None
    world.kill_in = world.die_in = None
    run.ending = "session_ended"
    session = clients.sessions.pop()
    clients._do(lambda: world.runs.end_session(session.id, "success"))
    world.let(1.0)
    check_all(clients)
    return reached


def end_after_every_death(*, worker: bool) -> int:
    point = 0
    while True:
        clients = Clients()
        try:
            if not end_in_the_middle_of_saves(clients, point, worker=worker):
                return point
        finally:
            clients.close()
        point += 1


@pytest.mark.parametrize("worker", [False, True])
def test_saves_that_a_death_overtook_are_done_also_when_the_session_ends_then(worker: bool) -> None:
    assert end_after_every_death(worker=worker) > 3


def leave_published(monkeypatch: pytest.MonkeyPatch) -> None:
    async def settle_published(_: Publisher) -> None:
        pass

    monkeypatch.setattr(Publisher, "settle_published", settle_published)


def leave_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    async def finish_begun(_: Driver) -> None:
        pass

    monkeypatch.setattr(Driver, "_finish_begun", finish_begun)


@pytest.mark.parametrize(("plant", "worker"), [(leave_published, False), (leave_begun, True)])
def test_saves_that_the_end_overtakes_are_found(
    plant: Callable[[pytest.MonkeyPatch], None], worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        end_after_every_death(worker=worker)


def diverge(clients: Clients, monkeypatch: pytest.MonkeyPatch, x: int) -> None:
    """Let the next time that this batch is computed give another result."""
    honest = ToyEngine.forward_backward

    async def forward_backward(engine: ToyEngine, run: str, seq: int, body: bytes) -> bytes:
        result = await honest(engine, run, seq, body)
        return result + b"!" if body == batch(x) else result

    monkeypatch.setattr(ToyEngine, "forward_backward", forward_backward)


def test_a_save_that_is_made_again_when_the_replay_stops_is_told_what_became_of_it(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    world, (run,) = clients._world, clients.all
    train(clients, 1)
    clients.all_end()
    world.pause = lambda what: 1.0 if what == "write" else 0.001  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    save(clients, "a")
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    world.let(0.5)
    clients.kill_the_worker()
    diverge(clients, monkeypatch, 2)
    world.let(10.0)
    made, _ = clients._poll(run.ops[3], 60.0)
    assert made is not None
    there = world.store.resolve(NameKey(run.id, "weights", "a")) is not None
    assert there == (made.failure is None)
    later, _ = clients._poll(run.ops[4], 60.0)
    assert later is not None


# --- Late requests --------------------------------------------------------------------------


def come_late_while_the_database_is_locked(clients: Clients, seed: int, point: int) -> None:
    clients.begin(seed=seed, client="elixir")
    world, (run,) = clients._world, clients.all
    # Slow operations, so that it comes while one is executed.
    world.pause = lambda what: 0.3 if what in (FORWARD_BACKWARD, OPTIM_STEP) else 0.001  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    clients._submit(run, FORWARD_BACKWARD, batch(1), seq=2)
    clients.all_end()
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    clients._submit(run, OPTIM_STEP, steps())
    clients._submit(run, FORWARD_BACKWARD, batch(3))
    world.refuse_commits = 1
    world.kill_at = frozenset(("committed",))
    world.kill_in = point
    clients._submit(run, FORWARD_BACKWARD, batch(4), seq=1)
    world.let(0.02)
    clients._submit(run, OPTIM_STEP, steps())
    clients.all_end()
    clients._check_logs()


def test_a_late_request_has_no_effect_before_it_is_durable() -> None:
    for seed in range(2):
        for point in range(3):
            clients = Clients()
            try:
                come_late_while_the_database_is_locked(clients, seed, point)
            finally:
                clients.close()


def test_an_effect_ahead_of_its_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def accept_late(
        run: Run, seq: int, kind: str, body_hash: str | None, failure: journal.Failure
    ) -> None:
        position = run.order.hold()
        run.order.go_on()
        run.order.arrived_late(seq, kind, body_hash)
        run.order.add_late_mark(seq, position)
        entry = Entry(seq, kind, body_hash, State.FAILED, late=True)
        await asyncio.sleep(1.0)  # a database that was locked for a while
        await run.write_patiently(
            lambda c: journal.add(
                c,
                run.services.segments,
                run.key,
                entry,
                now=0.0,
                failure=failure,
                mark_at=position,
            )
        )

    monkeypatch.setattr(Run, "_accept_late", accept_late)
    with pytest.raises((AssertionError, RunError)):
        test_a_late_request_has_no_effect_before_it_is_durable()


def fail_a_deadly_one_while(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Run], Awaitable[None]]
) -> None:
    """Something happens while an operation's last death is being counted; 1 has been skipped."""
    world, (run,) = clients._world, clients.all
    clients.all_end()
    beside: list[asyncio.Future[None]] = []

    async def count(run: Run, entry: Entry) -> journal.Failure | None:
        if entry.attempts == MOST_DEATHS - 1:
            beside.append(asyncio.ensure_future(meanwhile(run)))
        return await count_death(run, entry)

    monkeypatch.setattr("holdfast.runs.driver.count_death", count)
    clients._submit(run, FORWARD_BACKWARD, batch(1, kills=True), seq=2)
    world.let(60.0)
    clients._do(lambda: beside[0])


@pytest.fixture
def elixir() -> Iterator[Clients]:
    """As `clients`, whose numbers are given up after a few seconds."""
    clients = Clients()
    clients.begin(seed=1, client="elixir")
    yield clients
    clients.close()


@pytest.mark.parametrize("kind", [FORWARD_BACKWARD, OPTIM_STEP])
@pytest.mark.parametrize("refused", [False, True])
def test_a_late_request_beside_an_operation_that_kills_its_worker_ends_no_run(
    elixir: Clients, monkeypatch: pytest.MonkeyPatch, refused: bool, kind: str
) -> None:
    clients = elixir
    body = batch(7) if kind == FORWARD_BACKWARD else steps().encode()

    async def come_late(run: Run) -> None:
        if refused:
            await run.refuse(1, kind, journal.Failure("invalid_datum", "it is no good"))
        else:
            await run.submit(1, kind, body)

    fail_a_deadly_one_while(clients, monkeypatch, come_late)
    (run,) = clients.all
    run.interpret(1, clients._now)  # it was skipped
    late = Op(1, kind, body, request_id=clients._request_id(run, 1))
    late.fate, late.refusal = ("refused", "invalid_datum") if refused else ("late", "arrived_late")
    clients._enter(run, late, clients._now)
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    clients._submit(run, OPTIM_STEP, steps())
    check_all(clients)
    clients.kill()
    check_all(clients)
    assert run.ops[2].seen is not None and run.ops[2].seen.failure is not None
    assert run.ops[2].seen.failure.code == "operation_kills_worker"


def test_an_operation_that_kills_its_worker_is_no_history_of_a_run_that_ended_meanwhile(
    elixir: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = elixir

    async def end(run: Run) -> None:
        run.broke("a test", ValueError("a test"))

    fail_a_deadly_one_while(clients, monkeypatch, end)
    (run,) = clients.all
    outcome, _ = clients._poll(run.ops[2], 30.0)
    assert outcome is not None and outcome.failure is not None
    assert outcome.failure.code == journal.DEFECT
    clients._world.let(60.0)
    assert run.id not in clients._world.runs._live
    assert list(clients._world.store.names()) == [], "a state was kept that nobody was told of"


# --- Damage ---------------------------------------------------------------------------------


def points(clients: Clients) -> list[tuple[int, str]]:
    with clients._world.catalog._engine.connect() as connection:
        rows = connection.execute(sa.select(snapshots).order_by(snapshots.c.seq.desc())).all()
    return [(row.seq, row.manifest) for row in rows]


def damage(clients: Clients, manifest_id: str) -> None:
    """Change a byte of the weights that a manifest names."""
    manifest = clients._world.store.read_manifest(manifest_id)
    (path,) = clients._world.root.rglob(manifest.files[ADAPTER_WEIGHTS].hash)
    path.chmod(0o600)
    path.write_bytes(b"?" + path.read_bytes()[1:])


@pytest.mark.parametrize("restart", [False, True])
def test_a_run_whose_only_snapshot_is_damaged_is_replayed_from_its_beginning(
    clients: Clients, restart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)  # too little to snapshot, yet
    train(clients, 1)
    clients.all_end()
    clients._world.let(1.0)
    ((seq, manifest_id),) = points(clients)
    assert seq == 0
    damage(clients, manifest_id)
    if restart:
        clients.kill()
    else:
        clients.kill_the_worker()
    train(clients, 2)
    clients.all_end()
    check_all(clients)


def test_a_damaged_snapshot_does_not_displace_an_intact_one(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_with_pauses(clients, monkeypatch)
    (newest, manifest_id), (older, _) = points(clients)
    damage(clients, manifest_id)
    clients.kill()
    train(clients, 4)
    clients.all_end()
    clients._world.let(30.0)
    (last, manifest_id), (kept, _) = points(clients)
    assert last > newest and kept == older
    damage(clients, manifest_id)
    clients.kill()
    train(clients, 5)
    check_all(clients)


@pytest.mark.parametrize("referred_to", [False, True])
def test_a_damaged_snapshot_is_let_go_unless_something_else_refers_to_it(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, referred_to: bool
) -> None:
    train_with_pauses(clients, monkeypatch)
    (_, newest), (_, older) = points(clients)
    damage(clients, newest)
    if referred_to:
        row = {"id": "s", "session_id": "s", "owner": OWNER, "base_model": NAME, "created": 1.0}
        insert = samplers.insert().values(manifest=newest, **row)
        clients._do(lambda: clients._world.catalog.write(lambda c: c.execute(insert)))
    clients.kill_the_worker()
    train(clients, 4)
    clients.all_end()
    assert newest not in [manifest_id for _, manifest_id in points(clients)]
    kept = {id for id, _ in clients._world.store.unnamed()}
    assert kept == ({older, newest} if referred_to else {older})
    check_all(clients)


def test_a_run_that_cannot_be_rebuilt_says_what_is_damaged_and_where_to_go_on(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    save(clients, "oldest")
    for x, name in enumerate(("newer", "newest")):
        train(clients, x)
        save(clients, name)
    clients.all_end()
    for _, manifest_id in points(clients):
        damage(clients, manifest_id)
    clients.kill()
    (run,) = clients.all
    clients._submit(run, OPTIM_STEP, steps())
    outcome, _ = clients._poll(run.ops[run.highest], 60.0)
    assert outcome is not None and outcome.failure is not None
    assert outcome.failure.code == "state_lost"
    assert "position 7: weights" in outcome.failure.message
    assert f"tinker://{run.id}/weights/oldest" in outcome.failure.message


def test_a_load_that_cannot_be_repeated_says_what_it_loaded(clients: Clients) -> None:
    (run,) = clients.all
    save(clients, "a")
    train(clients, 1)
    save(clients, "b")
    train(clients, 2)
    clients._submit(run, bodies.LOAD_WEIGHTS, Load(run.id, "weights", "a", True, [OWNER]))
    clients.all_end()
    loaded = clients._world.store.resolve(NameKey(run.id, "weights", "a"))
    assert loaded is not None
    damage(clients, loaded)
    clients.kill()
    clients._submit(run, OPTIM_STEP, steps())
    outcome, _ = clients._poll(run.ops[run.highest], 60.0)
    assert outcome is not None and outcome.failure is not None
    assert outcome.failure.code == "state_lost"
    assert f"loaded 'tinker://{run.id}/weights/a'" in outcome.failure.message
    assert f"checkpoint, 'tinker://{run.id}/weights/b'" in outcome.failure.message
    clients._check_logs()


# --- A storage that takes nothing for a while -------------------------------------------------


@pytest.mark.parametrize("seconds", [20.0, 200.0])
@pytest.mark.parametrize("step", ["publish", "set_name"])
def test_a_save_waits_a_minute_for_a_full_storage(
    step: str, seconds: float, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, (run,) = clients._world, clients.all
    train(clients, 1)
    clients.all_end()
    room_at = world.clock.now + seconds
    take = getattr(world.store, step)

    def full(*args: object, **options: object) -> object:
        if world.clock.now < room_at:
            raise DiskFull("no space left")
        return take(*args, **options)

    monkeypatch.setattr(world.store, step, full)
    save(clients, "a")
    outcome, _ = clients._poll(run.ops[run.highest], 500.0)
    assert outcome is not None
    if seconds < 60:
        assert outcome.failure is None
        assert clients._world.store.resolve(NameKey(run.id, "weights", "a")) is not None
    else:
        assert outcome.failure is not None
        assert (outcome.failure.code, outcome.failure.category) == ("disk_full", "server")
        assert clients._world.store.resolve(NameKey(run.id, "weights", "a")) is None


def test_a_save_is_done_though_it_gives_no_recovery_point(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, (run,) = clients._world, clients.all
    train(clients, 1)
    clients.all_end()
    take = world.store.publish

    def full(manifest: Manifest) -> str:
        if manifest.name is None:
            raise DiskFull("no space left")
        return take(manifest)

    monkeypatch.setattr(world.store, "publish", full)
    save(clients, "a")
    outcome, _ = clients._poll(run.ops[run.highest], 500.0)
    assert outcome is not None and outcome.failure is None
    monkeypatch.undo()
    train(clients, 2)
    clients.all_end()
    clients.kill()
    train(clients, 3)
    check_all(clients)


# --- Workers that die at snapshots ----------------------------------------------------------


def test_a_worker_that_dies_at_every_snapshot_is_given_no_more_of_them(clients: Clients) -> None:
    clients.all_end()
    world, (run,) = clients._world, clients.all
    world.deadly = frozenset(("write",))
    lives = len(world.lives)
    for x in range(12):
        train(clients, x)
        clients.all_end()
        world.let(20.0)  # idle: a snapshot is taken, and the worker dies
    assert len(world.lives) - lives == MOST_SNAPSHOT_DEATHS
    assert [e for e in clients.events if "snapshots kill the worker" in e["event"]]
    save(clients, "a")
    (op,) = [op for op in run.ops.values() if op.kind == bodies.SAVE_WEIGHTS]
    outcome, _ = clients._poll(op, 60.0)
    assert outcome is not None and outcome.failure is not None
    assert outcome.failure.code == "operation_kills_worker"
    assert bodies.SAVE_WEIGHTS in outcome.failure.message
    world.deadly = frozenset()
    world.let(1000.0)
    train(clients, 13)
    world.let(20.0)
    assert points(clients)[0][0] == run.highest


# --- Clients that go away -------------------------------------------------------------------


def test_a_model_whose_client_goes_away_is_created_whole_or_not_at_all(clients: Clients) -> None:
    runs, session = clients._world.runs, clients.sessions[0]
    for turns in range(12):

        async def leave(number: int = 100 + turns, turns: int = turns) -> None:
            creating = asyncio.create_task(
                runs.create(
                    session,
                    number,
                    base_model=NAME,
                    lora={"rank": 1, "seed": 1},
                    optimizer="adamw",
                    user_metadata=None,
                    idempotency_key=None,
                )
            )
            for _ in range(turns):
                await asyncio.sleep(0.001)
            creating.cancel()
            await asyncio.wait([creating])

        clients._do(leave)
    clients._world.let(1.0)
    with clients._world.catalog._engine.connect() as connection:
        journaled = connection.scalars(sa.select(operations.c.run_id).where(operations.c.seq == 0))
        created = [Op(0, bodies.CREATE, b"", request_id=f"{id}:0") for id in journaled]
    assert len(created) > 3
    for op in created:
        outcome, _ = clients._poll(op, 5.0)
        assert outcome is not None and outcome.failure is None
    with pytest.raises(RunError):
        clients._do(lambda: runs.live(f"{session.id}:train:999", OWNER))


# --- A locked database ----------------------------------------------------------------------


def test_a_deletion_that_the_database_interrupts_is_finished_by_its_repetition(
    clients: Clients,
) -> None:
    save(clients, "a")
    clients.all_end()
    key = NameKey(clients.all[0].id, "weights", "a")
    clients._world.refuse_commits = 2
    clients._do(lambda: clients._world.runs.checkpoints.delete(key, OWNER))
    assert clients._do(lambda: clients._world.runs.checkpoints.page(OWNER)) == ([], 0)
    with pytest.raises(RunError):
        clients._do(lambda: clients._world.runs.checkpoints.delete(key, OWNER))


# --- Refusals -------------------------------------------------------------------------------


def test_what_a_refusal_explains_is_not_waited_for_longer_after_a_restart(clients: Clients) -> None:
    clients._do(lambda: clients._world.runs.refused_without_number(OWNER))
    clients.kill()
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(1), seq=2)
    run.refused_to = 2
    clients.all_end()
    assert clients._now - 1000.0 < 30.0


# --- Deaths that are another's --------------------------------------------------------------


def kill_beside_a_save(clients: Clients) -> None:
    """One run's operation kills the worker each time, while another's save is written."""
    clients.create(pick=0, rank=1)
    killer, saver = clients.all
    clients.all_end()
    clients._world.let(1.0)  # the snapshots of the creations are written
    clients._world.pause = lambda what: 0.5 if what == "write" else 0.01  # type: ignore[method-assign]
    clients._world.lives[-1]._pause = clients._world.pause
    clients._submit(saver, bodies.SAVE_WEIGHTS, Save("a"))
    for x in range(2):
        clients._submit(killer, FORWARD_BACKWARD, batch(x, kills=True))
    check_all(clients)


def test_a_save_beside_which_others_kill_the_worker_is_made(clients: Clients) -> None:
    kill_beside_a_save(clients)


def test_a_save_that_is_not_written_alone_is_blamed_for_others(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.runs.publishing.is_last", lambda _: False)
    monkeypatch.setattr("holdfast.runs.driver.is_last", lambda _: False)
    with pytest.raises(AssertionError):
        kill_beside_a_save(clients)


# --- Workers that die while a run is recovered ----------------------------------------------


def die_in_replays(clients: Clients, monkeypatch: pytest.MonkeyPatch, times: int) -> list[float]:
    """Let a run be recovered while so many workers die; fills in when they did."""
    monkeypatch.setattr(Publisher, "due", False)
    train(clients, 0)
    clients.all_end()
    honest = ToyEngine.forward_backward
    died: list[float] = []

    async def call(engine: ToyEngine, run: str, seq: int, batch: bytes) -> bytes:
        if len(died) < times:
            died.append(engine.clock())
            engine.kill()
        return await honest(engine, run, seq, batch)

    clients._world.kill_worker()
    monkeypatch.setattr(ToyEngine, "forward_backward", call)
    return died


def test_deaths_during_a_recovery_end_no_run(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = die_in_replays(clients, monkeypatch, 9)
    train(clients, 1)
    (run,) = clients.all
    outcome, note = clients._poll(run.ops[run.highest], 30.0)
    assert outcome is None
    assert note is not None and "the worker died" in note and "tried again" in note
    check_all(clients)
    gaps = [b - a for a, b in pairwise(died)]
    assert len(died) == 9 and gaps[-1] > 1.9 * gaps[-2] > 3.0 * gaps[-3] > 10.0


def test_a_recovery_with_which_the_worker_always_dies_waits_for_somebody_to_ask(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = die_in_replays(clients, monkeypatch, 10_000)
    world, (run,) = clients._world, clients.all
    clients._submit(run, OPTIM_STEP, steps())
    op = run.ops.pop(run.highest)
    for _ in range(60):
        outcome, _ = clients._poll(op, 30.0)
    assert outcome is not None and outcome.failure is not None
    assert (outcome.failure.code, outcome.failure.category) == ("worker_dies", "server")
    tried = len(died)
    assert tried < 20
    world.let(1000.0)
    assert len(died) == tried, "nobody asks for it"
    monkeypatch.undo()
    live = clients._do(lambda: world.runs.live(run.id, OWNER))
    request = clients._do(lambda: live.submit(op.seq + 1, OPTIM_STEP, steps().encode()))
    outcome, _ = clients._do(lambda: world.runs.outcome(request, OWNER, 60.0))
    assert outcome is not None and outcome.failure is None


def test_a_run_that_ends_while_its_recovery_waits_is_let_go(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_in_replays(clients, monkeypatch, 10_000)
    world, (run,) = clients._world, clients.all
    clients._submit(run, OPTIM_STEP, steps())
    world.let(30.0)
    live = world.runs._live[run.id].run

    async def break_it() -> None:
        live.broke("a test", ValueError("a test"))

    clients._do(break_it)
    world.let(1000.0)
    assert run.id not in world.runs._live


# --- Operations that end the server ---------------------------------------------------------


def end_the_server(clients: Clients, others: int) -> None:
    """Two runs whose operations end every server, among others, whose operations do not."""
    for number in range(others + 1):
        clients.create(number, 1)
    first, *between, last = clients.all
    for deadly in (first, last):
        clients._submit(deadly, FORWARD_BACKWARD, batch(1, ends=True))
    for x in range(3):
        for run in (*between, first, last):
            clients._submit(run, FORWARD_BACKWARD, batch(x))
            clients._submit(run, OPTIM_STEP, steps())
    check_all(clients)


def test_an_operation_that_ends_the_server_fails_alone(clients: Clients) -> None:
    end_the_server(clients, 3)
    world, (first, *_, last) = clients._world, clients.all
    # Each one does it once by surprise, and is then counted; at first both may be, in one end.
    assert MOST_BEGUN_AGAIN + 1 < world.kills <= 2 * (MOST_BEGUN_AGAIN + 1)
    for run in (first, last):
        outcome, _ = clients._poll(run.ops[1], 1.0)
        assert outcome is not None and outcome.failure is not None
        assert outcome.failure.code == "operation_kills_server"
        assert "the server ended 5 times while it executed this forward_backward" in (
            outcome.failure.message
        )
    kills = world.kills
    world.kill()
    check_all(clients)
    assert world.kills == kills + 1, "it was executed again"


def compute_beside_what_ends_the_server(clients: Clients) -> Outcome:
    """On another worker, and never quick enough; its outcome."""
    world, (deadly,) = clients._world, clients.all
    clients.all_end()
    session = clients.sessions[0]

    async def create() -> Run:
        return await create_run(world, session, 7, {"rank": 1, "seed": 1}, base_model=OTHER)

    key = clients._do(create).key
    world.let(10.0)
    world.pause = lambda what: 20.0 if what == "forward" else 1.0  # type: ignore[method-assign]
    for life in world.lives:
        life._pause = world.pause
    live = world.runs._live[key.id].run
    request = clients._do(lambda: live.submit(1, bodies.FORWARD, batch(1)))
    for x in range(2):
        clients._submit(deadly, FORWARD_BACKWARD, batch(x, ends=True))
    clients.all_end()
    outcome: Outcome | None = None
    while outcome is None:
        outcome, _ = clients._do(lambda: world.runs.outcome(request, OWNER, 30.0))
    return outcome


def test_its_neighbours_do_not_fail_with_it(clients: Clients) -> None:
    assert compute_beside_what_ends_the_server(clients).failure is None


def test_without_a_quarantine_they_do(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.runs.poison.QUARANTINED_AFTER", MOST_BEGUN_AGAIN + 1)
    failure = compute_beside_what_ends_the_server(clients).failure
    assert failure is not None and failure.code == "operation_kills_server"


def compute_just_before_what_ends_the_server(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> list[Outcome]:
    """In the same run, while outcomes take long to be recorded, though not for ever; of both."""
    world, (run,) = clients._world, clients.all
    world.let(10.0)  # for its first snapshot, or else recoveries would wait for one
    takes = {"forward_backward": 5.0}

    def pause(world: World, what: str) -> float:
        if what == "commit" and world.kills > MOST_BEGUN_AGAIN + 1:
            return 1e-6
        return takes.get(what, 0.001)

    monkeypatch.setattr(World, "pause", pause)
    world.lives[-1]._pause = world.pause
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    clients._submit(run, FORWARD_BACKWARD, batch(2, ends=True))
    takes.clear()
    takes["commit"] = 1.0
    return [wait_for(clients, run.ops[seq]) for seq in (1, 2)]


def wait_for(clients: Clients, op: Op) -> Outcome:
    while (found := clients._poll(op, 30.0)[0]) is None:
        pass
    return found


def test_what_was_done_just_before_it_does_not_fail_with_it(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, failed = compute_just_before_what_ends_the_server(clients, monkeypatch)
    assert done.failure is None
    assert failed.failure is not None and failed.failure.code == "operation_kills_server"
    check_all(clients)


def test_what_follows_at_once_blames_what_was_done_before(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gate, "close_until", lambda *_: None)
    done, _ = compute_just_before_what_ends_the_server(clients, monkeypatch)
    assert done.failure is not None and done.failure.code == "operation_kills_server"


def test_stops_in_good_order_are_none_of_its_deaths(clients: Clients) -> None:
    clients.all_end()
    world = clients._world
    world.pause = lambda what: 5.0 if what == "forward_backward" else 0.01  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    train(clients, 1)
    for _ in range(2 * MOST_BEGUN_AGAIN):
        world.let(2.0)
        clients.restart(1.0)
    check_all(clients)


def test_a_base_model_that_is_not_loaded_is_none_of_a_creation_s_deaths() -> None:
    clients = Clients()
    clients.world = World(1)
    clients.open_session("python")
    world = clients._world
    world.hangs = 100
    clients.create(1, 1)
    for _ in range(2 * MOST_BEGUN_AGAIN):
        world.let(2.0)
        clients.kill()
    world.hangs = 0
    clients.kill()
    check_all(clients)
    clients.close()


def test_a_save_that_was_published_is_done_whatever_ended_the_servers(clients: Clients) -> None:
    save(clients, "a")
    clients.all_end()
    world, (run,) = clients._world, clients.all

    def forget(connection: sa.Connection) -> None:
        """The server died before it had settled the save, not for the first time."""
        values = {"state": "accepted", "settled": None, "begun_again": MOST_BEGUN_AGAIN}
        connection.execute(operations.update().where(operations.c.seq == 1).values(values))
        connection.execute(snapshots.delete().where(snapshots.c.seq > 0))
        connection.execute(contents.delete().where(contents.c.part == "result"))

    clients._do(lambda: world.catalog.write(forget))
    clients.kill()
    outcome, _ = clients._poll(run.ops[1], 30.0)
    assert outcome is not None and outcome.failure is None


def test_a_save_that_ends_the_server_is_not_blamed_on_what_follows(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients.all_end()
    world, (run,) = clients._world, clients.all
    world.let(10.0)  # for its first snapshot, which is written as well
    takes = {"write": 1.0, "forward_backward": 5.0}
    reach = World.point

    def point(world: World, what: str) -> None:
        if what == "written" and not world._quiet and not settled(1):
            raise Killed(what)
        reach(world, what)

    def settled(seq: int) -> bool:
        with world.catalog._engine.connect() as connection:
            row = sa.select(operations.c.settled).where(operations.c.seq == seq)
            return connection.scalar(row) is not None

    monkeypatch.setattr(World, "point", point)
    monkeypatch.setattr(World, "pause", lambda _, what: takes.get(what, 0.01))
    save(clients, "a")
    train(clients, 1)
    failed, *others = [clients._poll(run.ops[seq], 60.0)[0] for seq in (1, 2, 3)]
    assert failed is not None and failed.failure is not None
    assert failed.failure.code == "operation_kills_server"
    for outcome in others:
        assert outcome is not None and outcome.failure is None


# --- Nothing waits for ever -----------------------------------------------------------------


def test_a_worker_that_never_loads_its_base_model_is_ended(clients: Clients) -> None:
    train(clients, 1)
    clients.all_end()
    world = clients._world
    world.hangs = 1
    clients.kill_the_worker()
    train(clients, 2)
    for _ in range(4):
        world.let(LOADING_TAKES / 4 + 10)
        world.runs.sessions.seen(clients.sessions[0].id)
    clients.all_end()
    assert [e for e in clients.events if "did not load" in str(e.get("error"))]
    check_all(clients)


def test_a_poll_says_that_a_base_model_is_being_loaded(clients: Clients) -> None:
    train(clients, 1)
    clients.all_end()
    (run,) = clients.all
    assert clients._poll(run.ops[run.highest], 0.0)[1] is None
    clients._world.hangs = 1
    clients.kill_the_worker()
    train(clients, 2)
    outcome, note = clients._poll(run.ops[run.highest], 5.0)
    assert outcome is None
    assert note == "base model 'toy' is being loaded"


def test_a_worker_that_hangs_is_ended(clients: Clients) -> None:
    train(clients, 1)
    clients.all_end()
    clients._world.lives[-1].hang()
    train(clients, 2)
    clients._world.let(HUNG_AFTER + 60)
    check_all(clients)
    assert [e for e in clients.events if "worker hangs" in e["event"]]


def test_a_locked_database_delays_a_skip_and_keeps_no_submission_waiting(clients: Clients) -> None:
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(1), seq=2)
    clients._world.let(359.0)
    clients._world.refuse_commits = 200
    clients._world.let(5.0)

    async def submit() -> None:
        live = await clients._world.runs.live(run.id, OWNER)
        async with asyncio.timeout(1.0):
            await live.submit(3, OPTIM_STEP, steps().encode())

    with pytest.raises(Unavailable):
        clients._world.loop.run_until_complete(submit())
    clients._world.refuse_commits = 0
    check_all(clients)


def test_a_client_that_goes_away_while_a_worker_starts_leaves_it_to_the_others(
    clients: Clients,
) -> None:
    clients.all_end()
    host = clients._world.runs.engines[NAME]

    async def leave() -> None:
        host.lost(host.life)
        waiting = [asyncio.create_task(host.engine()) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.wait(waiting)
        assert waiting[0].cancelled() and waiting[1].result()

    clients._do(leave)
    assert len(clients._world.lives) == 2


# --- Who is recovered first -----------------------------------------------------------------


def recovered(clients: Clients, asking: int) -> list[str]:
    """Runs in the order in which they are recovered, while one client waits."""
    clients.create(pick=0, rank=1)
    for run in clients.all:
        for x in range(8):
            clients._submit(run, FORWARD_BACKWARD, batch(x))
    clients.all_end()
    for run in clients.all:
        clients._submit(run, OPTIM_STEP, steps())
    clients.kill()
    del clients.events[:]
    waiting = clients.all[asking]
    clients._poll(waiting.ops[waiting.highest], 30.0)
    clients._world.let(60.0)
    return [e["run"] for e in clients.events if e["event"] == "recovered"]


@pytest.mark.parametrize("asking", [0, 1])
def test_the_run_whose_client_waits_is_recovered_first(
    clients: Clients, asking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    order = recovered(clients, asking)
    assert len(order) == 2 and order[0] == clients.all[asking].id


@pytest.mark.parametrize("restart", [False, True])
def test_a_recovery_is_over_also_where_a_save_is_the_last_that_is_done_again(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    world = clients._world
    train(clients, 1)
    clients.all_end()
    world.pause = lambda what: 1.0 if what == "write" else 0.001  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    save(clients, "a")
    world.let(0.5)
    if restart:
        clients.kill()
    else:
        clients.kill_the_worker()
    check_all(clients)
    world.let(1.0)
    (live,) = world.runs._live.values()
    assert live.driver.standing == "idle"
    record = clients._do(lambda: world.runs.record(live.run.key.id, OWNER))
    assert record.recoveries == 1


# --- Memory that is short during a replay ---------------------------------------------------


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, method: str, times: int) -> list[float]:
    """Let so many calls of every worker fail for want of memory; fills in when they did."""
    honest = getattr(ToyEngine, method)
    failed: list[float] = []

    async def call(engine: ToyEngine, run: str, *args: Any) -> Any:
        if len(failed) == times:
            return await honest(engine, run, *args)
        failed.append(engine.clock())
        state = engine.states[run]
        engine.states[run] = state.marked(1, "x") if "forward" in method else state.cleared()
        raise EngineError("out_of_memory", "it ran out of memory", "server")

    monkeypatch.setattr(ToyEngine, method, call)
    return failed


@pytest.mark.parametrize("method", [FORWARD_BACKWARD, OPTIM_STEP])
def test_a_replay_that_runs_out_of_memory_is_begun_again(
    clients: Clients, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    for x in range(3):
        train(clients, x)
    clients.all_end()
    clients._world.kill_worker()
    failed = run_out_of_memory(monkeypatch, method, 4)
    train(clients, 3)
    (run,) = clients.all
    outcome, note = clients._poll(run.ops[run.highest], 3.0)
    assert outcome is None
    assert note is not None and "tried again" in note and "ran out of memory" in note
    check_all(clients)
    assert len(failed) == 4 and min(b - a for a, b in pairwise(failed)) > 1.0


def test_a_replay_for_which_memory_stays_short_ends_no_run(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    train(clients, 0)
    clients.all_end()
    world, (run,) = clients._world, clients.all
    world.kill_worker()
    failed = run_out_of_memory(monkeypatch, FORWARD_BACKWARD, 10_000)
    clients._submit(run, OPTIM_STEP, steps())
    op = run.ops.pop(run.highest)
    for _ in range(40):
        outcome, _ = clients._poll(op, 30.0)
    assert outcome is not None and outcome.failure is not None
    assert (outcome.failure.code, outcome.failure.category) == ("out_of_memory", "server")
    tried = len(failed)
    assert tried <= MOST_STALLED / 5 + 1
    world.let(600.0)
    assert len(failed) == tried, "nobody asks for it"
    monkeypatch.undo()
    clients._submit(run, OPTIM_STEP, steps(), seq=op.seq + 1)
    outcome, _ = clients._poll(run.ops[run.highest], 30.0)
    assert outcome is not None and outcome.failure is None
    assert json.loads(outcome.result or b"") == {"skipped": 1.0, "step": 1.0}
    clients._check_logs()


# --- What is shown and counted --------------------------------------------------------------


def test_a_poll_says_how_far_a_recovery_is(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    train(clients, 0)
    clients.all_end()
    clients._world.let(30.0)  # idle: a snapshot at 2
    for x in range(1, 6):
        train(clients, x)
    clients.all_end()
    clients._world.pause = lambda what: 1.0 if what == OPTIM_STEP else 0.001  # type: ignore[method-assign]
    clients._world.kill_worker()
    train(clients, 6)
    (run,) = clients.all
    outcome, note = clients._poll(run.ops[run.highest], 2.5)
    assert outcome is None
    assert note == "recovering, 5 of 10 operations"
    check_all(clients)


def test_the_log_says_now_and_then_how_far_a_recovery_is(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    clients.all_end()
    clients._world.let(30.0)
    for x in range(25):
        train(clients, x)
    clients.all_end()
    clients._world.pause = lambda what: 1.0 if what == OPTIM_STEP else 0.001  # type: ignore[method-assign]
    clients._world.kill_worker()
    train(clients, 25)
    clients.all_end()
    told = [e for e in clients.events if e["event"] == "recovering"]
    assert [e["of"] for e in told] == [50] * len(told)
    assert 3 <= len(told) <= 5
    done = [e["done"] for e in told]
    assert done == sorted(set(done)) and done[0] > 0 and done[-1] < 50


def test_compute_is_counted_without_the_wait_for_the_turn(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher, "due", False)
    for pick in range(3):
        clients.create(pick=pick, rank=1)
    clients.all_end()
    world = clients._world
    world.pause = lambda what: 1.0 if what == FORWARD_BACKWARD else 0.0  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    publishers = [live.driver._publisher for live in world.runs._live.values()]
    for publisher in publishers:
        publisher.computed = 0.0
    for x in range(3):
        for run in clients.all:
            clients._submit(run, FORWARD_BACKWARD, batch(x))
    world.let(14.0)
    assert [publisher.computed for publisher in publishers] == pytest.approx([3.0] * 4, abs=0.2)


def test_a_worker_is_not_ended_for_a_time_in_which_the_server_itself_was_suspended(
    clients: Clients,
) -> None:
    clients.all_end()
    world = clients._world
    world.pause = lambda what: 60.0 if what == FORWARD_BACKWARD else 0.0  # type: ignore[method-assign]
    world.lives[-1]._pause = world.pause
    lives = len(world.lives)
    train(clients, 1)
    world.let(25.0)  # the watch has seen it begin
    world.clock.now += 2 * HUNG_AFTER
    check_all(clients)
    assert len(world.lives) == lives


@pytest.mark.parametrize(("client", "lease"), [("python", 360.0), ("elixir", 10.0)])
@pytest.mark.parametrize("passed", [0.0, 0.99])
def test_a_number_is_not_given_up_for_a_time_in_which_the_server_was_suspended(
    client: str, lease: float, passed: float
) -> None:
    """Nobody could send it. The wait for it starts again."""
    clients = Clients()
    clients.begin(seed=1, client=client)
    world, (run,) = clients._world, clients.all
    clients.all_end()
    clients._submit(run, FORWARD_BACKWARD, batch(1), seq=2)
    world.let(0.01 + passed * lease)
    world.clock.now += 2 * lease
    world.let(0.5 * lease)
    clients._submit(run, FORWARD_BACKWARD, batch(2), seq=1)
    for seq in (1, 2):
        outcome, _ = clients._poll(run.ops[seq], 60.0)
        assert outcome is not None and outcome.failure is None
    clients.close()


def test_what_follows_many_missing_numbers_ends_after_one_wait(clients: Clients) -> None:
    (run,) = clients.all
    started = clients._now
    clients._submit(run, FORWARD_BACKWARD, batch(1), seq=50)
    outcome, _ = clients._poll(run.ops[50], 400.0)
    assert outcome is not None and outcome.failure is None
    assert clients._now - started < 370.0


@pytest.mark.parametrize("seq", [1 << 20, (1 << 63) - 1])
def test_a_number_that_nobody_can_have_reached_is_a_mistake(clients: Clients, seq: int) -> None:
    """It would be waited for for years, refused or not."""
    (run,) = clients.all
    train(clients, 1)

    async def submit() -> None:
        live = await clients._world.runs.live(run.id, OWNER)
        await live.submit(seq, FORWARD_BACKWARD, batch(1))

    async def refuse() -> None:
        live = await clients._world.runs.live(run.id, OWNER)
        await live.refuse(seq, FORWARD_BACKWARD, journal.Failure("invalid_datum", "no good"))

    with pytest.raises(RunError) as refused:
        clients._do(submit)
    assert refused.value.code == "number_too_high" and f"number {seq} " in str(refused.value)
    clients._do(refuse)
    clients.kill()
    clients._submit(run, FORWARD_BACKWARD, batch(2))
    clients._world.let(60.0)
    clients._submit(run, OPTIM_STEP, steps())
    check_all(clients)


def test_a_number_is_not_given_up_while_the_disk_has_no_room_for_it() -> None:
    """Its client sends it again and again meanwhile, for longer than a gap is waited for."""
    clients = Clients()
    clients.world = World(1, large=True)
    clients.open_session("elixir")
    clients.create(pick=0, rank=1)
    clients.all_end()
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(2), seq=2)
    clients._world.full_until = clients._now + 2 * GAP_LEASE_ELIXIR
    clients.kill()  # what comes from now on needs a new file
    clients._submit(run, FORWARD_BACKWARD, batch(1), seq=1)
    assert clients._now >= clients._world.full_until
    for seq in (1, 2):
        outcome, _ = clients._poll(run.ops[seq], 60.0)
        assert outcome is not None and outcome.failure is None
    clients._submit(run, FORWARD_BACKWARD, batch(2), seq=4)
    outcome, _ = clients._poll(run.ops[4], 2 * GAP_LEASE_ELIXIR)
    assert outcome is not None and outcome.failure is None
    clients.close()
