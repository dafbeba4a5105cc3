"""Threads for calls that may take long or hang, so that they keep nobody else's from being made."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The threads are closed: the call was not made."""


class Threads:
    """Up to `most` threads, started as they are needed.

    Unlike those of `concurrent.futures`, one that hangs holds up neither `close` nor the end of the
    interpreter.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._started = 0
        self._free = 0
        self._calls: OrderedDict[Future[Any], Callable[[], Any]] = OrderedDict()
        """That have not begun, the oldest first, and of which somebody waits for the result."""
        self._changed = threading.Condition()
        self._is_closed = False

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """As `asyncio.to_thread`. What has not begun when its caller goes away is not called.

        Raises Closed.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._is_closed:
                raise self._closed()
            self._calls[future] = partial(copy_context().run, call, *args)
            if len(self._calls) <= self._free:
                self._changed.notify()
            elif self._started < self._most:
                self._started += 1
                name = f"{self._name}-{self._started}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            with self._changed:
                self._calls.pop(future, None)
            raise

    def close(self) -> None:
        """Begin nothing more, and wait for nothing. Idempotent."""
        with self._changed:
            self._is_closed = True
            waiting, self._calls = self._calls, OrderedDict()
            self._changed.notify_all()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._closed())

    def _closed(self) -> Closed:
        return Closed(f"the threads {self._name!r} are closed")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._free += 1
                self._changed.wait_for(lambda: self._calls or self._is_closed)
                self._free -= 1
                if self._is_closed:
                    return
                future, call = self._calls.popitem(last=False)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del future, call  # what they hold is not kept until the next one
