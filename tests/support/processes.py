"""What tests do with processes: wait for what they do, and let them do nothing for a while."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress


def wait_until(there: Callable[[], object], *, within: float = 60.0, otherwise: str = "") -> None:
    """Look again and again; a test fails, with `otherwise`, after so many seconds."""
    end = time.monotonic() + within
    while not there():
        assert time.monotonic() < end, otherwise
        time.sleep(0.01)


@contextmanager
def suspended(pids: Iterable[int]) -> Iterator[None]:
    """Processes that do nothing until this ends. One that has ended meanwhile is left out."""
    pids = list(pids)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
