"""Opening the catalog, and its one writer thread with group commit."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import sqlalchemy as sa

from holdfast import failpoints
from holdfast.catalog.migrations import upgrade

T = TypeVar("T")

_MOST_IN_ONE_COMMIT = 256


class CatalogUnavailable(Exception):
    """The database did not take a write (locked, disk full); nothing of it was stored."""


class Catalog:
    """The SQL database, opened and migrated.

    Writes run in one thread; those that are waiting together share one transaction, hence one
    fsync, and each is undone alone if it raises. A write is durable when it returns. It may be
    called again before that: it does nothing but read and write the database.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[_Work[Any] | None] = queue.SimpleQueue()
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
        self._queue.put(_Work(work, loop, future))
        return await future

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` on a connection of its own, in a thread."""
        return await asyncio.to_thread(self.read_now, work)

    def read_now(self, work: Callable[[sa.Connection], T]) -> T:
        """`read` for callers without an event loop."""
        with self._engine.connect() as connection:
            return work(connection)

    def close(self) -> None:
        """Finish what is queued and close. Idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._engine.dispose()

    def _run(self) -> None:
        with self._engine.connect() as connection:
            while True:
                batch = [self._queue.get()]
                while len(batch) < _MOST_IN_ONE_COMMIT:
                    try:
                        batch.append(self._queue.get_nowait())
                    except queue.Empty:
                        break
                _commit(connection, [item for item in batch if item is not None])
                if None in batch:
                    return


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


def _commit(connection: sa.Connection, batch: list[_Work[Any]]) -> None:
    if not batch:
        return
    try:
        try:
            _transact(connection, batch, _perform)
        except sa.exc.OperationalError:
            raise
        except Exception:
            _transact(connection, batch, _perform_each)
    except sa.exc.DBAPIError as error:
        for item in batch:
            item.error = CatalogUnavailable(f"the catalog took no write: {error.orig}")
    _tell(batch)


_Performing = Callable[[sa.Connection, "_Work[Any]"], None]


def _transact(connection: sa.Connection, batch: list[_Work[Any]], perform: _Performing) -> None:
    with connection.begin():
        for item in batch:
            perform(connection, item)
        failpoints.reach("commit.before")
    failpoints.reach("commit.after")


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
        ):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")
