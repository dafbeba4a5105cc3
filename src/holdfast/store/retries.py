"""Trying again what could not be done for the moment: how long, and with which pauses.

What is worth another attempt, and what is told when there is none, is for each caller to say.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

STORAGE_WAITED_FOR = 60.0
"""Seconds for which a write is tried again that the storage did not take: it may be full, or out of
reach, for a moment."""


def pauses(
    first: float = 0.25, longest: float = 5.0, *, within: float = math.inf
) -> Iterator[float]:
    """Seconds to wait before the next attempt: twice as many each time, at most `longest`.

    They come to an end when the next attempt would be later than `within` seconds from now.
    """
    ends = time.monotonic() + within

    def doubled() -> Iterator[float]:
        pause = first
        while time.monotonic() + pause <= ends:
            yield pause
            pause = min(2 * pause, longest)

    return doubled()
