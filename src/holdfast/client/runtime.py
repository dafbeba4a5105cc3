"""The event loop and the connections that all clients of a process share.

One background thread runs one asyncio loop. Every request of every client is made there, so a
caller may be a plain thread, several threads or any event loop of its own, and the sync and async
forms of a method are the same work. Connections are bounded for the whole process, by lane:
long polls must never keep a submission or a heartbeat from a connection.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, Literal, TypeVar

import httpx2

from holdfast.protocol.errors import HoldfastError, OperationCancelledError

T = TypeVar("T")

Lane = Literal["submit", "poll", "sample"]
CONNECTIONS: dict[Lane, int] = {"submit": 32, "poll": 96, "sample": 48}
"""Sockets per process: together they stay below 200."""

_EXIT_SECONDS = 3.0


class Work(Generic[T]):
    """A coroutine that runs on the loop, and a future of its outcome for any thread.

    After `cancel` the future ends when the coroutine has: what it cleans up is done by then.
    """

    def __init__(self, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> None:
        self.future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self.future.set_running_or_notify_cancel()
        self._loop = loop
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._begin, work)

    def _begin(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.future.set_exception(
                OperationCancelledError(
                    "waiting was cancelled: what was submitted stays in its place and may still"
                    " finish"
                )
            )
            return
        error = task.exception()
        if error is None:
            self.future.set_result(task.result())
        else:
            self.future.set_exception(error)

    def cancel(self) -> None:
        """Cancel the coroutine; from any thread."""
        self._loop.call_soon_threadsafe(lambda: self._task is not None and self._task.cancel())


class Runtime:
    """One loop in one daemon thread, with its connection pools."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._lanes: dict[Lane, httpx2.AsyncClient] = {}
        self._tls: ssl.SSLContext | None = None
        self._at_exit: set[Callable[[], Awaitable[None]]] = set()
        self._thread = threading.Thread(target=self._run, name="holdfast-client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def start(self, work: Coroutine[Any, Any, T]) -> Work[T]:
        """Run a coroutine on the loop; from any thread of the process that made the runtime."""
        if os.getpid() != self.pid:
            work.close()
            raise RuntimeError(
                "this client was made before the process was forked, and its connections stayed"
                " with the parent: make a new ServiceClient in the child"
            )
        return Work(work, self.loop)

    def soon(self, call: Callable[[], object]) -> None:
        """Call a function on the loop's thread; from any thread."""
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

    def at_exit(self, work: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        """Do this when the interpreter ends, unless the returned function is called before."""
        self._at_exit.add(work)
        return lambda: self._at_exit.discard(work)

    def shut_down(self) -> None:
        """End what is open, within a few seconds, and stop the loop."""
        if os.getpid() != self.pid or not self._thread.is_alive():
            return

        async def end() -> None:
            await asyncio.gather(*(work() for work in self._at_exit), return_exceptions=True)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for client in self._lanes.values():
                await client.aclose()

        try:
            self.start(end()).future.result(_EXIT_SECONDS)
        except (TimeoutError, HoldfastError):
            pass
        self.soon(self.loop.stop)
        self._thread.join(_EXIT_SECONDS)
        if not self._thread.is_alive():
            self.loop.close()


_lock = threading.Lock()
_current: Runtime | None = None


def runtime() -> Runtime:
    """This process's runtime; a forked child gets one of its own."""
    global _current
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = Runtime()
            atexit.register(_current.shut_down)
        return _current


os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock(), _current=None))
