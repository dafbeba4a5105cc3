"""Something that is done now and then, in a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger("holdfast.catalog")


class Beside:
    """Does one thing whenever it is told to, and calls `then` each time it has."""

    def __init__(self, name: str, work: Callable[[], None], then: Callable[[], None]) -> None:
        self._work = work
        self._then = then
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._is_busy = False
        self._is_done = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self) -> bool:
        """Begin, unless the last time is not over: until `is_done` has told so."""
        if self._is_busy:
            return False
        self._is_busy = True
        self._calls.put(True)
        return True

    def is_done(self) -> bool:
        """Whether it has been done since this was told the last time."""
        if not self._is_done:
            return False
        self._is_busy = self._is_done = False
        return True

    def close(self) -> None:
        """End the thread, after what it does. Idempotent."""
        self._calls.put(False)
        self._thread.join()

    def _run(self) -> None:
        while self._calls.get():
            try:
                self._work()
            except Exception:  # a defect: it may succeed when it is told to the next time
                _log.exception("%s met a defect", self._thread.name)
            finally:
                self._is_done = True
                self._then()
