"""Opening the catalog, and its one writer thread with group commit."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, Self, TypeVar

import sqlalchemy as sa

from holdfast import failpoints
from holdfast.catalog import deadline, epoch
from holdfast.catalog.backend import Backend
from holdfast.catalog.beside import Beside
from holdfast.catalog.errors import CatalogInUse, CatalogUnavailable, EpochLost, SyncFailed
from holdfast.catalog.migrations import upgrade
from holdfast.catalog.postgresql import PostgreSQL
from holdfast.catalog.sqlite import SQLite
from holdfast.threads import Threads

T = TypeVar("T")

SYNC_FAILED = 74
"""The exit status of a process that cannot know what of its last write is durable: EX_IOERR of
sysexits.h."""
TAKEN_OVER = 75
"""That of a server whose place another one, or a repair, has taken: EX_TEMPFAIL, since it is no
error."""

READ_TAKES = 60.0
"""Seconds after which a read is given up: the database may hang with its connections open."""
WRITE_TAKES = 30.0
"""Seconds after which a transaction is given up, with the connection that has not answered."""
WRITE_WAITS = 30.0
"""Seconds for which a write waits, about, for those before it."""
LEASE_WAITS = 5.0
"""Seconds for which a lease is waited for: that of a server that was killed just now ends soon."""
IN_DOUBT = 60.0
"""Seconds within which it must be found out what became of a commit that was not answered."""

_READERS = 8
"""Reads at a time: fewer than the connections that a pool gives, which others take, too."""
_MOST_IN_ONE_COMMIT = 256
_WRITES_BETWEEN_TIDYING = 128
_PAUSE = 0.2
_LOOKS = 20
"""Times in `WRITE_WAITS` that is looked for writes that have waited so long."""

_log = logging.getLogger("holdfast.catalog")


class Catalog:
    """The SQL database, opened and migrated.

    Writes run in one thread; those that are waiting together share one transaction, hence one
    fsync, and each is undone alone if it raises. A write is durable when it returns. It may be
    called again before that: it does nothing but read and write the database.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._engine = backend.engine
        self._before_commit: list[Callable[[], None]] = []
        self._epoch: int | None = None
        self._leased = False
        self._connection: sa.Connection | None = None
        self._since_tidied = 0
        self._waiting: deque[_Work[Any]] = deque()
        self._taking = threading.Lock()
        """Held while writes leave those that wait: to the writer, or given up."""
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """For the writer: True when something waits, False at the end."""
        self._is_called = False
        self._watching: set[asyncio.AbstractEventLoop] = set()
        """Loops with a timer that looks after the writes that wait: one for all of them."""
        self._readers = Threads("catalog-reader", _READERS)
        self._tidying = Beside("catalog-tidier", self._tidy_beside, lambda: self._calls.put(True))
        self._thread = threading.Thread(target=self._run, name="catalog-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, address: str, *, create: bool = True) -> Self:
        """Open a PostgreSQL database, postgresql://USER:PASSWORD@HOST/DATABASE, and bring its
        tables up to date; where there are none, only if told to `create` them.

        Raises CatalogUnavailable, or CannotOpen for what waiting does not help.
        """
        return cls._open(PostgreSQL.at(address), create=create)

    @classmethod
    def open_file(cls, path: Path) -> Self:
        """Open (or create) an SQLite file, and bring its tables up to date.

        Raises CatalogUnavailable, or CannotOpen for what waiting does not help.
        """
        return cls._open(SQLite.at(path))

    @classmethod
    def _open(cls, backend: Backend, *, create: bool = True) -> Self:
        try:
            upgrade(backend, create=create)
        except sa.exc.DBAPIError as error:
            backend.engine.dispose()
            reason = _in_one_line(error)
            raise CatalogUnavailable(
                f"cannot open the catalog {backend.address}: {reason}{backend.advice(error)}"
            ) from error
        except BaseException:
            backend.engine.dispose()
            raise
        return cls(backend)

    @property
    def address(self) -> str:
        """Where it is, to be shown: without a password."""
        return self._backend.address

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine, so that other files may belong to it."""
        return self._backend.is_local

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in a transaction and return its result once that is durable.

        Cancelling the caller does not take the write back. Raises CatalogUnavailable when nothing
        was stored and the same may work later.
        """
        return await self.begin_write(work)

    def begin_write(
        self,
        work: Callable[[sa.Connection], T],
        ended: Callable[[Exception | None], object] | None = None,
    ) -> asyncio.Future[T]:
        """`write`, for a caller with something to do at its end: also when nobody waits any more.

        `ended` is told the error, or None, before whoever waits for the future goes on.
        """
        loop = asyncio.get_running_loop()
        item = _Work(work, ended, loop, loop.create_future(), loop.time())
        self._waiting.append(item)
        # Not at once: what this turn of the loop brings besides shares the commit.
        loop.call_soon(self._call_writer)
        if loop not in self._watching:
            self._watch(loop)
        return item.future

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` on a connection of its own, in a thread.

        Raises CatalogUnavailable when it cannot be read now, or does not answer.
        """
        try:
            async with asyncio.timeout(READ_TAKES):
                return await self._readers.run(self.read_now, work)
        except TimeoutError:
            raise CatalogUnavailable(
                f"the catalog {self.address} has not answered for {READ_TAKES:.0f} s"
            ) from None

    def read_now(self, work: Callable[[sa.Connection], T]) -> T:
        """`read` for callers without an event loop. Repeated when its connection was lost."""
        try:
            with deadline.within(READ_TAKES):
                try:
                    return self._read(work)
                except sa.exc.DBAPIError as error:
                    if not self._backend.is_lost(error) or deadline.is_over():
                        raise
                    self._engine.dispose()  # those that wait in the pool are lost as well
                    return self._read(work)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError, OSError) as error:
            if isinstance(error, sa.exc.DBAPIError) and not self._backend.is_unavailable(error):
                raise
            raise CatalogUnavailable(
                f"the catalog cannot be read: {_in_one_line(error)}"
            ) from error

    def _read(self, work: Callable[[sa.Connection], T]) -> T:
        with self._engine.connect() as connection:
            return work(connection)

    def before_commit(self, call: Callable[[], None]) -> None:
        """Have the writer call this before each commit: what a row refers to is durable first.

        All it may raise is SyncFailed, which ends the process.
        """
        self._before_commit.append(call)

    async def claim(self, holder: str) -> int:
        """Take the catalog for a server, or for a repair, described by `holder`; the epoch that
        it begins.

        From then on every write of this object is made only as long as nobody else has done the
        same: the process ends with TAKEN_OVER otherwise, and what it was about to commit is not
        stored. Raises CatalogInUse while somebody else has it.
        """
        assert self._epoch is None, "claimed already"

        def take(connection: sa.Connection) -> int | None:
            # Noted before the commit: should its answer be lost with the connection, and hence the
            # lease, whichever connection takes its place has to have the lease too.
            self._leased = self._backend.take_lease(connection)
            return epoch.begin(connection, holder) if self._leased else None

        end = time.monotonic() + LEASE_WAITS
        while (begun := await self.write(take)) is None:
            if time.monotonic() > end:
                found = await self.read(epoch.current)
                raise CatalogInUse(
                    f"the catalog {self.address} is in use; the last one to take it was "
                    f"{found.who}: stop it, or name another --catalog"
                )
            await asyncio.sleep(_PAUSE)
        self._epoch = begun
        return begun

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
        self._tidying.close()
        self._readers.close()
        self._engine.dispose()

    def _call_writer(self) -> None:
        if not self._is_called:
            self._is_called = True
            self._calls.put(True)

    def _run(self) -> None:
        """The writer's thread, which the process does not outlive: nothing more would be stored."""
        try:
            self._write_what_comes()
        except Exception:
            _log.exception("the catalog's writer met a defect")
            _end_unsynced("the catalog's writer has ended, and what it was about is not known")

    def _write_what_comes(self) -> None:
        goes_on = True
        while goes_on:
            goes_on = self._next_call()
            self._is_called = False  # before it counts: what comes later calls again
            waiting = len(self._waiting)
            while waiting > 0 and (batch := self._next_batch(waiting)):
                with deadline.within(WRITE_TAKES):
                    self._commit(batch)
                waiting -= len(batch)
        self._disconnect()

    def _next_batch(self, waiting: int) -> list[_Work[Any]]:
        with self._taking:
            size = min(waiting, len(self._waiting), _MOST_IN_ONE_COMMIT)
            return [self._waiting.popleft() for _ in range(size)]

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watching = {other for other in self._watching if not other.is_closed()} | {loop}
        loop.call_later(WRITE_WAITS / _LOOKS, self._give_up_late_ones, loop)

    def _give_up_late_ones(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have writes whose turn has not come in time not be made at all."""
        self._watching.discard(loop)
        before = loop.time() - WRITE_WAITS
        with self._taking:
            mine = [item for item in self._waiting.copy() if item.loop is loop]
            late = [item for item in mine if item.since <= before]
            for item in late:
                self._waiting.remove(item)
        if len(late) < len(mine):
            self._watch(loop)
        for item in late:
            item.error = CatalogUnavailable(
                f"the catalog {self.address} has not come to this write for {WRITE_WAITS:.0f} s"
            )
            item.resolve()

    def _next_call(self) -> bool:
        """Wait until something is to be written. Before that have tidied what is due."""
        try:
            if self._tidying.is_done():
                self._tidy()
            elif self._since_tidied >= _WRITES_BETWEEN_TIDYING and self._tidying.start():
                self._since_tidied = 0
        except Exception:  # a defect: it is done another time, and no write depends on it
            _log.exception("the catalog was not tidied")
        return self._calls.get()

    def _tidy_beside(self) -> None:
        """What takes long of it, while others write; what they write is left, and is little."""
        with _synced():
            self._backend.tidy_beside()

    def _tidy(self) -> None:
        self._since_tidied = 0
        if self._connection is not None:
            with _synced():
                self._backend.tidy(self._connection)

    def _commit(self, batch: list[_Work[Any]]) -> None:
        """Perform and commit, then tell those who wait."""
        try:
            try:
                self._attempt(batch)
            except sa.exc.DBAPIError as error:
                if not self._backend.is_lost(error) or deadline.is_over():
                    raise
                self._disconnect()
                self._attempt(batch)  # nothing was stored
        except sa.exc.DBAPIError as error:
            if self._backend.is_unsynced(error):
                _end_unsynced(f"the catalog was not synced: {error.orig}")
            _fail(batch, _took_no_write(error))
        except CatalogUnavailable as error:
            _fail(batch, error)
        except SyncFailed as error:
            _end_unsynced(f"the journal was not synced: {error}")
        except EpochLost as error:
            _end_taken_over(error)
        except Exception as error:  # a defect: nobody waits for ever because of it
            _log.exception("the catalog's writer failed")
            _fail(batch, error)
        _tell(batch)
        self._since_tidied += len(batch)

    def _attempt(self, batch: list[_Work[Any]]) -> None:
        try:
            self._transact(self._connected(), batch, _perform)
        except (SyncFailed, EpochLost):
            raise
        except Exception as error:
            if not self._may_be_one_alone(error):
                raise
            self._transact(self._connected(), batch, self._perform_alone)

    def _may_be_one_alone(self, error: Exception) -> bool:
        """Whether one write may have failed so, and others of the same transaction would not."""
        if not isinstance(error, sa.exc.DBAPIError) or not self._backend.is_unavailable(error):
            return True
        return self._backend.may_be_one_alone(error)

    def _perform_alone(self, connection: sa.Connection, item: _Work[Any]) -> None:
        """With a savepoint, which costs more than most writes: only where one of a batch raises."""
        try:
            with connection.begin_nested():
                _perform(connection, item)
        except Exception as error:
            if not self._may_be_one_alone(error):
                raise
            item.error = error
            if isinstance(error, sa.exc.DBAPIError) and self._backend.is_unavailable(error):
                item.error = _took_no_write(error)

    def _transact(
        self,
        connection: sa.Connection,
        batch: list[_Work[Any]],
        perform: Callable[[sa.Connection, _Work[Any]], None],
    ) -> None:
        """A transaction. When it raises, nothing of it was stored."""
        transaction_id = None
        committing = False
        try:
            with connection.begin():
                if self._epoch is not None:
                    epoch.check(connection, self._epoch)
                transaction_id = self._backend.transaction_id(connection)
                for item in batch:
                    perform(connection, item)
                for call in self._before_commit:
                    call()
                failpoints.reach("commit.before")
                committing = True
        except sa.exc.DBAPIError as error:
            unanswered = committing and self._backend.is_lost(error)
            if not unanswered or transaction_id is None or not self._was_committed(transaction_id):
                raise
        failpoints.reach("commit.after")

    def _was_committed(self, transaction_id: str) -> bool:
        """What became of a commit whose answer was lost. Ends the process if nobody can tell."""
        self._disconnect()
        reason = "its transaction is not over"
        end = time.monotonic() + IN_DOUBT
        while True:
            try:
                with deadline.within(end - time.monotonic()):
                    connection = self._connected()
                    with connection.begin():
                        found = self._backend.outcome(connection, transaction_id)
                if found is not None:
                    return found
            except CatalogUnavailable as error:
                reason = str(error)
            except sa.exc.DBAPIError as error:
                reason = _in_one_line(error)
                if not self._backend.is_unavailable(error):  # another one, which does not know it
                    end = 0.0
            if time.monotonic() > end:
                _end_unsynced(
                    "the connection to the catalog was lost during a commit, and what became of "
                    f"that is not known: {reason}"
                )
            time.sleep(_PAUSE)

    def _connected(self) -> sa.Connection:
        """The connection that writes. A new one, where the last one was lost, has the lease too.

        Raises EpochLost when another server has taken over, CatalogUnavailable when the lease
        cannot be had now.
        """
        if self._connection is not None and not self._connection.invalidated:
            return self._connection
        self._disconnect()
        connection = self._backend.writer()
        try:
            with connection.begin():
                if self._epoch is not None:
                    epoch.check(connection, self._epoch)
                if self._leased and not self._backend.take_lease(connection):
                    raise CatalogUnavailable(f"the lease of {self.address} is not free yet")
        except BaseException:
            _close(connection)
            raise
        self._connection = connection
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            _close(connection)


@dataclass(slots=True, eq=False)
class _Work(Generic[T]):
    call: Callable[[sa.Connection], T]
    ended: Callable[[Exception | None], object] | None
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[T]
    since: float
    """When it began to wait, by the loop's clock."""
    result: T | None = None
    error: Exception | None = None

    def resolve(self) -> None:
        """Tell whoever waits."""
        if self.ended is not None:
            try:
                self.ended(self.error)
            except Exception as defect:  # not at the cost of the others in the transaction
                _log.exception("the end of a write met a defect")
                self.error = defect
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)  # type: ignore[arg-type]


def _perform(connection: sa.Connection, item: _Work[Any]) -> None:
    item.result, item.error = item.call(connection), None


def _tell(batch: list[_Work[Any]]) -> None:
    loops: dict[asyncio.AbstractEventLoop, list[_Work[Any]]] = {}
    for item in batch:
        loops.setdefault(item.loop, []).append(item)
    for loop, items in loops.items():
        try:
            # Not with what limits the writer: that is over by then.
            loop.call_soon_threadsafe(_resolve, items, context=contextvars.Context())
        except RuntimeError:  # that loop is closed, and nobody waits
            pass


def _resolve(items: list[_Work[Any]]) -> None:
    for item in items:
        item.resolve()


def _close(connection: sa.Connection) -> None:
    connection.invalidate()  # it may be lost: nothing more is to be sent
    connection.close()


def _fail(batch: list[_Work[Any]], error: Exception) -> None:
    for item in batch:
        item.error = error


def _took_no_write(error: sa.exc.DBAPIError) -> CatalogUnavailable:
    return CatalogUnavailable(f"the catalog took no write: {_in_one_line(error)}")


def _in_one_line(error: Exception) -> str:
    reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    return " ".join(str(reason).split())


@contextmanager
def _synced() -> Iterator[None]:
    try:
        yield
    except SyncFailed as error:
        _end_unsynced(f"the catalog was not synced: {error}")


def _end_taken_over(error: EpochLost) -> NoReturn:
    _log.critical("%s; nothing more of what this process does is kept, and it ends", error)
    os._exit(TAKEN_OVER)


def _end_unsynced(message: str) -> NoReturn:
    _log.critical("%s; this process ends, and the next one recovers what there is", message)
    os._exit(SYNC_FAILED)
