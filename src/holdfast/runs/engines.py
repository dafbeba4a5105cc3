"""The workers: one per base model, started on use, replaced when they die or have grown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import structlog

from holdfast.engine.interface import BaseModelInfo, Engine, EngineError, Worker, WorkerDied
from holdfast.runs.errors import RunError, stopping
from holdfast.runs.residents import Residents
from holdfast.runs.turns import Turns
from holdfast.runs.worker_memory import WorkerMemory, mib
from holdfast.store.retries import STORAGE_WAITED_FOR

StartEngine = Callable[[str], Awaitable[Worker]]
"""Starts the worker of a base model, by its name."""

_RESTART_PAUSE = (0.0, 1.0, 5.0, 15.0, 60.0)
"""Seconds before a worker is started again, by the number of failed starts in a row."""

HUNG_AFTER = 600.0
"""Seconds without progress after which a worker that has something to do is ended."""
LOADING_TAKES = 1800.0
"""Seconds after which a worker that is still loading its base model is ended: a large one comes
from slow disks, or is downloaded first."""
_WATCH_EVERY = 10.0
_WRITES_TAKE = 2 * STORAGE_WAITED_FOR
"""Seconds after which what is being written is no longer waited for: longer than a full disk is."""
LEAVING_TAKES = _WRITES_TAKE
"""Seconds for which a worker that is to be replaced waits for the next of its runs to leave."""
DEFAULT_ADAPTER_MEMORY = 4 << 30
"""Bytes of weights and optimizer states that a worker keeps of runs that are not computing."""

_log = structlog.get_logger("holdfast.engines")


class StateGone(WorkerDied):
    """The worker that held a state ended before it was asked for it: nothing was executed."""


class NotLoaded(EngineError):
    """A base model that had been loaded before cannot be loaded now: it may be, a while later.

    `since` is when that began, in seconds of the monotonic clock.
    """

    def __init__(self, error: EngineError, since: float) -> None:
        super().__init__(error.code, error.message, error.category)
        self.since = since


class Host:
    """The worker of one base model, through all its lives."""

    def __init__(
        self, name: str, start: StartEngine, adapter_memory: int, worker_memory: int
    ) -> None:
        self.name = name
        self.life = 0
        """Counts starts: a run whose state was put into another life is no longer there."""
        self.turns = Turns()
        """One is held while an operation computes, so that runs take turns."""
        self._entrance = Turns()
        """One is held while a state waits for room in the worker."""
        self.residents = Residents(adapter_memory)
        """The runs whose state the worker holds."""
        self._writing: set[asyncio.Task[None]] = set()
        self._memory = WorkerMemory(name, worker_memory)
        self._start = start
        self._engine: Worker | None = None
        self._since = 0.0
        """When the worker was ready."""
        self._recycling: asyncio.Task[None] | None = None
        self._retired: Worker | None = None
        """One that is being closed, to make room for the next."""
        self._admits = asyncio.Event()
        """Whoever has no state in the worker waits for this: not while that is being recycled."""
        self._admits.set()
        self._watch: asyncio.Task[None] | None = None
        self._info: BaseModelInfo | None = None
        self._failures = 0
        self._failing_since = 0.0
        self._failed: EngineError | None = None
        self._not_before = 0.0
        self._starting: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def info(self) -> BaseModelInfo | None:
        """The base model, once it has been loaded."""
        return self._info

    @property
    def state(self) -> str:
        """ "ready", "failed" or "loading" (which also says: not asked for yet)."""
        if self._engine is not None:
            return "ready"
        return "failed" if self._failed is not None else "loading"

    async def engine(self) -> tuple[Engine, BaseModelInfo, int]:
        """The running worker, its base model and its life, starting one if there is none.

        Raises EngineError when the base model cannot be loaded, NotLoaded where it could be before.
        That stays the answer for a pause that grows with each failure. Raises Unavailable once it
        was closed.
        """
        while self._engine is None:
            if self._closed:
                raise stopping()
            if self._recycling is not None:  # two would not fit the memory
                await asyncio.wait([self._recycling])
                continue
            starting = self._starting
            if starting is None or starting.done():
                starting = self._starting = asyncio.create_task(self._start_one())
                # Told to those who wait for it then, perhaps nobody.
                starting.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Whoever goes away while it starts leaves it to the others.
            await asyncio.wait([starting])
            if not starting.cancelled():
                self._check(starting)
        assert self._info is not None
        return self._engine, self._info, self.life

    def _check(self, started: asyncio.Task[None]) -> None:
        try:
            started.result()
        except EngineError as error:
            if self._info is None:
                raise
            raise NotLoaded(error, self._failing_since) from error

    async def _start_one(self) -> None:
        if self._failed is not None and time.monotonic() < self._not_before:
            raise self._failed
        while True:
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                engine, self._info = await self._new()
            except (EngineError, WorkerDied) as error:
                pause = _RESTART_PAUSE[min(self._failures, len(_RESTART_PAUSE) - 1)]
                if not self._failures:
                    self._failing_since = time.monotonic()
                self._failures += 1
                self._not_before = time.monotonic() + pause
                _log.error("base model not loaded", model=self.name, error=str(error))
                if isinstance(error, EngineError):
                    self._failed = error
                    raise
                if self._failures >= len(_RESTART_PAUSE):
                    self._failed = EngineError(
                        "worker_dies",
                        f"the worker of base model {self.name!r} ends while it starts; "
                        "the server's log says why",
                        "server",
                    )
                    raise self._failed from error
            else:
                self._engine, self._failures, self._failed = engine, 0, None
                self.life += 1
                self._since = time.monotonic()
                self._memory.loaded(engine.resident_memory)
                self._watch = asyncio.create_task(self._supervise(engine, self.life))
                _log.info("base model ready", model=self.name, life=self.life)
                return

    async def _new(self) -> tuple[Worker, BaseModelInfo]:
        """A worker that has loaded its base model. Else none is left behind.

        Raises EngineError or WorkerDied.
        """
        try:
            engine = await self._start(self.name)
        except OSError as error:  # no process, memory or file descriptor is free
            raise WorkerDied(f"it could not be started: {error}") from error
        try:
            return engine, await _loaded(engine)
        except asyncio.CancelledError:
            engine.kill()
            raise
        except (EngineError, WorkerDied):
            with suppress(EngineError, WorkerDied):
                await engine.close()
            raise

    def worker(self, life: int) -> tuple[Engine, BaseModelInfo] | None:
        """The worker of that life and its base model; None when it has ended."""
        if self._engine is None or life != self.life:
            return None
        assert self._info is not None
        return self._engine, self._info

    @asynccontextmanager
    async def computing(
        self, wanted: Callable[[], bool] = lambda: True
    ) -> AsyncIterator[tuple[Engine, int]]:
        """The worker and its life, for one operation that needs none of the states it holds.

        It computes nothing else meanwhile; when it dies, the next one gets a new worker. Those
        that are `wanted` go first.
        """
        await self._admits.wait()
        async with self.turns.take(wanted):
            engine, _, life = await self.engine()
            try:
                yield engine, life
            except WorkerDied:
                self.lost(life)
                raise

    @asynccontextmanager
    async def receiving(self, wanted: Callable[[], bool]) -> AsyncIterator[tuple[Engine, int]]:
        """`computing`, for one that gives the worker a state: there is room for it by then."""
        async with self._entrance.take(wanted):
            await self.residents.come()
        try:
            async with self.computing(wanted) as found:
                yield found
        finally:
            self.residents.came()

    def writes(self, task: asyncio.Task[None]) -> None:
        """The worker writes a copied state, until that task is done."""
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def written(self) -> None:
        """Wait until nothing that was copied is still being written, for a while at most."""
        if self._writing:
            await asyncio.wait(list(self._writing), timeout=_WRITES_TAKE)

    def lost(self, life: int) -> None:
        """A call of that life raised WorkerDied: the next one gets a new worker."""
        if life == self.life and self._engine is not None:
            _log.error("worker died", model=self.name, life=life)
            self._engine = None
            self.residents.clear()
            if self._recycling is not None:
                self._recycling.cancel()

    # --- Replacement in good order -----------------------------------------------------------

    def recycle(self) -> None:
        """Begin to replace the worker, if there is one, so that nothing has to be replayed.

        Each of its runs keeps its state and leaves, after the operation under way. Whatever needs
        a worker then waits for the next one.
        """
        if self._engine is not None and self._recycling is None:
            self._admits.clear()
            self._recycling = asyncio.create_task(self._recycle(self._engine))
            self._recycling.add_done_callback(self._recycled)

    def _recycled(self, task: asyncio.Task[None]) -> None:
        self._recycling = None
        self._admits.set()
        if not task.cancelled() and task.exception() is not None:
            _log.error("recycling a worker met a defect", exc_info=task.exception())

    def recycles(self, life: int) -> bool:
        """Whether the worker of that life is being replaced: what it holds is to leave it."""
        return self._recycling is not None and life == self.life

    async def _recycle(self, engine: Worker) -> None:
        memory, age = engine.resident_memory, time.monotonic() - self._since
        self.residents.all_leave()
        for _ in range(2):
            async with self.turns.take():
                pass
            await self.residents.have_left(LEAVING_TAKES)
            if not self.turns.taken:  # a run had just begun something that takes long
                break
        async with self.turns.take():
            if stay := len(self.residents):
                _log.warning("runs do not leave, and are recovered", model=self.name, runs=stay)
            # Not both at once, which the memory may have no room for.
            self._engine, self._retired = None, engine
            self.residents.clear()
            try:
                await engine.close()
            except asyncio.CancelledError:
                engine.kill()
                raise
            finally:
                self._retired = None
        _log.info(
            "worker recycled",
            model=self.name,
            life=self.life,
            memory_mib=None if memory is None else mib(memory),
            limit_mib=mib(self._memory.limit),
            age=round(age),
        )

    async def _supervise(self, engine: Worker, life: int) -> None:
        """Notice its death also while nobody calls it, end it when it hangs, replace it.

        Also when it has grown too much.
        """
        died = asyncio.create_task(engine.wait_died())
        # Only the time in which this itself ran: a process that was suspended has read nothing.
        seen, silent = engine.last_progress, 0.0
        try:
            while not died.done():
                began = time.monotonic()
                await asyncio.wait([died], timeout=_WATCH_EVERY)
                silent += min(time.monotonic() - began, _WATCH_EVERY)
                if not engine.in_flight or engine.last_progress != seen:
                    seen, silent = engine.last_progress, 0.0
                if silent > HUNG_AFTER and not died.done():
                    _log.error("worker hangs, ending it", model=self.name, silent=round(silent))
                    engine.kill()
                age = time.monotonic() - self._since
                if life == self.life and self._memory.outgrown(engine.resident_memory, age):
                    self.recycle()
        finally:
            died.cancel()
        self.lost(life)
        with suppress(EngineError):
            await self.engine()

    def kill(self) -> None:
        """End the worker at once, whatever it does. May be called from any thread."""
        for engine in (self._engine, self._retired):
            if engine is not None:
                engine.kill()

    async def close(self) -> None:
        """End the worker, after what it was sent. None is started any more."""
        self._closed = True
        for task in (self._watch, self._recycling, self._starting):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._engine is not None:
            await self._engine.close()
            self._engine = None


async def _loaded(engine: Worker) -> BaseModelInfo:
    """Wait for its base model, but not for ever: nothing else notices that a start hangs."""
    try:
        async with asyncio.timeout(LOADING_TAKES):
            return await engine.ready()
    except TimeoutError:
        engine.kill()
        raise WorkerDied(f"it did not load its base model within {LOADING_TAKES:.0f} s") from None


class Engines:
    """All hosts, by the name of their base model."""

    def __init__(
        self,
        models: Sequence[str],
        start: StartEngine,
        *,
        adapter_memory: int = DEFAULT_ADAPTER_MEMORY,
        worker_memory: int = 0,
    ) -> None:
        """`worker_memory`: bytes of resident memory above which a worker is replaced; 0: never."""
        self._hosts = {name: Host(name, start, adapter_memory, worker_memory) for name in models}

    @property
    def models(self) -> list[str]:
        return list(self._hosts)

    def __getitem__(self, base_model: str) -> Host:
        """The host of a base model. Raises RunError naming those there are."""
        host = self._hosts.get(base_model)
        if host is None:
            known = ", ".join(repr(name) for name in self._hosts)
            raise RunError(
                "base_model_not_found",
                f"base model {base_model!r} is not served here; there is {known}",
                reason="not_found",
            )
        return host

    async def close(self) -> None:
        await asyncio.gather(*(host.close() for host in self._hosts.values()))

    def kill(self) -> None:
        """End all workers at once. May be called from any thread."""
        for host in self._hosts.values():
            host.kill()
