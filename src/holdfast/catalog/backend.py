"""What the catalog asks of a database beyond SQL."""

from __future__ import annotations

from abc import ABC, abstractmethod

import sqlalchemy as sa


class Backend(ABC):
    """One database, and what is particular to its kind."""

    is_local: bool
    """Whether it is a file of this machine, so that other files may belong to it."""

    def __init__(self, engine: sa.Engine, address: str) -> None:
        self.engine = engine
        """For reading."""
        self.address = address
        """To be shown: without a password."""

    @abstractmethod
    def writer(self) -> sa.Connection:
        """A new connection to write by, which belongs to one thread."""

    @abstractmethod
    def lock_schema(self, connection: sa.Connection) -> None:
        """Let nobody else change the schema before this transaction ends. Raises CatalogInUse."""

    @abstractmethod
    def take_lease(self, connection: sa.Connection) -> bool:
        """Have the database to oneself for as long as this connection lives, if nobody else has."""

    @abstractmethod
    def transaction_id(self, connection: sa.Connection) -> str | None:
        """By what to ask for the outcome of this transaction if its commit is not answered."""

    @abstractmethod
    def outcome(self, connection: sa.Connection, transaction_id: str) -> bool | None:
        """Whether a transaction was committed; None while it is under way."""

    def is_unavailable(self, error: sa.exc.DBAPIError) -> bool:
        """Whether the database has failed, not what it was asked: the same may work later."""
        return isinstance(error, (sa.exc.OperationalError, sa.exc.InternalError))

    def may_be_one_alone(self, error: sa.exc.DBAPIError) -> bool:
        """Whether other writes may work now, though for this one the database is not available."""
        return False

    @abstractmethod
    def is_lost(self, error: sa.exc.DBAPIError) -> bool:
        """Whether the connection has ended, and another one may do."""

    @abstractmethod
    def is_unsynced(self, error: sa.exc.DBAPIError) -> bool:
        """Whether it is not known any more what of the last commits is on the disk."""

    def advice(self, error: sa.exc.DBAPIError) -> str:
        """What to do about a database that cannot be opened, if that is known."""
        return ""

    @abstractmethod
    def tidy_beside(self) -> None:
        """What is to be done after some hundred writes, while others go on. Raises SyncFailed."""

    @abstractmethod
    def tidy(self, connection: sa.Connection) -> None:
        """What those have left of it, once the connection that writes does not. Raises
        SyncFailed."""
