"""Whose catalog it is: a number that each start of a server raises, and who raised it.

So does who has it to itself for another reason, to repair it or to change its tables.

A server that was suspended, or cut off, may come back when another one has taken its place. What it
still has in hand must change nothing: each of its transactions reads the number first, and goes on
only if that is the one that it raised itself. The number cannot change between that and the commit:
on SQLite the transaction has the database's write lock by then, on PostgreSQL it locks the row.

Whoever writes beside a server (keys, imports) has raised nothing and is not asked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa

from holdfast.catalog.errors import EpochLost
from holdfast.catalog.statements import Statement
from holdfast.catalog.tables import epoch

_READ = sa.select(epoch.c.number, epoch.c.holder, epoch.c.raised)
_LOCK = Statement(sa.select(epoch.c.number).with_for_update(read=True))


@dataclass(frozen=True, slots=True)
class Epoch:
    """Who took the catalog last."""

    number: int
    holder: str | None
    """Which process of which machine it was; None before the first one."""
    raised: float | None
    """When that was, in UTC seconds."""

    @property
    def who(self) -> str:
        """The holder and since when, in words."""
        if self.holder is None or self.raised is None:
            return "not known"
        return f"{self.holder}, since {time.strftime('%FT%TZ', time.gmtime(self.raised))}"


def current(connection: sa.Connection) -> Epoch:
    """The epoch as it is now."""
    return Epoch(*connection.execute(_READ).one())


def begin(connection: sa.Connection, holder: str) -> int:
    """Begin the next epoch; its number."""
    values = {"number": epoch.c.number + 1, "holder": holder, "raised": time.time()}
    connection.execute(epoch.update().values(values))
    return current(connection).number


def check(connection: sa.Connection, mine: int) -> None:
    """Raises EpochLost unless the epoch is `mine`, and will be until this transaction ends."""
    if _LOCK.scalar(connection) != mine:
        raise lost(current(connection), mine)


def lost(found: Epoch, mine: int) -> EpochLost:
    """The error that says who has taken over, and when."""
    return EpochLost(
        f"this catalog has been taken over by {found.who}: "
        f"the epoch is {found.number}, and {mine} was this server's"
    )
