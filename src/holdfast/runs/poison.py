"""Operations that kill their worker: after some deaths the operation fails, and the run goes on."""

from __future__ import annotations

from holdfast.runs import journal
from holdfast.runs.journal import Failure
from holdfast.runs.order import Entry
from holdfast.runs.run import Run

MOST_DEATHS = 3
"""Deaths of the worker while the same operation ran, after which the operation fails."""


def is_last(entry: Entry) -> bool:
    """Whether one more death fails the operation: it is then executed alone on its worker."""
    return not entry.state.settled and entry.attempts >= MOST_DEATHS - 1


async def count_death(run: Run, entry: Entry) -> Failure | None:
    """Count, durably, a death while the operation ran; its failure once there were too many."""
    attempts = await run.patiently(
        lambda: run.services.catalog.write(lambda c: journal.count_attempt(c, run.key, entry.seq))
    )
    entry.attempts = attempts
    run.log.error("worker died", seq=entry.seq, kind=entry.kind, attempts=attempts)
    if attempts < MOST_DEATHS:
        return None
    return Failure(
        "operation_kills_worker",
        f"the worker died {attempts} times while it executed this {entry.kind}; the run goes on "
        "from before it",
        "server",
    )
