"""The catalog in an SQLite file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from holdfast.catalog.backend import Backend
from holdfast.catalog.errors import SyncFailed
from holdfast.catalog.statements import execute_text

_WRITES = "holdfast_writes"
"""The option of a connection that writes."""
_LARGEST_IDLE_LOG = 16 << 20
"""Bytes that the write-ahead log keeps on the disk when it is empty."""

_log = logging.getLogger("holdfast.catalog")


class SQLite(Backend):
    """A file. Who may use it is up to the lock on its directory."""

    is_local = True

    @classmethod
    def at(cls, path: Path) -> SQLite:
        """The file at a path, created when it is not there."""
        return cls(
            sa.create_engine(sa.URL.create("sqlite+pysqlite", database=str(path))), str(path)
        )

    def __init__(self, engine: sa.Engine, address: str) -> None:
        super().__init__(engine, address)
        _configure(engine)

    def writer(self) -> sa.Connection:
        return self.engine.connect().execution_options(**{_WRITES: True})

    def lock_schema(self, connection: sa.Connection) -> None:
        """A connection that writes has the lock from the beginning of its transaction."""

    def take_lease(self, connection: sa.Connection) -> bool:
        return True

    def transaction_id(self, connection: sa.Connection) -> str | None:
        return None

    def outcome(self, connection: sa.Connection, transaction_id: str) -> bool | None:
        raise NotImplementedError("a commit is always answered")

    def is_lost(self, error: sa.exc.DBAPIError) -> bool:
        return False

    def is_unsynced(self, error: sa.exc.DBAPIError) -> bool:
        return _is_unsynced(error.orig)

    def advice(self, error: sa.exc.DBAPIError) -> str:
        name: str = getattr(error.orig, "sqlite_errorname", "")
        if not name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return ""
        return (
            "; it is damaged: move it away, together with its -wal and -shm files where there are "
            "any, and `holdfast doctor --repair` makes a new one with the checkpoints of the store"
        )

    def tidy_beside(self) -> None:
        """Move what is in the write-ahead log to the database, which takes some 30 ms.

        What is written meanwhile is not all of it, so that the log goes on.
        """
        try:
            with self.engine.connect() as connection:
                self.tidy(connection)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            _log.warning("the catalog's log was not moved into the database: %s", error)

    def tidy(self, connection: sa.Connection) -> None:
        """Move what is left there, so that the log starts anew.

        Not within a commit: those who wait for it need not wait for this, and SQLite keeps to
        itself that a sync failed there.
        """
        driver = connection.connection.driver_connection
        assert driver is not None
        try:
            driver.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except driver.Error as error:  # also that the file is damaged
            if _is_unsynced(error):
                raise SyncFailed(str(error)) from error
            _log.warning("the catalog's log was not moved into the database: %s", error)


def _is_unsynced(error: BaseException | None) -> bool:
    name: str = getattr(error, "sqlite_errorname", "")
    return name.endswith("_FSYNC")


def _configure(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        # The driver must not begin transactions by itself: savepoints would break.
        connection.isolation_level = None
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "busy_timeout=5000",
            "wal_autocheckpoint=0",
            f"journal_size_limit={_LARGEST_IDLE_LOG}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A writer waits for the lock here. A transaction that has read before it writes cannot
        # wait: it fails if another process has written in between.
        writes = connection.get_execution_options().get(_WRITES)
        execute_text(connection, "BEGIN IMMEDIATE" if writes else "BEGIN").close()
