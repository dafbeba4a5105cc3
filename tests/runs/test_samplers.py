"""Sampling takes turns with training, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog.tables import samplers as rows
from holdfast.catalog.tables import snapshots
from holdfast.engine.worker import store_error
from holdfast.runs import bodies, samplers
from holdfast.runs.bodies import FORWARD_BACKWARD, Save, SaveSampler
from holdfast.runs.errors import RunError
from holdfast.runs.journal import Outcome
from holdfast.runs.samplers import Sampler
from holdfast.store import (
    CorruptBlob,
    DiskFull,
    IOFailed,
    LocalStore,
    Manifest,
    NameKey,
    NoAccess,
    StoreError,
    Unavailable,
)
from holdfast.store.retries import STORAGE_WAITED_FOR

from .sim import World
from .test_service import OWNER, Clients, steps
from .toy import NAME, ToyEngine, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def sampler_of(clients: Clients, key: NameKey) -> Sampler:
    (session,) = clients.sessions
    clients.count += 1
    number = clients.count
    found = clients._do(
        lambda: clients._world.runs.samplers.create_from_path(session.id, OWNER, number, key, None)
    )
    assert isinstance(found, Sampler)
    return found


def saved(clients: Clients) -> NameKey:
    run = clients.all[0]
    clients._submit(run, bodies.SAVE_WEIGHTS, Save("a"))
    clients.all_end()
    return NameKey(run.id, "weights", "a")


def flood(clients: Clients, sampler: Sampler, count: int) -> None:
    """Send so many requests at once."""

    async def submit() -> None:
        for seq in range(1, count + 1):
            clients._world.runs.samplers.submit(sampler, seq, b"x", b"x")

    clients._do(submit)


def step_beside(clients: Clients) -> float:
    """Seconds that a training operation takes beside a thousand samples of half a second."""
    sampler = sampler_of(clients, saved(clients))
    clients._world.pause = lambda what: 0.5 if what == "sample" else 0.001  # type: ignore[method-assign]
    clients._world.lives[-1]._pause = clients._world.pause
    flood(clients, sampler, 1000)
    clients._world.let(1.0)
    started, (run,) = clients._now, clients.all
    for x in range(3):
        clients._submit(run, FORWARD_BACKWARD, batch(x))
    outcome, _ = clients._poll(run.ops[run.highest], 1000.0)
    assert outcome is not None and outcome.failure is None
    return (clients._now - started) / 3


def test_an_operation_waits_for_one_sample_of_many(clients: Clients) -> None:
    assert step_beside(clients) <= 1.1


def test_samplers_take_turns_with_each_other(clients: Clients) -> None:
    key = saved(clients)
    first, second = sampler_of(clients, key), sampler_of(clients, key)
    clients._world.pause = lambda what: 0.5 if what == "sample" else 0.001  # type: ignore[method-assign]
    clients._world.lives[-1]._pause = clients._world.pause
    flood(clients, first, 1000)
    flood(clients, second, 1)
    started = clients._now
    outcome = clients._do(lambda: clients._world.runs.samplers.outcome(second.id, 1, 1000.0))
    assert outcome is not None and outcome.failure is None
    assert clients._now - started <= 1.6


def test_samples_that_wait_drive_no_run_out_of_the_worker() -> None:
    clients = Clients()
    clients.world = World(1, adapter_memory=6000)  # about seven of the toy's states
    clients.open_session("python")
    clients.create(0, 1)
    sampler = sampler_of(clients, saved(clients))
    clients._submit(clients.all[0], FORWARD_BACKWARD, batch(1))
    clients.all_end()
    flood(clients, sampler, 100)
    clients._world.let(5.0)
    assert len(clients._world.lives[-1].states) == 1
    assert not [e for e in clients.events if "left the worker" in e["event"]]
    clients._check_logs()
    clients.close()


# --- A storage that fails for a moment ------------------------------------------------------


def fails_until(end: float, clients: Clients, error: type[StoreError]) -> Callable[[], None]:
    def check() -> None:
        if clients._now < end:
            raise CorruptBlob("it is damaged", "x") if error is CorruptBlob else error("no answer")

    return check


def plant_manifest(check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LocalStore.read_manifest

    def read(store: LocalStore, manifest_id: str) -> Manifest:
        check()
        return honest(store, manifest_id)

    monkeypatch.setattr(LocalStore, "read_manifest", read)


def plant_weights(check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ToyEngine.sample

    async def sample(engine: ToyEngine, *args: Any) -> bytes:
        try:
            check()
        except StoreError as error:
            raise store_error(error) from error
        return await honest(engine, *args)

    monkeypatch.setattr(ToyEngine, "sample", sample)


def sampled(
    clients: Clients,
    monkeypatch: pytest.MonkeyPatch,
    plant: Plant,
    seconds: float,
    error: type[StoreError],
) -> tuple[Outcome, float]:
    """What becomes of a sample beside a storage that fails for so long, and its seconds."""
    sampler = sampler_of(clients, saved(clients))
    started = clients._now
    plant(fails_until(started + seconds, clients, error), monkeypatch)
    flood(clients, sampler, 1)
    outcome = clients._do(lambda: clients._world.runs.samplers.outcome(sampler.id, 1, 1000.0))
    assert isinstance(outcome, Outcome)
    return outcome, clients._now - started


Plant = Callable[[Callable[[], None], pytest.MonkeyPatch], None]
PLANTS = pytest.mark.parametrize("plant", [plant_manifest, plant_weights])


@PLANTS
@pytest.mark.parametrize("error", [IOFailed, NoAccess, Unavailable])
def test_a_sample_waits_for_a_storage_that_fails_for_a_moment(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, plant: Plant, error: type[StoreError]
) -> None:
    outcome, seconds = sampled(clients, monkeypatch, plant, 40.0, error)
    assert outcome.failure is None
    assert 40.0 <= seconds < 50.0


@PLANTS
def test_a_sample_fails_when_the_storage_does_not_come_back(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    outcome, seconds = sampled(clients, monkeypatch, plant, 1000.0, IOFailed)
    assert outcome.failure is not None
    assert (outcome.failure.code, outcome.failure.category) == ("io_failed", "server")
    assert STORAGE_WAITED_FOR - 5 < seconds < STORAGE_WAITED_FOR + 5


@PLANTS
def test_a_sample_of_damaged_weights_fails_at_once(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    outcome, seconds = sampled(clients, monkeypatch, plant, 1000.0, CorruptBlob)
    assert outcome.failure is not None and outcome.failure.code == "corrupt_blob"
    assert seconds < 5


# --- How many may wait ----------------------------------------------------------------------


def sampler_for(clients: Clients, owner: str) -> Sampler:
    """A sampler of the base model."""
    (session,) = clients.sessions
    clients.count += 1
    create = clients._world.runs.samplers.create_from_base
    found = clients._do(lambda: create(session.id, owner, clients.count, NAME))
    assert isinstance(found, Sampler)
    return found


def taken(clients: Clients, sampler: Sampler, body: bytes = b"x", first: int = 1) -> int:
    """How many requests are taken when there is no end of them."""

    async def submit() -> int:
        for seq in range(first, first + 1000):
            try:
                clients._world.runs.samplers.submit(sampler, seq, body, body)
            except RunError as error:
                assert (error.code, error.reason) == ("too_many_samples", "unavailable")
                return seq - first
        raise AssertionError("there is no end")

    count = clients._do(submit)
    assert isinstance(count, int)
    return count


def test_one_owner_s_samples_leave_room_for_those_of_others(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "MOST_WAITING", 40)
    first, second, other = (sampler_for(clients, owner) for owner in (OWNER, OWNER, "other"))
    assert taken(clients, first) == 20
    assert taken(clients, second) == 0, "another sampler is no way round it"
    assert taken(clients, other) == 10
    clients._world.let(100.0)  # all are answered
    assert taken(clients, other, first=100) == 20
    clients._world.runs.samplers.cancel(other.id, 100)
    assert taken(clients, other, first=200) == 1


def test_samples_that_wait_take_no_more_than_so_much_memory(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "MOST_WAITING_BYTES", 40_000)
    one, other = sampler_for(clients, OWNER), sampler_for(clients, "other")
    assert taken(clients, one, b"x" * 1000) == 20
    assert taken(clients, other, b"x" * 1000) == 10
    clients._world.let(100.0)
    assert taken(clients, one, b"x" * 1000, first=100) == 20


# --- Their end ------------------------------------------------------------------------------


def left(clients: Clients) -> tuple[int, int]:
    """Samplers in the catalog, and manifests without a name in the store."""
    with clients._world.catalog._engine.connect() as connection:
        count = connection.scalar(sa.select(sa.func.count()).select_from(rows)) or 0
    return count, len(list(clients._world.store.unnamed()))


def without_runs(clients: Clients) -> None:
    """Have a session with samplers and no run any more."""
    key = saved(clients)
    for _ in range(2):
        sampler_of(clients, key)
    clients._do(lambda: clients._world.runs.unload(clients.all[0].id, OWNER))
    clients._world.let(10.0)
    assert left(clients) == (2, 2)


def end(clients: Clients) -> None:
    session = clients.sessions.pop()
    clients._do(lambda: clients._world.runs.end_session(session.id, "success"))


def test_samplers_go_with_their_session_wherever_the_server_is_killed() -> None:
    for point in range(30):
        clients = Clients()
        clients.begin(seed=1, client="python")
        world = clients._world
        without_runs(clients)
        world.kill_in = point
        end(clients)
        world.let(1.0)
        killed, world.kill_in = world.kills > 0, None
        world.restart()
        world.let(1.0)
        assert left(clients) == (0, 0), f"killed at point {point}"
        clients.close()
        if not killed:
            assert point > 3
            return
    raise AssertionError("there is no end of points")


def names_are_not_taken(*_: Any, **__: Any) -> None:
    raise DiskFull("no room left on the disk")


def test_samplers_go_at_once_where_a_last_state_has_to_wait_for_the_storage(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = saved(clients)
    sampler_of(clients, key)
    clients._submit(clients.all[0], FORWARD_BACKWARD, batch(1))
    clients.all_end()
    with monkeypatch.context() as planted:
        planted.setattr(LocalStore, "set_name", names_are_not_taken)
        end(clients)
        clients._world.let(5.0)
        assert left(clients)[0] == 0
        record = clients._do(lambda: clients._world.runs.record(key.run, OWNER))
        assert record.state == "live"  # it is still tried to be kept


def test_a_sampler_that_is_being_made_when_its_session_ends_goes_with_it(
    clients: Clients,
) -> None:
    world, run = clients._world, clients.all[0]
    world.lives[-1]._pause = lambda what: 2.0 if what == "write" else 0.01
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    clients._submit(run, bodies.SAVE_SAMPLER, SaveSampler(None, 1))
    world.let(1.0)
    end(clients)
    world.let(20.0)
    outcome, _ = clients._poll(run.ops[run.highest], 1.0)
    assert outcome is not None and outcome.failure is None
    assert left(clients) == (0, 0)


def test_samplers_whose_weights_the_store_does_not_let_go_are_gone_later(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_runs(clients)
    with monkeypatch.context() as planted:

        def discard(*_: Any) -> bool:
            raise Unavailable("the storage does not answer")

        planted.setattr(LocalStore, "discard", discard)
        end(clients)
        clients._world.let(10.0)
        assert left(clients)[0] == 0
    clients._world.restart()
    clients._world.let(1.0)
    assert left(clients) == (0, 0)
    clients._check_logs()


# --- Those of a long run --------------------------------------------------------------------


def few_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest three, and what was used within six minutes."""
    monkeypatch.setattr(samplers, "NEWEST_KEPT", 3)
    monkeypatch.setattr(samplers, "UNUSED_KEPT", 360.0)


def sampler_of_state(clients: Clients, number: int) -> str:
    """As `save_weights_and_get_sampling_client` makes one with each step: without a name."""
    (model,), world = clients.all, clients._world

    async def step() -> str:
        run = await world.runs.live(model.id, OWNER)
        seq = run.order.highest
        await run.submit(seq + 1, FORWARD_BACKWARD, batch(number))
        await run.submit(seq + 2, bodies.OPTIM_STEP, steps().encode())
        await run.submit(seq + 3, bodies.SAVE_SAMPLER, SaveSampler(None, number).encode())
        outcome = await run.outcome(seq + 3, 60.0)
        assert outcome is not None and outcome.result is not None
        return str(json.loads(outcome.result)["sampling_session_id"])

    made = clients._do(step)
    assert isinstance(made, str)
    return made


def use(clients: Clients, sampler_id: str) -> None:
    clients._do(lambda: clients._world.runs.samplers.get(sampler_id, OWNER))


def is_gone(clients: Clients, sampler_id: str) -> bool:
    try:
        use(clients, sampler_id)
    except RunError as error:
        assert (error.code, error.reason) == ("sampler_released", "not_found")
        assert "under a name" in error.message
        return True
    return False


def needed(clients: Clients) -> set[str]:
    """Manifests that samplers and recovery points have."""
    with clients._world.catalog._engine.connect() as connection:
        of_samplers = connection.scalars(
            sa.select(rows.c.manifest).where(rows.c.manifest.is_not(None))
        )
        return {*of_samplers, *connection.scalars(sa.select(snapshots.c.manifest))}


def pass_minutes(clients: Clients, minutes: int, using: str | None = None) -> None:
    for _ in range(minutes):
        clients._world.let(60.0)
        clients._beat()
        if using is not None:
            use(clients, using)


def test_old_samplers_that_nobody_uses_go(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_kept(monkeypatch)
    made = [sampler_of_state(clients, number) for number in range(7)]
    base = sampler_for(clients, OWNER)
    pass_minutes(clients, 5)
    before = left(clients)
    assert before[0] == 8
    pass_minutes(clients, 3, using=made[1])
    (session,) = clients.sessions
    _, listed = clients._do(lambda: clients._world.runs.sessions.members(session.id))
    assert sorted(listed) == sorted([made[1], *made[4:], base.id])
    assert left(clients)[1] == before[1] - 3, "their weights are let go"
    assert [is_gone(clients, x) for x in made] == [True, False, True, True, False, False, False]
    clients._check_logs()
    clients._world.restart()
    assert is_gone(clients, made[0])


def test_the_number_of_one_that_is_gone_is_never_another_one_s(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some clients count from 0 several times: who still has the old one would sample the new."""
    few_kept(monkeypatch)
    made = [sampler_of_state(clients, number) for number in range(4)]
    pass_minutes(clients, 7)
    assert is_gone(clients, made[0])
    assert sampler_of_state(clients, 0) not in made
    assert is_gone(clients, made[0])


def test_a_server_that_has_not_been_there_as_long_lets_no_sampler_go(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_kept(monkeypatch)
    first, *_ = [sampler_of_state(clients, number) for number in range(4)]
    for restart in (clients._world.restart, clients._world.kill):
        pass_minutes(clients, 5)
        restart()
    pass_minutes(clients, 5)
    with clients._world.catalog._engine.connect() as connection:
        gone = sa.select(sa.func.count()).where(rows.c.released.is_not(None))
        assert connection.scalar(gone) == 0
    pass_minutes(clients, 2)
    assert is_gone(clients, first)


def test_the_samplers_of_other_sessions_and_runs_push_none_out(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_kept(monkeypatch)
    first = sampler_of(clients, saved(clients))
    first_session = clients.sessions.pop()
    clients.open_session("python")
    second = [sampler_of(clients, NameKey(clients.all[0].id, "weights", "a")).id for _ in range(4)]
    clients.sessions.append(first_session)
    pass_minutes(clients, 7)
    assert not is_gone(clients, first.id)
    assert [is_gone(clients, sampler_id) for sampler_id in second] == [True, False, False, False]


def test_samplers_are_let_go_wherever_the_server_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_kept(monkeypatch)
    for point in range(30):
        clients = Clients()
        clients.begin(seed=1, client="python")
        world = clients._world
        made = [sampler_of_state(clients, number) for number in range(5)]
        pass_minutes(clients, 5)
        world.let(50.0)
        world.kill_in = point
        world.let(60.0)
        killed, world.kill_in = world.kills > 0, None
        pass_minutes(clients, 7)
        assert [is_gone(clients, x) for x in made] == [True, True, False, False, False]
        unnamed = {manifest_id for manifest_id, _ in world.store.unnamed()}
        assert unnamed == needed(clients), f"killed at point {point}"
        clients._check_logs()
        clients.close()
        if not killed:
            assert point > 1
            return
    raise AssertionError("there is no end of points")
