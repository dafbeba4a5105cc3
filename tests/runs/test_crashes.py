"""One script of a client, with the server or the worker dying at every point of it in turn.

What the search of `test_service` finds by chance is found here by exhaustion, for one script; so
this is also where defects are planted to see that they are found.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from holdfast.catalog import tables
from holdfast.catalog.postgresql import PostgreSQL
from holdfast.runs import bodies, journal
from holdfast.runs.bodies import Load, Save
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.errors import RunError
from holdfast.runs.order import Order, State
from holdfast.runs.publishing import Publisher
from holdfast.runs.recovery import Recovery
from holdfast.runs.run import Run
from tests.support.postgres import Postgres

from . import sim
from .test_service import OWNER, Clients, steps
from .toy import batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

STRIDE = 1 if "HOLDFAST_EXAMPLES" in os.environ else 11
"""Every point takes minutes."""

FORWARD_BACKWARD, OPTIM_STEP = bodies.FORWARD_BACKWARD, bodies.OPTIM_STEP


def script(clients: Clients) -> None:
    """Accumulation, failures, saves and loads, by a client that waits in the middle."""
    (run,) = clients.all

    def train(x: int, fail: str | None = None) -> None:
        clients._submit(run, FORWARD_BACKWARD, batch(x, fail=fail))

    def step() -> None:
        clients._submit(run, OPTIM_STEP, steps())

    def save(name: str, *, overwrite: bool = False) -> None:
        clients._submit(run, bodies.SAVE_WEIGHTS, Save(name, None, overwrite))

    def load(name: str) -> None:
        body = Load(run.id, "weights", name, True, [OWNER])
        clients._submit(run, bodies.LOAD_WEIGHTS, body)

    train(1)
    step()
    train(2)
    save("a")
    save("a")  # taken
    train(3, fail="invalid_datum")
    save("b")  # with the mark
    load("a")
    step()
    clients.pass_time(0.3)
    train(4)
    train(5, fail="invalid_datum")
    clients.all_end()
    step()  # fails, and clears
    save("a", overwrite=True)
    load("b")
    train(6)
    save("c")
    load("c")


def with_gaps(clients: Clients) -> None:
    """Numbers that are missing, refused, and late."""
    (run,) = clients.all
    clients._submit(run, FORWARD_BACKWARD, batch(1))
    clients._submit(run, bodies.SAVE_WEIGHTS, Save("a"))
    clients._submit(run, FORWARD_BACKWARD, batch(2), seq=run.highest + 2)
    clients._submit(run, OPTIM_STEP, steps())
    clients.all_end()
    late = min(seq for seq in run.ops if run.skipped(seq))
    clients._submit(run, FORWARD_BACKWARD, batch(3))
    clients._submit(run, FORWARD_BACKWARD, batch(4), seq=late)
    clients.pass_time(0.01)
    clients._submit(run, OPTIM_STEP, steps())
    clients.refuse(pick=0, which=0, kind=FORWARD_BACKWARD, gap=False)
    clients._submit(run, OPTIM_STEP, steps())


def with_ends(clients: Clients) -> None:
    """A run that is unloaded, and one whose session ends, while requests still come."""
    clients.open_session("python")
    clients.create(pick=1, rank=1)
    for run in clients.all:
        clients._submit(run, FORWARD_BACKWARD, batch(1))
        clients._submit(run, OPTIM_STEP, steps())
        clients._submit(run, bodies.SAVE_WEIGHTS, Save("a"))
        clients._submit(run, FORWARD_BACKWARD, batch(2))
    clients.unload(pick=0, beside=3)
    clients.end_session(pick=1, beside=3)
    clients._world.let(30.0)
    ended = [clients._do(partial(clients._world.runs.record, x.id, OWNER)) for x in clients.all]
    assert [record.state for record in ended] == ["unloaded", "unloaded"]


Arm = Callable[[Clients, int], None]


def kill_server(clients: Clients, point: int) -> None:
    """At a commit, or where a file comes to its name: just before it or just after."""
    assert clients.world is not None
    clients.world.kill_at = frozenset(("commit", "committed", "rename"))
    clients.world.kill_in = point


def kill_server_at_commit(clients: Clients, point: int) -> None:
    assert clients.world is not None
    clients.world.kill_at = frozenset(("commit",))
    clients.world.kill_in = point


def kill_worker(clients: Clients, point: int) -> None:
    assert clients.world is not None
    clients.world.die_in = point


def at_every_point(
    perform: Callable[[Clients], None],
    arm: Arm,
    *,
    seed: int = 1,
    client: str = "python",
    first: int = 0,
    stride: int = 1,
) -> int:
    """Perform a script with a death at one point of it after the other; how many it has."""
    point = first
    while True:
        clients = Clients()
        try:
            clients.begin(seed=seed, client=client)
            assert clients.world is not None
            arm(clients, point)
            perform(clients)
            clients.all_end()
            reached = clients.world.kill_in is None and clients.world.die_in is None
        except BaseException:
            clients.close()
            raise
        clients.teardown()
        if not reached:
            return point
        point += stride


@pytest.mark.parametrize("perform", [script, with_gaps, with_ends])
def test_the_server_may_be_killed_at_any_point(perform: Callable[[Clients], None]) -> None:
    assert at_every_point(perform, kill_server, stride=STRIDE) > 60


@pytest.mark.parametrize("perform", [script, with_gaps, with_ends])
def test_the_same_with_a_catalog_on_postgresql(
    perform: Callable[[Clients], None], postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = PostgreSQL.at(postgres.catalog())

    def emptied(_root: Path) -> PostgreSQL:
        with backend.engine.begin() as connection:
            for table in reversed(tables.metadata.sorted_tables):
                if table is not tables.epoch:
                    connection.execute(table.delete())
        return backend

    monkeypatch.setattr(sim, "new_catalog", emptied)
    assert at_every_point(perform, kill_server, stride=5 * STRIDE) > 60
    backend.engine.dispose()


@pytest.mark.parametrize("perform", [script, with_gaps])
def test_the_worker_may_die_at_any_step(perform: Callable[[Clients], None]) -> None:
    points = at_every_point(perform, kill_worker, client="elixir", stride=max(1, STRIDE // 2))
    assert points > 5


# --- The same, with a defect ----------------------------------------------------------------


def answer_before_journaling(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Run._journal

    async def journal(run: Run, *args: Any, **kwargs: Any) -> None:
        run._late = asyncio.create_task(honest(run, *args, **kwargs))  # type: ignore[attr-defined]

    monkeypatch.setattr(Run, "_journal", journal)


def replay_without_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Recovery._redo_failure

    async def redo(recovery: Recovery, entry: Any, record: Any) -> None:
        if entry.kind != FORWARD_BACKWARD:
            await honest(recovery, entry, record)

    monkeypatch.setattr(Recovery, "_redo_failure", redo)


def replay_without_cleared_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.runs.recovery.CLEARING", frozenset())


def load_without_waiting_for_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def settled(publisher: Publisher) -> None:
        pass

    monkeypatch.setattr(Publisher, "settled", settled)


def take_own_save_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def made_by(*_: Any) -> None:
        return None

    async def same_request(*_: Any) -> bool:
        return False

    monkeypatch.setattr(Checkpoints, "made_by", made_by)
    monkeypatch.setattr(Checkpoints, "_same_request", same_request)


def snapshot_ahead_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery point one operation further than its state."""
    honest = Publisher._finish_snapshot

    async def finish(publisher: Publisher, seq: int, *args: Any) -> None:
        await honest(publisher, seq + 1, *args)

    monkeypatch.setattr(Publisher, "_finish_snapshot", finish)


def forget_what_was_running(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Order.rewind

    def rewind(order: Order, position: int) -> None:
        saves = [e for e in order._entries.values() if e.state is State.RUNNING]
        honest(order, position)
        for entry in saves:
            entry.state = State.RUNNING

    monkeypatch.setattr(Order, "rewind", rewind)


def end_without_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "note_end", lambda *_: None)


@pytest.mark.parametrize(
    ("plant", "arm", "perform"),
    [
        (answer_before_journaling, kill_server_at_commit, script),
        (replay_without_marks, kill_worker, script),
        (replay_without_cleared_gradients, kill_worker, script),
        (load_without_waiting_for_saves, kill_server, script),
        (take_own_save_for_another, kill_server_at_commit, script),
        (snapshot_ahead_of_results, kill_worker, script),
        (forget_what_was_running, kill_worker, script),
        (end_without_a_note, kill_server, with_ends),
    ],
)
def test_a_planted_defect_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    arm: Arm,
    perform: Callable[[Clients], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, RunError)):
        for first in range(STRIDE):
            at_every_point(perform, arm, first=first, stride=STRIDE)
