"""Operations that kill their worker, or the server with it: they fail, and the run goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from holdfast.runs import bodies, journal
from holdfast.runs.journal import Failure
from holdfast.runs.order import Entry
from holdfast.runs.run import Run

MOST_DEATHS = 3
"""Deaths of the worker while the same operation ran, after which the operation fails."""
MOST_BEGUN_AGAIN = 5
"""Starts of a server that began the same operation as their first of the run, and then ended: after
so many it fails. More than deaths of a worker, since a server may end for many another reason."""
_QUARANTINED_AFTER = 2
"""Such starts after which only one operation of that kind is executed at a time."""


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


# --- Ends of the server -----------------------------------------------------------------------
#
# An operation may take the whole server with it, for example where a container that runs out of
# memory is killed as one. Nobody is left then to count that; so those that may have been under way
# are counted when they are begun again.


def suspect(entries: Iterable[Entry]) -> None:
    """A server has started: of a run's `entries`, ascending, which may have ended the last one.

    Saves are written beside what follows them.
    """
    for entry in entries:
        if not entry.state.settled:
            entry.suspect = True
            if entry.kind not in bodies.SAVES:
                break


@asynccontextmanager
async def begun_again(run: Run, entry: Entry) -> AsyncIterator[Failure | None]:
    """Around the execution of an operation; its failure if it has ended the server too often.

    Once that is likely, such operations are executed one at a time: then it is only counted for
    the one that does it.
    """
    if entry.begun_again < _QUARANTINED_AFTER:
        yield await _count(run, entry)
    else:
        async with run.services.quarantine:
            yield await _count(run, entry)


async def _count(run: Run, entry: Entry) -> Failure | None:
    if not entry.suspect:
        return None
    if entry.begun_again >= MOST_BEGUN_AGAIN:
        run.log.error("operation ends the server", seq=entry.seq, kind=entry.kind)
        return Failure(
            "operation_kills_server",
            f"the server ended {entry.begun_again} times while it executed this {entry.kind}; the "
            "run goes on from before it",
            "server",
        )
    entry.begun_again = await run.patiently(
        lambda: run.services.catalog.write(
            lambda c: journal.count_begun_again(c, run.key, entry.seq)
        )
    )
    entry.suspect = False
    return None
