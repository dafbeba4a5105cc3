"""The event loop and the connections that all clients of a process share.

One background thread runs one asyncio loop. Every request of every client is made there, so a
caller may be a plain thread, several threads or any event loop of its own, and the sync and async
forms of a method are the same work. Connections are bounded for the whole process, by lane:
long polls must never keep a submission or a heartbeat from a connection.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import ssl
import threading
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import httpx2

from holdfast.protocol.errors import ClosedError, OperationCancelledError

T = TypeVar("T")
P = ParamSpec("P")

Lane = Literal["submit", "poll", "sample"]
CONNECTIONS: dict[Lane, int] = {"submit": 32, "poll": 96, "sample": 48}
"""Sockets per process: together they stay below 200."""

_EXIT_SECONDS = 3.0
_CANCEL_SECONDS = 0.5
_CANCEL_ROUNDS = 4
"""What is cancelled may begin something else to clean up after itself; not for ever."""


class Work(Generic[T]):
    """A coroutine that runs on the loop, and a future of its outcome for any thread.

    After `cancel` the future ends when the coroutine has: what it cleans up is done by then.
    """

    def __init__(self, work: Coroutine[Any, Any, T], runtime: Runtime) -> None:
        self.future: Future[T] = Future()
        self.future.set_running_or_notify_cancel()
        self._runtime = runtime
        self._task: asyncio.Task[T] | None = None
        runtime.loop.call_soon_threadsafe(self._begin, work)

    def _begin(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = self._runtime.loop.create_task(work)
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        if self._runtime.dropping:
            # Only daemon threads can be waiting now: they end with the process, without a word.
            # Whoever comes later is told at once.
            _read(task)
        elif task.cancelled():
            self.future.set_exception(
                OperationCancelledError(
                    "waiting was cancelled: what was submitted stays in its place and may still"
                    " finish"
                )
            )
        elif (error := task.exception()) is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(task.result())

    def cancel(self) -> None:
        """Cancel the coroutine; from any thread."""
        self._runtime.soon(lambda: self._task is not None and self._task.cancel())


class _Threads(ThreadPoolExecutor):
    """Threads for what blocks; when the interpreter ends and gives none any more, without them."""

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return super().submit(call, *args, **kwargs)
        except RuntimeError as refused:
            if "cannot schedule new futures" not in str(refused):
                raise
            done: Future[T] = Future()
            try:
                done.set_result(call(*args, **kwargs))
            except Exception as error:
                done.set_exception(error)
            return done


class Runtime:
    """One loop in one daemon thread, with its connection pools."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(_Threads(thread_name_prefix="holdfast-client"))
        self.dropping = False
        """Whether what is still under way is given up, because the interpreter ends."""
        self._ending = False
        self._starting = threading.RLock()
        """Of its kind, since a signal's handler may use the client wherever its thread is."""
        self._lanes: dict[Lane, httpx2.AsyncClient] = {}
        self._tls: ssl.SSLContext | None = None
        self._at_exit: set[Callable[[], Coroutine[Any, Any, None]]] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="holdfast-client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self._stopped.set()

    def start(self, work: Coroutine[Any, Any, T]) -> Work[T]:
        """Run a coroutine on the loop; from any thread of the process that made the runtime.

        Raises ClosedError once the interpreter is at its end.
        """
        try:
            self.check_process()
            with self._starting:
                if not self._ending:
                    return Work(work, self)
            raise ClosedError("the interpreter ends, and the client's connections have been closed")
        except BaseException:
            work.close()
            raise

    def check_process(self) -> None:
        """Raises RuntimeError in a child of the process that made the runtime."""
        if os.getpid() != self.pid:
            raise RuntimeError(
                "this client was made before the process was forked, and its connections stayed"
                " with the parent: make a new ServiceClient in the child"
            )

    def soon(self, call: Callable[[], object]) -> None:
        """Call a function on the loop's thread, from any thread; not once the interpreter ends."""
        with self._starting:
            if not self._ending:
                self.loop.call_soon_threadsafe(call)

    @property
    def here(self) -> bool:
        """Whether this is the loop's own thread, where waiting would wait for ever."""
        return threading.current_thread() is self._thread

    def lane(self, lane: Lane) -> httpx2.AsyncClient:
        """The connection pool of a lane; on the loop's thread only."""
        client = self._lanes.get(lane)
        if client is None:
            if self._tls is None:
                self._tls = ssl.create_default_context()
            limit = CONNECTIONS[lane]
            client = self._lanes[lane] = httpx2.AsyncClient(
                limits=httpx2.Limits(
                    max_connections=limit, max_keepalive_connections=limit, keepalive_expiry=30.0
                ),
                timeout=httpx2.Timeout(60.0, connect=10.0, pool=None),
                verify=self._tls,
            )
        return client

    def at_exit(self, work: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        """Do this when the interpreter ends, unless the returned function is called before."""
        self._at_exit.add(work)
        return lambda: self._at_exit.discard(work)

    def shut_down(self) -> None:
        """Do what was to be done at exit, within a few seconds, then give up everything else.

        The loop is stopped with nothing left on it. Ctrl-C goes on to the giving up at once.
        """
        if os.getpid() != self.pid or not self._thread.is_alive():
            return
        with self._starting:
            self._ending = True
        works: list[asyncio.Task[None]] = []

        async def end() -> None:
            works.extend(self.loop.create_task(work()) for work in self._at_exit)
            await _wait(works, _EXIT_SECONDS)
            self.dropping = True
            await self._drop_all()

        ending = asyncio.run_coroutine_threadsafe(end(), self.loop)
        ending.add_done_callback(lambda _: self.loop.call_soon_threadsafe(self.loop.stop))
        limit = _EXIT_SECONDS + (_CANCEL_ROUNDS + 1) * _CANCEL_SECONDS + 1.0
        try:
            stopped = self._stopped.wait(limit)
        except KeyboardInterrupt:
            for work in works:
                self.loop.call_soon_threadsafe(work.cancel)
            stopped = self._stopped.wait(limit)
        if stopped:
            self.loop.close()
        else:
            # It hangs in a call of the system: nothing more can be done than say nothing of it.
            self.loop.set_exception_handler(_say_nothing)

    async def _drop_all(self) -> None:
        """Cancel all other tasks until there are none, and close the connections."""
        for _ in range(_CANCEL_ROUNDS):
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await _wait(others, _CANCEL_SECONDS)
        closing = [self.loop.create_task(client.aclose()) for client in self._lanes.values()]
        await _wait(closing, _CANCEL_SECONDS)
        # A transport that was closed lets go of its socket in the loop's next turn.
        await asyncio.sleep(0)


async def _wait(tasks: Collection[asyncio.Task[Any]], seconds: float) -> None:
    """Wait for tasks whose results and errors are nobody's."""
    for task in tasks:
        task.add_done_callback(_read)
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)


def _read(task: asyncio.Task[Any]) -> None:
    """An error that has been read is not reported as one that nobody read."""
    if not task.cancelled():
        task.exception()


def _say_nothing(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Instead of reporting what becomes of a loop that is never run again."""


_lock = threading.RLock()
_current: Runtime | None = None


def runtime() -> Runtime:
    """This process's runtime; a forked child gets one of its own."""
    global _current
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = Runtime()
            atexit.register(_current.shut_down)
        return _current


def _forget_parent() -> None:
    """In a forked child: the parent's loop does not run here, and what is on it is the parent's."""
    global _lock, _current
    _lock = threading.RLock()
    if _current is not None:
        _current.loop.set_exception_handler(_say_nothing)
        _current = None


os.register_at_fork(after_in_child=_forget_parent)
