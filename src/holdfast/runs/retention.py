"""What the journal keeps, and for how long: neither grows with the length or the number of runs."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from holdfast.catalog.tables import operations, runs, snapshots
from holdfast.runs.contents import Address, remove
from holdfast.runs.order import State

SKIPPED_KEPT = 24 * 3600.0
"""Seconds for which a number that was skipped is remembered: far longer than clients try."""
MOST_READ = 256 << 20
"""Bytes of results that a run keeps after they were handed out."""

# Each of these looks at what may go alone, by an index of its own (see `holdfast.catalog.tables`):
# the writer does this every half minute, and whoever submits meanwhile waits for it.
_BEFORE = sa.bindparam("read_before", type_=sa.Float)
_WAS_READ = operations.c.read.is_not(None) & operations.c.result_size.is_not(None)
_ADDRESS = (operations.c.run_id, operations.c.generation, operations.c.seq)
_READ_LONG_AGO = sa.select(*_ADDRESS).where(_WAS_READ & (operations.c.read < _BEFORE))
_READ_TOO_MUCH = (
    sa.select(operations.c.run_id, operations.c.generation)
    .where(_WAS_READ)
    .group_by(operations.c.run_id, operations.c.generation)
    .having(sa.func.sum(operations.c.result_size) > sa.bindparam("read_size"))
)
_NEWEST_FIRST = (
    sa.select(*_ADDRESS, operations.c.result_size)
    .where(_WAS_READ)
    .where(operations.c.run_id == sa.bindparam("run"))
    .where(operations.c.generation == sa.bindparam("life"))
    .order_by(operations.c.read.desc(), operations.c.seq.desc())
)
_FORGET_RESULT = (
    operations.update()
    .where(operations.c.run_id == sa.bindparam("run"))
    .where(operations.c.generation == sa.bindparam("life"))
    .where(operations.c.seq == sa.bindparam("number"))
    .values(result_size=None)
)
_FLOOR = sa.func.min(snapshots.c.seq)
"""The older of a run's two recovery points: no replay goes back to what is before it."""
_BEHIND = (
    sa.select(snapshots.c.run_id)
    .where(snapshots.c.run_id == operations.c.run_id)
    .where(snapshots.c.generation == operations.c.generation)
    .group_by(snapshots.c.run_id, snapshots.c.generation)
    .having(sa.func.count() >= 2)
    .having(operations.c.seq <= _FLOOR)
    .having(operations.c.mark_at.is_(None) | (operations.c.mark_at < _FLOOR))
    .exists()
)
_OF_ENDED = sa.exists().where(
    (runs.c.id == operations.c.run_id)
    & (runs.c.generation == operations.c.generation)
    & (runs.c.state.not_in(("live", "lost")))
)
_REMOVE_READ = operations.delete().where((operations.c.read < _BEFORE) & (_BEHIND | _OF_ENDED))
_REMOVE_NEVER_SHOWN = (
    operations.delete()
    .where(
        operations.c.body_hash.is_(None)
        & (operations.c.settled < _BEFORE)
        & (
            (operations.c.state != State.SKIPPED.value)
            | (operations.c.settled < sa.bindparam("skipped_before"))
        )
        & (_BEHIND | _OF_ENDED)
    )
    .returning(*_ADDRESS, operations.c.state)
)


def expire(
    connection: Connection, *, read_before: float, read_size: int = MOST_READ
) -> list[Address]:
    """Remove what nobody needs any more; the skipped numbers of which nothing is known from now on.

    Results that were handed out before that time of the `ServingClock` go, and the oldest of those
    that take more than `read_size` bytes of one run. So do whole rows, once no replay goes back to
    them: those whose outcome was handed out, and numbers that never had a future. Skipped ones stay
    longer, since what comes late must be known as late.
    """
    before = {"read_before": read_before}
    results = {Address(*row) for row in connection.execute(_READ_LONG_AGO, before)}
    for run, life in connection.execute(_READ_TOO_MUCH, {"read_size": read_size}).all():
        newer = 0
        for *address, size in connection.execute(_NEWEST_FIRST, {"run": run, "life": life}):
            newer += size
            if newer > read_size:
                results.add(Address(*address))
    if results:
        remove(connection, results, "result")
        connection.execute(
            _FORGET_RESULT, [{"run": r, "life": g, "number": n} for r, g, n in results]
        )
    connection.execute(_REMOVE_READ, before)
    skipped_before = {"skipped_before": read_before - SKIPPED_KEPT}
    never_shown = connection.execute(_REMOVE_NEVER_SHOWN, {**before, **skipped_before}).all()
    return [Address(*at) for *at, state in never_shown if state == State.SKIPPED.value]
