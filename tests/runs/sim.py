"""A server's runs in a simulated world: one thread, virtual time, and death at any point.

The service, the SQL and the store are the real ones. Replaced are the event loop's clock (waiting
costs nothing: time jumps to the next timer), the threads (their work is done in the loop, after a
pause) and the worker processes (toy engines). So every interleaving follows from a seed, and a
wait that nothing can end is found at once.

Time passes by pauses that a random generator draws; at every *point* (a call that changes a file,
a commit, a step of an engine) the server can be killed. A killed server executes nothing more:
its tasks are abandoned, and another server is started over the same files.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import selectors
import shutil
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import CoroutineType, SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import sqlalchemy as sa

from holdfast.catalog import Catalog, CatalogUnavailable, database
from holdfast.catalog.backend import Backend
from holdfast.catalog.sqlite import SQLite
from holdfast.engine.interface import EngineError, WorkerDied
from holdfast.runs import (
    checkpoints,
    clock,
    driver,
    engines,
    index,
    last_state,
    publishing,
    recovery,
    run,
    samplers,
    service,
    sessions,
    turns,
)
from holdfast.runs.engines import DEFAULT_ADAPTER_MEMORY, Engines
from holdfast.runs.errors import RunError
from holdfast.runs.segments import LARGE, Segments
from holdfast.runs.service import Lifetimes, Runs
from holdfast.store import LocalStore, retries
from holdfast.store.files import LocalFiles, WriteFile
from tests.store.crash import Died, Disk, Process

from .toy import ENDS, NAME, OTHER, ToyEngine, base_info

T = TypeVar("T")

_TIMED = (
    checkpoints,
    clock,
    driver,
    engines,
    index,
    last_state,
    publishing,
    recovery,
    run,
    samplers,
    service,
    sessions,
    turns,
    retries,
)
"""The modules that read the clock."""


NEEDS_MEMORY = frozenset(
    ("forward", "forward_backward", "optim_step", "restore", "capture", "write", "mark", "drop")
)
"""Steps of an engine at which memory may be short. A creation that fails is another matter."""


class Killed(SystemExit):
    """The server was killed. Not an Exception: nothing catches it, the loop stops at once."""


class Stuck(AssertionError):
    """Somebody waits, and nothing will ever happen."""


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wall = 1.7e9
        """What the system's clock is ahead of the virtual time; it may jump."""

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall + self.now


class _Selector(selectors.SelectSelector):
    """Instead of waiting, lets time pass."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise Stuck("the server waits for something that nothing will bring about")
        self._clock.now += max(0.0, timeout)
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: Clock) -> None:
        self._virtual = clock
        self.abandoned = False
        super().__init__(_Selector(clock))
        self.set_exception_handler(_without_the_killed)

    def time(self) -> float:
        return self._virtual.now

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = super().call_soon(callback, *args, context=context)
        if self.abandoned:
            handle.cancel()
        return handle

    def abandon(self) -> None:
        """Drop every task where it stands."""
        self.abandoned = True
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            with suppress(RuntimeError):
                task.get_coro().close()
        self.close()


def _without_the_killed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), Killed):
        loop.default_exception_handler(context)


_catalog_file: list[Path] = []


@cache
def _shared_backend() -> SQLite:
    """Of all worlds, which come one after the other: compiling their statements takes longest."""
    engine = sa.create_engine(
        "sqlite+pysqlite://",
        creator=lambda: sqlite3.connect(_catalog_file[0], check_same_thread=False),
        poolclass=sa.QueuePool,
    )
    return SQLite(engine, "the catalog of a world")


def _new_file(root: Path) -> Backend:
    shutil.copy(_migrated_catalog(), root / "catalog.db")
    _catalog_file[:] = [root / "catalog.db"]
    return _shared_backend()


new_catalog: Callable[[Path], Backend] = _new_file
"""Makes a world's empty catalog; what was the last one's is not used any more."""


class SimCatalog(Catalog):
    """The catalog without its thread: the same transactions, committed in the event loop."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._backend = world.backend
        self._engine = self._backend.engine
        self._connection = None
        self._before_commit = []
        self._leased = False
        self._epoch = None
        self._since_tidied = 0
        self._batch: list[database._Work[Any]] = []

    def begin_write(
        self,
        work: Callable[[sa.Connection], T],
        ended: Callable[[Exception | None], object] | None = None,
    ) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._batch:
            loop.call_later(self._world.pause("commit"), self._commit_batch)
        self._batch.append(database._Work(work, ended, loop, future, loop.time()))
        return future

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        await asyncio.sleep(self._world.pause("read"))
        return self.read_now(work)

    def read_now(self, work: Callable[[sa.Connection], T]) -> T:
        if self._world.refuse_reads > 0:
            self._world.refuse_reads -= 1
            raise CatalogUnavailable("no file descriptor is free")
        return super().read_now(work)

    def close(self) -> None:
        self._disconnect()
        self._engine.dispose()

    def _commit_batch(self) -> None:
        batch, self._batch = self._batch, []
        if self._world.refuse_commits > 0:
            self._world.refuse_commits -= 1
            for item in batch:
                item.error = CatalogUnavailable("database is locked")
            database._resolve(batch)
            return
        self._world.point("commit")
        self._commit(batch)
        if self._since_tidied >= database._WRITES_BETWEEN_TIDYING:
            self._tidy()
        self._world.point("committed")

    def _transact(self, *args: Any) -> None:
        if self._world.power is not None:
            self._world.power.event("begin")
        super()._transact(*args)
        if self._world.power is not None:
            self._world.power.event("committed")


class _Files(LocalFiles):
    """The disk, with a point before and after each call that changes something.

    While it `is_full`, no file is created.
    """

    def __init__(self, point: Callable[[str], None], is_full: Callable[[], bool]) -> None:
        self._point = point
        self._is_full = is_full

    def create(self, path: str) -> WriteFile:
        if self._is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with self._around("create"):
            return super().create(path)

    def rename(self, old: str, new: str) -> None:
        with self._around("rename"):
            super().rename(old, new)

    def unlink(self, path: str) -> None:
        with self._around("unlink"):
            super().unlink(path)

    def sync_dir(self, path: str) -> None:
        """Without the sync: here processes die, not machines."""

    @contextmanager
    def _around(self, what: str) -> Iterator[None]:
        self._point(what)
        yield
        self._point(what)


class Power(Process):
    """The disk of a machine that loses its power at a call, and with it what was not synced."""

    def _call(self, name: str, path: str) -> None:
        try:
            super()._call(name, path)
        except Died as died:
            raise Killed(str(died)) from None

    def event(self, name: str) -> None:
        """Something beside the files that has its place in the order of the calls."""
        self._call(name, "catalog")


Survives = Callable[[Disk, random.Random], Disk]
"""What is left of a disk after a loss of power."""


async def _nobody() -> None:
    """Asks for nothing."""


class World:
    """The files of a server, and the server that runs over them.

    With `survives`, its store and segments are on a disk that loses power when the server is
    killed; commits to the catalog, which is a real one, have their places among its calls. With
    `large`, every body and result is in a segment.
    """

    def __init__(
        self,
        seed: int,
        survives: Survives | None = None,
        *,
        large: bool | None = None,
        adapter_memory: int = DEFAULT_ADAPTER_MEMORY,
        worker_memory: int = 0,
        lifetimes: Lifetimes | None = None,
    ) -> None:
        self.adapter_memory = adapter_memory
        self.worker_memory = worker_memory
        self.fresh = 1000
        """Bytes of resident memory of a worker that has just started."""
        self.lifetimes = lifetimes
        self._survives = survives
        self.power = None if survives is None else Power(Disk())
        shared = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
        self.random = random.Random(seed)
        self.clock = Clock()
        self.kill_in: int | None = None
        """Points after which the server is killed."""
        self.kill_at: frozenset[str] | None = None
        """Which points count; None: all."""
        self.die_in: int | None = None
        """Steps of an engine after which the worker dies."""
        self.deadly: frozenset[str] = frozenset()
        """Steps at which every worker dies."""
        self.hangs = 0
        """How many workers hang from their start on."""
        self.refuse_commits = 0
        """How many commits the database refuses from now on."""
        self.refuse_reads = 0
        """How many reads of the database fail from now on."""
        self.full_until = 0.0
        """Until when there is no room on the disk."""
        self.short_in: int | None = None
        """Calls of an engine that need memory, after which one gets none."""
        self.shortages = 0
        """How many calls got none so far."""
        self.unstartable = 0
        """How many times a worker cannot be started from now on."""
        self.unstarted = 0
        """How many times in a row none could be until now."""
        self.unloadable = 0
        """How many workers cannot load their base model from now on, when one has before."""
        self.known: set[str] = set()
        """Runs whose state an engine has had."""
        self.checked_at_boot: Callable[[World], None] = lambda _: None
        """What must be true of the files that a killed server left."""
        self.kills = 0
        self.left: set[str] = set()
        """What a server still did when it had stopped."""
        self.lives: list[ToyEngine] = []
        self.fingerprint: dict[str, Any] = {"toy": 1}
        self._quiet = False
        self._patches: list[Any] = [mock.patch.object(m, "time", self._time()) for m in _TIMED]
        self._patches.append(mock.patch("asyncio.to_thread", self._to_thread))
        threads = staticmethod(self._to_thread)
        self._patches.append(mock.patch.object(checkpoints.Checkpoints, "_in_thread", threads))
        # Unless it is said, in half of the worlds every body and result is a large one.
        drawn = random.Random(f"large {seed}").random() < 0.5
        # As in half of them a server takes the catalog over, and asks whether it has it still.
        self.claims = random.Random(f"claims {seed}").random() < 0.5
        self._large = 0 if (drawn if large is None else large) else LARGE
        for patch in self._patches:
            patch.start()
        self.backend = new_catalog(self.root)
        self.boot()

    # --- Life and death ----------------------------------------------------------------------

    def boot(self) -> None:
        """Start a server over the files."""
        self.loop = _Loop(self.clock)
        self.refuse_reads = 0
        files = self.power or _Files(self.point, lambda: self.clock.now < self.full_until)
        self.store = LocalStore(
            self.root / "store",
            files=files,
            wall=self.clock.time,
            monotonic=self.clock.monotonic,
        )
        self.catalog = SimCatalog(self)
        self.segments = Segments(self.root / "segments", files, above=self._large)
        self.runs = Runs(self.catalog, self.segments, self.store, self._engines(), self.lifetimes)
        if self.kills:
            self.checked_at_boot(self)
        if self.claims:
            self.loop.run_until_complete(self.catalog.claim("the server"))
        self.loop.run_until_complete(self.runs.start())

    def kill(self) -> None:
        """kill -9: nothing of the server is executed any more. Starts another one."""
        while True:
            self._end()
            with suppress(Killed):
                self.boot()
                return

    def _end(self) -> None:
        self.kills += 1
        self.kill_in = self.die_in = None
        self.refuse_commits = 0
        self._quiet = True
        self.loop.abandon()
        self.catalog.close()
        self._quiet = False
        if self.power is not None:
            assert self._survives is not None
            self.power = Power(self._survives(self.power.disk, self.random))

    def restart(
        self, within: float = 20.0, *, beside: Callable[[], Awaitable[None]] = _nobody
    ) -> None:
        """Stop in good order, which may take so many seconds, and start again.

        `beside` is what clients do from a hundredth of a second before the stop on.
        """

        async def stop() -> None:
            asking = asyncio.create_task(_as_coroutine(beside))
            await asyncio.sleep(0.0 if beside is _nobody else 0.01)
            await self.runs.stop(within)
            await asking
            self.left = {str(task) for task in asyncio.all_tasks() if _is_ours(task)}

        try:
            self.loop.run_until_complete(stop())
        except Killed:
            self.kill()
            return
        self.refuse_commits = 0
        self._quiet = True
        self.loop.abandon()
        self.catalog.close()
        self._quiet = False
        try:
            self.boot()
        except Killed:
            self.kill()

    def close(self) -> None:
        self._quiet = True
        self.kill_in = None
        self.loop.abandon()
        self.catalog.close()
        for patch in self._patches:
            patch.stop()
        shutil.rmtree(self.root)

    def kill_worker(self) -> None:
        """The newest worker ends between two of its steps."""
        if self.lives:
            self.lives[-1].kill()

    # --- What the test does ------------------------------------------------------------------

    def do(self, call: Callable[[], Awaitable[T]]) -> T:
        """What a client does: ask, and ask again when no answer comes, however often it takes.

        A definite error (RunError) is raised.
        """
        while True:
            try:
                return self.loop.run_until_complete(_as_coroutine(call))
            except Killed:
                self.kill()
            except CatalogUnavailable:
                self.let(0.1)
            except RunError as error:
                if error.reason != "unavailable":
                    raise
                self.let(0.1)

    def let(self, seconds: float) -> None:
        """Let the server run for a while."""
        until = self.clock.now + seconds
        while (left := until - self.clock.now) > 0:
            try:
                self.loop.run_until_complete(asyncio.sleep(left))
            except Killed:
                self.kill()

    # --- What happens ------------------------------------------------------------------------

    def point(self, what: str) -> None:
        if what == ENDS and not self._quiet:
            raise Killed(what)
        if self._quiet or self.kill_in is None:
            return
        if self.kill_at is not None and what not in self.kill_at:
            return
        self.kill_in -= 1
        if self.kill_in < 0:
            self.kill_in = None
            raise Killed(what)

    def pause(self, what: str) -> float:
        """Seconds that something takes, all of them short beside the leases.

        Never none: two things that follow each other have not the same time.
        """
        longest = {"forward_backward": 0.6, "optim_step": 0.3, "forward": 0.3}.get(what, 0.01)
        return self.random.choice((1e-6, 0.001, longest))

    def _engine_point(self, what: str) -> None:
        self.point(what)
        if self.short_in is not None and what in NEEDS_MEMORY:
            self.short_in -= 1
            if self.short_in < 0:
                self.short_in = None
                self.shortages += 1
                raise EngineError("out_of_memory", f"none is left for this {what}", "server")
        if what in self.deadly:
            raise WorkerDied(f"at {what}, as always")
        if self.die_in is not None and what != "ready":
            self.die_in -= 1
            if self.die_in < 0:
                self.die_in = None
                raise WorkerDied(f"at {what}")

    async def _start_engine(self, name: str) -> ToyEngine:
        if self.unstartable > 0:
            self.unstartable -= 1
            self.unstarted += 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.unstarted = 0
        engine = ToyEngine(
            self.store,
            self._engine_point,
            self.pause,
            base_info(self.fingerprint, name),
            self.clock.monotonic,
            self.known,
        )
        if self.unloadable > 0 and self.runs.engines[name].info is not None:
            self.unloadable -= 1
            engine.cannot_load()
        if self.hangs > 0:
            self.hangs -= 1
            engine.hang()
        engine.resident_memory = self.fresh
        self.lives.append(engine)
        return engine

    async def _to_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(self.pause("thread"))
        return call(*args)

    def _engines(self) -> Engines:
        return Engines(
            [NAME, OTHER],
            self._start_engine,
            adapter_memory=self.adapter_memory,
            worker_memory=self.worker_memory,
        )

    def _time(self) -> SimpleNamespace:
        return SimpleNamespace(time=self.clock.time, monotonic=self.clock.monotonic)


async def _as_coroutine(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


def _is_ours(task: asyncio.Task[Any]) -> bool:
    """Whether a task is the server's, not a worker's or a client's."""
    coroutine = task.get_coro()
    return isinstance(coroutine, CoroutineType) and "/holdfast/" in coroutine.cr_code.co_filename


_template: Path | None = None


def _migrated_catalog() -> Path:
    """An empty catalog: migrating takes longer than a whole example."""
    global _template
    if _template is None:
        _template = Path(tempfile.mkdtemp()) / "catalog.db"
        Catalog.open_file(_template).close()
    return _template


__all__ = ["Clock", "Killed", "RunError", "SimCatalog", "Stuck", "World"]
