"""A run that goes on under other numerics, and back: what differs is noted, and ends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog.tables import runs, snapshots
from holdfast.engine.interface import ADAPTER_WEIGHTS
from holdfast.runs.bodies import FORWARD_BACKWARD, OPTIM_STEP
from holdfast.runs.publishing import Publisher
from holdfast.runs.recovery import Recovery

from .test_service import OWNER, Clients, steps
from .toy import ToyEngine, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clients]:
    """Their engine gives other results under other numerics; only idle runs are snapshotted."""
    honest = ToyEngine._batch

    async def batch_(engine: ToyEngine, *args: Any) -> bytes:
        numerics = engine._info.fingerprint["toy"]
        return await honest(engine, *args) + f" under {numerics}".encode()

    monkeypatch.setattr(ToyEngine, "_batch", batch_)
    monkeypatch.setattr(Publisher, "due", False)
    clients = Clients()
    clients.begin(seed=1, client="python")
    yield clients
    clients.close()


def train(clients: Clients, x: int = 1) -> list[str | None]:
    """A step; with which codes its requests failed."""
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(x))
    clients._submit(run, OPTIM_STEP, steps())
    codes = []
    for seq in (run.highest - 1, run.highest):
        outcome, _ = clients._poll(run.ops[seq], 60.0)
        assert outcome is not None
        codes.append(None if outcome.failure is None else outcome.failure.code)
    return codes


def crash_into(clients: Clients, numerics: int) -> None:
    clients._world.fingerprint = {"toy": numerics}
    clients.kill()


def damage_newest_snapshot(clients: Clients) -> None:
    with clients._world.catalog._engine.connect() as connection:
        query = sa.select(snapshots.c.manifest).order_by(snapshots.c.seq.desc())
        newest = connection.scalars(query).first()
    assert newest is not None
    weights = clients._world.store.read_manifest(newest).files[ADAPTER_WEIGHTS]
    (path,) = clients._world.root.rglob(weights.hash)
    path.chmod(0o600)
    path.write_bytes(b"?" + path.read_bytes()[1:])


def divergences(clients: Clients) -> int:
    with clients._world.catalog._engine.connect() as connection:
        return connection.scalar(sa.select(runs.c.divergences)) or 0


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_survives_other_numerics_that_were_there_for_a_moment(
    clients: Clients, replayed: bool, damaged: bool
) -> None:
    train(clients)
    clients._world.let(30.0)
    if replayed:
        train(clients)
    crash_into(clients, 2)
    assert train(clients) == [None, None]
    assert divergences(clients) == replayed
    if damaged:
        damage_newest_snapshot(clients)
    crash_into(clients, 1)
    assert train(clients) == [None, None]
    clients._check_logs()


@pytest.mark.parametrize("numerics", [1, 2])
def test_a_run_that_is_killed_before_its_first_snapshot_is_recovered_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch, clients: Clients, numerics: int
) -> None:
    monkeypatch.setattr(Publisher, "allowed", False)
    clients.create(0, 1)
    _, run = clients.all
    clients.all = [run]
    train(clients)
    train(clients)
    del clients.events[:]
    crash_into(clients, numerics)
    assert train(clients) == [None, None]
    clients._world.let(10.0)
    found = [e for e in clients.events if e["event"] == "recovered" and e.get("run") == run.id]
    assert [(e["replayed"], e["diverged"]) for e in found] == [(5, 2 * (numerics - 1))]
    record = clients._do(lambda: clients._world.runs.record(run.id, OWNER))
    assert (record.recoveries, record.replayed) == (1, 5)
    assert record.divergences == 2 * (numerics - 1)


def test_without_a_snapshot_at_the_change_its_results_are_compared_with_others(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(clients)
    clients._world.let(30.0)
    with monkeypatch.context() as planted:
        planted.setattr(Recovery, "_other_numerics", False)
        crash_into(clients, 2)
        train(clients)
    crash_into(clients, 1)
    assert train(clients) == ["replay_diverged", "replay_diverged"]


def test_another_result_under_the_same_numerics_stops_the_run(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(clients)
    clients._world.let(30.0)
    train(clients)
    honest = ToyEngine._batch

    async def batch_(engine: ToyEngine, *args: Any) -> bytes:
        return await honest(engine, *args) + b"!"

    monkeypatch.setattr(ToyEngine, "_batch", batch_)
    clients.kill_the_worker()
    assert train(clients) == ["replay_diverged", "replay_diverged"]
