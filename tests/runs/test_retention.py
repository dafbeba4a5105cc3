"""What is kept of operations, and for how long: neither grows with the number of runs."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from holdfast.catalog import Catalog
from holdfast.catalog.tables import operations, runs, snapshots
from holdfast.runs import journal
from holdfast.runs.journal import Outcome, RunKey
from holdfast.runs.order import Entry, State

KEY = RunKey("session:train:0")
READ_AT = 100.0


def add_run(connection: sa.Connection, *, state: str, seqs: int) -> None:
    """A run with that many answered operations, and a recovery point at each fifth."""
    connection.execute(
        runs.insert().values(
            id=KEY.id,
            generation=0,
            session_id="session",
            owner="local",
            created=1.0,
            last_request=1.0,
            state=state,
            body_hash="",
            corrupted=False,
        )
    )
    for seq in range(seqs):
        entry = Entry(seq, "forward_backward", "hash", State.ACCEPTED)
        journal.add(connection, KEY, entry, now=1.0, body=b"body")
        outcome = Outcome("forward_backward", result=b"result")
        journal.settle(connection, KEY, seq, outcome, now=2.0)
        if seq % 5 == 0:
            journal.add_snapshot(connection, KEY, seq, f"{seq:064x}", now=3.0)
    journal.mark_read(connection, KEY, range(seqs), now=READ_AT)


def kept(connection: sa.Connection) -> tuple[int, int, int]:
    """How many rows, bodies and results there are."""
    columns = (operations.c.seq, operations.c.body, operations.c.result)
    found = connection.execute(sa.select(*(sa.func.count(c) for c in columns))).one()
    return tuple(found)


def test_a_live_run_keeps_what_a_replay_needs(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    with catalog._engine.begin() as connection:
        add_run(connection, state="live", seqs=23)  # recovery points at 15 and 20
        assert kept(connection) == (23, 7, 23)
        journal.expire(connection, read_before=READ_AT)
        assert kept(connection) == (23, 7, 23)  # read, but not long enough ago
        journal.expire(connection, read_before=READ_AT + 1)
        assert kept(connection) == (7, 7, 0)  # 16 to 22
        outcome = journal.outcome(connection, KEY, 20)
        assert outcome is not None and outcome.failure is not None
        assert outcome.failure.code == "result_expired"
    catalog.close()


def test_nothing_is_kept_of_a_run_that_ended_a_while_ago(tmp_path: Path) -> None:
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    with catalog._engine.begin() as connection:
        add_run(connection, state="unloaded", seqs=23)
        journal.close(connection, KEY, now=READ_AT)
        assert kept(connection) == (23, 0, 23)  # outcomes can still be asked for
        assert connection.scalar(sa.select(sa.func.count()).select_from(snapshots)) == 0
        journal.expire(connection, read_before=READ_AT + 1)
        assert kept(connection) == (0, 0, 0)
    catalog.close()
