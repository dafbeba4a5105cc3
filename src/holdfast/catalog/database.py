"""Opening the catalog, and its one writer thread with group commit."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, Self, TypeVar

import sqlalchemy as sa

from holdfast import failpoints
from holdfast.catalog import epoch
from holdfast.catalog.epoch import EpochLost
from holdfast.catalog.migrations import upgrade
from holdfast.catalog.statements import execute_text

T = TypeVar("T")

SYNC_FAILED = 74
"""The exit status of a process whose disk failed to sync: EX_IOERR of sysexits.h."""
TAKEN_OVER = 75
"""That of a server whose place another one has taken: EX_TEMPFAIL, since it is no error."""

_MOST_IN_ONE_COMMIT = 256
_WRITES_BETWEEN_CHECKPOINTS = 256
"""After so many the write-ahead log is moved into the database as soon as nobody writes."""
_MOST_BETWEEN_CHECKPOINTS = 1024
"""After so many in any case: eight clients at once then wait for it less than once in a hundred."""
_GAP = 0.02
"""Seconds without a write in which there is time for that: it takes some milliseconds."""
_WRITES = "holdfast_writes"
"""The option of the connection that writes."""
_LARGEST_IDLE_LOG = 16 << 20
"""Bytes that the write-ahead log keeps on the disk when it is empty."""

_log = logging.getLogger("holdfast.catalog")


class CatalogUnavailable(Exception):
    """The database did not take a write (locked, disk full), of which nothing was stored.

    Or it cannot be read now (no file descriptor or connection is free, the disk does not answer).
    """


class SyncFailed(Exception):
    """What was written last may be lost, though this process can still read it.

    A second sync may succeed without having written it, so the process ends. The next one sees
    what is really there.
    """


class Catalog:
    """The SQL database, opened and migrated.

    Writes run in one thread; those that are waiting together share one transaction, hence one
    fsync, and each is undone alone if it raises. A write is durable when it returns. It may be
    called again before that: it does nothing but read and write the database.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._before_commit: list[Callable[[], None]] = []
        self._epoch: int | None = None
        self._since_checkpoint = 0
        self._waiting: deque[_Work[Any]] = deque()
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """For the writer: True when something waits, False at the end."""
        self._is_called = False
        self._thread = threading.Thread(target=self._run, name="catalog-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the database at an SQLAlchemy `url` and bring its tables up to date.

        Raises CatalogUnavailable when it cannot be opened.
        """
        engine = sa.create_engine(url)
        if engine.dialect.name == "sqlite":
            _configure_sqlite(engine)
        try:
            upgrade(engine)
        except sa.exc.DBAPIError as error:
            engine.dispose()
            raise CatalogUnavailable(f"cannot open the catalog {url}: {error.orig}") from error
        return cls(engine)

    @classmethod
    def open_file(cls, path: Path) -> Self:
        """Open (or create) an SQLite file."""
        return cls.open(f"sqlite+pysqlite:///{path}")

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in a transaction and return its result once that is durable.

        Cancelling the caller does not take the write back.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.append(_Work(work, loop, future))
        # Not at once: what this turn of the loop brings besides shares the commit.
        loop.call_soon(self._call_writer)
        return await future

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` on a connection of its own, in a thread.

        Raises CatalogUnavailable when it cannot be read now.
        """
        return await asyncio.to_thread(self.read_now, work)

    def read_now(self, work: Callable[[sa.Connection], T]) -> T:
        """`read` for callers without an event loop."""
        try:
            with self._engine.connect() as connection:
                return work(connection)
        except (sa.exc.OperationalError, sa.exc.TimeoutError, OSError) as error:
            raise CatalogUnavailable(f"the catalog cannot be read: {error}") from error

    def before_commit(self, call: Callable[[], None]) -> None:
        """Have the writer call this before each commit: what a row refers to is durable first.

        All it may raise is SyncFailed, which ends the process.
        """
        self._before_commit.append(call)

    async def claim(self, holder: str) -> int:
        """Take the catalog for a server, described by `holder`; the epoch that it begins.

        From then on every write of this object is made only as long as no other server has done
        the same: the process ends with TAKEN_OVER otherwise, and what it was about to commit is
        not stored.
        """
        assert self._epoch is None, "claimed already"
        self._epoch = await self.write(lambda c: epoch.begin(c, holder))
        return self._epoch

    def verify_epoch(self) -> None:
        """End the process if another server has taken the catalog over since it was claimed.

        Before a change anywhere else than in the catalog. Raises CatalogUnavailable.
        """
        if self._epoch is None:
            return
        found = self.read_now(epoch.current)
        if found.number != self._epoch:
            _end_taken_over(epoch.lost(found, self._epoch))

    def close(self) -> None:
        """Finish what is queued and close. Idempotent."""
        if self._thread.is_alive():
            self._calls.put(False)
            self._thread.join()
        self._engine.dispose()

    def _call_writer(self) -> None:
        if not self._is_called:
            self._is_called = True
            self._calls.put(True)

    def _run(self) -> None:
        with self._writer_connection() as connection:
            goes_on = True
            while goes_on:
                goes_on = self._next_call(connection)
                self._is_called = False  # before it counts: what comes later calls again
                waiting = len(self._waiting)
                while waiting:
                    size = min(waiting, _MOST_IN_ONE_COMMIT)
                    self._commit([self._waiting.popleft() for _ in range(size)], connection)
                    waiting -= size

    def _next_call(self, connection: sa.Connection) -> bool:
        """Wait until something is to be written. Meanwhile move the log, when that is due."""
        if self._since_checkpoint >= _WRITES_BETWEEN_CHECKPOINTS:
            if self._since_checkpoint < _MOST_BETWEEN_CHECKPOINTS:
                with suppress(queue.Empty):
                    return self._calls.get(timeout=_GAP)
            self._since_checkpoint = 0
            _checkpoint(connection)
        return self._calls.get()

    def _writer_connection(self) -> sa.Connection:
        return self._engine.connect().execution_options(**{_WRITES: True})

    def _commit(self, batch: list[_Work[Any]], connection: sa.Connection) -> None:
        """Perform and commit, then tell those who wait."""
        try:
            try:
                self._transact(connection, batch, _perform)
            except (sa.exc.OperationalError, SyncFailed, EpochLost):
                raise
            except Exception:
                self._transact(connection, batch, _perform_each)
        except sa.exc.DBAPIError as error:
            if getattr(error.orig, "sqlite_errorname", "").endswith("_FSYNC"):
                _end_process(f"the catalog was not synced: {error.orig}")
            unavailable = CatalogUnavailable(f"the catalog took no write: {error.orig}")
            for item in batch:
                item.error = unavailable
        except SyncFailed as error:
            _end_process(f"the journal was not synced: {error}")
        except EpochLost as error:
            _end_taken_over(error)
        except Exception as error:  # a defect: nobody waits for ever because of it
            _log.exception("the catalog's writer failed")
            for item in batch:
                item.error = error
        _tell(batch)
        self._since_checkpoint += len(batch)

    def _transact(
        self,
        connection: sa.Connection,
        batch: list[_Work[Any]],
        perform: Callable[[sa.Connection, _Work[Any]], None],
    ) -> None:
        with connection.begin():
            if self._epoch is not None:
                epoch.check(connection, self._epoch)
            for item in batch:
                perform(connection, item)
            for call in self._before_commit:
                call()
            failpoints.reach("commit.before")
        failpoints.reach("commit.after")


@dataclass(slots=True)
class _Work(Generic[T]):
    call: Callable[[sa.Connection], T]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[T]
    result: T | None = None
    error: Exception | None = None

    def resolve(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)  # type: ignore[arg-type]


def _perform(connection: sa.Connection, item: _Work[Any]) -> None:
    item.result = item.call(connection)


def _perform_each(connection: sa.Connection, item: _Work[Any]) -> None:
    """With a savepoint, which costs more than most writes: only where one of a batch raises."""
    try:
        with connection.begin_nested():
            item.result = item.call(connection)
    except sa.exc.OperationalError:
        raise
    except Exception as error:
        item.error = error


def _tell(batch: list[_Work[Any]]) -> None:
    loops: dict[asyncio.AbstractEventLoop, list[_Work[Any]]] = {}
    for item in batch:
        loops.setdefault(item.loop, []).append(item)
    for loop, items in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, items)
        except RuntimeError:  # that loop is closed, and nobody waits
            pass


def _resolve(items: list[_Work[Any]]) -> None:
    for item in items:
        item.resolve()


def _configure_sqlite(engine: sa.Engine) -> None:
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


def _checkpoint(connection: sa.Connection) -> None:
    """Move what is in SQLite's write-ahead log to the database, so that the log starts anew.

    Not within a commit: those who wait for it need not wait for this, and SQLite keeps to itself
    that a sync failed there. Nor in a thread of its own: what is written meanwhile keeps the log
    from starting anew, so that under load it would grow for ever.
    """
    if connection.dialect.name != "sqlite":
        return
    driver = connection.connection.driver_connection
    assert driver is not None
    try:
        driver.execute("PRAGMA wal_checkpoint(PASSIVE)")
    except driver.OperationalError as error:
        if error.sqlite_errorname.endswith("_FSYNC"):
            _end_process(f"the catalog was not synced: {error}")
        _log.warning("the catalog's log was not moved into the database: %s", error)


def _end_taken_over(error: EpochLost) -> NoReturn:
    _log.critical("%s; nothing more of what this server does is kept, and it ends", error)
    os._exit(TAKEN_OVER)


def _end_process(message: str) -> NoReturn:
    _log.critical("%s; this process ends, and the next one recovers what there is", message)
    os._exit(SYNC_FAILED)
