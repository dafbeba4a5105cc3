"""How long a thread waits for a database: until a moment, even when nothing answers any more.

SQLite waits for a lock as long as its `busy_timeout` says, and for nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_until: ContextVar[float] = ContextVar("until", default=math.inf)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Have what this thread asks a database for answered within so many seconds from now.

    That ends the connection of what is not, whose error is that of a lost one. A limit that was set
    around this one does not hold meanwhile.
    """
    token = _until.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _until.reset(token)


def is_over() -> bool:
    """Whether nothing more is to be waited for."""
    return time.monotonic() >= _until.get()
