"""What is kept of operations, and for how long: neither grows with the number of runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog
from holdfast.catalog.tables import contents, operations, runs, snapshots
from holdfast.runs import journal, retention
from holdfast.runs.journal import Outcome, RunKey
from holdfast.runs.order import Entry, State
from holdfast.runs.segments import Segments

KEY = RunKey("session:train:0")
READ_AT = 100.0


def add_run(
    connection: sa.Connection,
    segments: Segments,
    *,
    state: str,
    seqs: int,
    result: bytes = b"result",
) -> None:
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
        journal.add(connection, segments, KEY, entry, now=1.0, body=b"body")
        outcome = Outcome("forward_backward", result=result)
        journal.settle(connection, segments, KEY, seq, outcome, now=2.0)
        if seq % 5 == 0:
            journal.add_snapshot(connection, KEY, seq, f"{seq:064x}", now=3.0)
    journal.mark_read(connection, KEY, range(seqs), now=READ_AT)


def kept(connection: sa.Connection) -> tuple[int, int, int]:
    """How many rows, bodies and results there are."""
    rows = connection.scalar(sa.select(sa.func.count()).select_from(operations)) or 0
    parts = connection.scalars(sa.select(contents.c.part)).all()
    return rows, parts.count("body"), parts.count("result")


def test_a_live_run_keeps_what_a_replay_needs(catalog: Catalog, tmp_path: Path) -> None:
    segments = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection, segments, state="live", seqs=23)  # recovery points at 15 and 20
        assert kept(connection) == (23, 7, 23)
        retention.expire(connection, read_before=READ_AT)
        assert kept(connection) == (23, 7, 23)  # read, but not long enough ago
        retention.expire(connection, read_before=READ_AT + 1)
        assert kept(connection) == (7, 7, 0)  # 16 to 22
        outcome = journal.outcome(connection, segments, KEY, 20)
        assert outcome is not None and outcome.failure is not None
        assert outcome.failure.code == "result_expired"


def test_nothing_is_kept_of_a_run_that_ended_a_while_ago(catalog: Catalog, tmp_path: Path) -> None:
    segments = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection, segments, state="unloaded", seqs=23)
        journal.close(connection, KEY, now=READ_AT)
        assert kept(connection) == (23, 0, 23)  # outcomes can still be asked for
        assert connection.scalar(sa.select(sa.func.count()).select_from(snapshots)) == 0
        retention.expire(connection, read_before=READ_AT + 1)
        assert kept(connection) == (0, 0, 0)


def test_a_run_keeps_so_many_bytes_of_results_that_were_read(
    catalog: Catalog, tmp_path: Path
) -> None:
    segments = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection, segments, state="live", seqs=8, result=b"r" * 100)
        unread = Entry(8, "forward_backward", "hash", State.ACCEPTED)
        journal.add(connection, segments, KEY, unread, now=1.0, body=b"body")
        outcome = Outcome("forward_backward", result=b"r" * 1000)
        journal.settle(connection, segments, KEY, 8, outcome, now=2.0)
        journal.mark_read(connection, KEY, range(4, 8), now=READ_AT)
        retention.expire(connection, read_before=READ_AT, read_size=300)
        found = [journal.outcome(connection, segments, KEY, seq) for seq in range(9)]
        results = [None if one is None else len(one.result or b"") for one in found]
        assert results == [0, 0, 0, 0, 0, 100, 100, 100, 1000]  # the oldest went, no unread one
        assert found[4] is not None and found[4].failure is not None
        assert found[4].failure.code == "result_expired"
        retention.expire(connection, read_before=READ_AT, read_size=299)
        outcome_of_5 = journal.outcome(connection, segments, KEY, 5)
        assert outcome_of_5 is not None and outcome_of_5.failure is not None


def test_skipped_numbers_are_kept_for_a_day_and_those_that_go_are_told(
    catalog: Catalog, tmp_path: Path
) -> None:
    segments = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection, segments, state="live", seqs=0)
        for seq in range(21):
            skipped = State.SKIPPED if seq % 5 == 1 else State.FAILED
            entry = Entry(seq, "missing", None, skipped)
            journal.add(connection, segments, KEY, entry, now=1.0)
            if seq % 5 == 0:
                journal.add_snapshot(connection, KEY, seq, f"{seq:064x}", now=3.0)
        assert retention.expire(connection, read_before=retention.SKIPPED_KEPT) == []
        assert kept(connection)[0] == 5 + 3  # behind the recovery point at 15, the skipped ones
        gone = retention.expire(connection, read_before=retention.SKIPPED_KEPT + 2.0)
        assert sorted(gone) == [(KEY.id, 0, seq) for seq in (1, 6, 11)]
        assert kept(connection)[0] == 5


def scans(catalog: Catalog, work: Callable[[sa.Connection], object]) -> list[str]:
    """How the statements of `work` look for operations other than by an index's key."""
    plans: list[str] = []

    def plan(
        _c: sa.Connection, cursor: Any, statement: str, parameters: Any, _x: Any, many: bool
    ) -> None:
        if not statement.startswith(("SELECT", "UPDATE", "DELETE")):
            return
        given = parameters[0] if many else parameters
        found = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", given).fetchall()
        plans.extend(row[3] for row in found)

    with catalog._engine.begin() as connection:
        sa.event.listen(connection, "before_cursor_execute", plan)
        work(connection)
    assert any("operations" in step for step in plans)
    return [step for step in plans if step.startswith("SCAN operations")]


@pytest.mark.parametrize("dropped", [None, "ix_operations_read", "ix_operations_never_shown"])
def test_what_may_go_is_found_without_reading_the_whole_journal(
    tmp_path: Path, dropped: str | None
) -> None:
    """The writer looks for it every half minute, and others wait for the writer."""
    catalog = Catalog.open_file(tmp_path / "catalog.db")
    segments = Segments(tmp_path / "segments")
    with catalog._engine.begin() as connection:
        add_run(connection, segments, state="live", seqs=23)
    expire = partial(retention.expire, read_before=READ_AT + 1, read_size=0)
    close = partial(journal.close_session, session_id="session", now=1.0)
    mark = partial(journal.mark_read, key=KEY, seqs=[1, 2], now=1.0)
    only_sums = "SCAN operations USING COVERING INDEX ix_operations_read_results"
    if dropped is not None:
        with catalog._engine.begin() as connection:
            connection.exec_driver_sql(f"DROP INDEX {dropped}")
    assert (scans(catalog, expire) == [only_sums]) == (dropped is None)
    assert scans(catalog, close) == scans(catalog, mark) == []
    catalog.close()
