"""Operations that kill their worker, or the server with it: they fail, and the run goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from sqlalchemy import Connection

from holdfast.runs import bodies, journal
from holdfast.runs.gate import QUARANTINED_AFTER
from holdfast.runs.journal import Failure
from holdfast.runs.order import Entry
from holdfast.runs.run import Run

MOST_DEATHS = 3
"""Deaths of the worker while the same operation ran, after which the operation fails."""
MOST_BEGUN_AGAIN = 5
"""Starts of a server that began the same operation as their first of the run, and then ended: after
so many it fails. More than deaths of a worker, since a server may end for many another reason."""


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


class EndsServer(Exception):
    """An operation must not be begun once more: too many servers ended while they executed it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@asynccontextmanager
async def executing(run: Run, entry: Entry) -> AsyncIterator[None]:
    """Around an operation, once its turn on a worker has come.

    One that has ended two servers or more is executed while no other operation is, and the next
    one when its outcome is durable: then only the one that does it is counted. Raises EndsServer
    for one that must not be begun once more.
    """
    gate = run.services.gate
    async with gate.alone() if is_quarantined(entry) else gate.among_others():
        if entry.suspect:
            await _begin(run, entry)
        yield


def is_quarantined(entry: Entry) -> bool:
    """Whether it is executed while no other operation is."""
    return not entry.state.settled and entry.begun_again >= QUARANTINED_AFTER


async def _begin(run: Run, entry: Entry) -> None:
    if entry.begun_again >= MOST_BEGUN_AGAIN:
        run.log.error("operation ends the server", seq=entry.seq, kind=entry.kind)
        raise EndsServer(
            Failure(
                "operation_kills_server",
                f"the server ended {entry.begun_again} times while it executed this {entry.kind}; "
                "the run goes on from before it",
                "server",
            )
        )
    entry.begun_again = await _count(run, entry, 1)
    entry.suspect = False


async def left(run: Run, entry: Entry) -> None:
    """The server stops in good order in the middle of an operation: that is none of its deaths."""
    if entry.begun_again and not entry.suspect and not entry.state.settled:
        entry.begun_again = await _count(run, entry, -1)
        entry.suspect = True


async def _count(run: Run, entry: Entry, by: int) -> int:
    def count(connection: Connection) -> int:
        return journal.count_begun_again(connection, run.key, entry.seq, by)

    return await run.patiently(lambda: run.services.catalog.write(count))
