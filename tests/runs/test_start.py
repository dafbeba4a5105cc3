"""A start with many runs: requests are taken before any of them is recovered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog.tables import runs, sessions
from holdfast.runs import bodies, journal
from holdfast.runs.bodies import Create
from holdfast.runs.checkpoints import Checkpoints
from holdfast.runs.journal import Outcome, RunKey
from holdfast.runs.order import Entry
from holdfast.runs.service import Runs

from .test_service import OWNER, Clients
from .toy import NAME, batch

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")

MOST_QUERIES = 20
"""That a start may make, however many runs there are."""


def add_runs(clients: Clients, count: int) -> None:
    """Sessions with a run each that has done two operations, and has one that waits."""
    world = clients._world
    config = {"base_model": NAME, "lora": {"rank": 1, "seed": 1}, "optimizer": "adamw"}
    create = Create.of(bodies.config_from_json(config)).encode()

    def work(connection: sa.Connection) -> None:
        for i in range(count):
            key = RunKey(f"s{i}:train:0")
            connection.execute(
                sessions.insert().values(
                    id=f"s{i}", owner=OWNER, client="python", tags=[], created=1.0
                )
            )
            connection.execute(
                runs.insert().values(
                    id=key.id,
                    generation=0,
                    session_id=f"s{i}",
                    owner=OWNER,
                    created=float(i),
                    last_request=1.0,
                    state="live",
                    base_model=NAME,
                    config=config,
                    body_hash="",
                    corrupted=False,
                )
            )
            for seq, kind in enumerate((bodies.CREATE, bodies.OPTIM_STEP, bodies.OPTIM_STEP)):
                body = create if seq == 0 else b"x"
                entry = Entry(seq, kind, journal.digest(body))
                journal.add(connection, world.segments, key, entry, now=1.0, body=body)
                if seq < 2:
                    done = Outcome(kind, result=b"{}")
                    journal.settle(connection, world.segments, key, seq, done, now=1.0)

    clients._do(lambda: world.catalog.write(work))


def start(clients: Clients) -> list[str]:
    """Start the server again; what it asks the catalog before it takes requests."""
    queries: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        queries.append(statement)

    engine = clients._world.catalog._engine
    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        clients._world.restart()
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    return [query for query in queries if query.lstrip().startswith(("SELECT", "WITH"))]


def test_the_queries_of_a_start_do_not_grow_with_the_runs(clients: Clients) -> None:
    add_runs(clients, 300)
    assert 5 < len(start(clients)) <= MOST_QUERIES
    assert len(clients._world.runs._live) == 301
    for i in (0, 299):
        order = clients._world.runs._live[f"s{i}:train:0"].run.order
        assert (order.reached, [entry.seq for entry in order.unsettled]) == (1, [2])


def test_a_query_for_each_run_is_found(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Runs._take_up

    def take_up(self: Runs, session: Any, record: Any, found: Any) -> None:
        self.catalog.read_now(lambda c: journal.recovery_points(c, record.key))
        honest(self, session, record, found)

    monkeypatch.setattr(Runs, "_take_up", take_up)
    with pytest.raises(AssertionError):
        test_the_queries_of_a_start_do_not_grow_with_the_runs(clients)


def test_requests_are_taken_while_store_and_catalog_are_compared(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reconcile(_: Checkpoints) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(Checkpoints, "reconcile", reconcile)
    clients.all_end()
    clients.kill()
    started = clients._now
    clients._submit(clients.all[0], bodies.FORWARD_BACKWARD, batch(1))
    clients.all_end()
    assert clients._now - started < 2.0
