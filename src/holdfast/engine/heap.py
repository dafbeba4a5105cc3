"""Giving back to the system what was freed: the C library keeps it for itself otherwise."""

from __future__ import annotations

import ctypes

RETURNED_EVERY = 64 << 20
"""Bytes that are freed before they are given back, which takes about 0.1 s a GB."""


class Heap:
    """Counts what is freed in many pieces, between which what stays would keep it from going.

    glibc gives back by itself only what is at the end of its heap. With another C library, what it
    does is left to it.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._freed = 0

    def freed(self, size: int) -> None:
        """So many bytes were freed just now."""
        self._freed += size
        if self._freed >= RETURNED_EVERY and self._trim is not None:
            self._freed = 0
            self._trim(0)
