"""What runs leave behind in a worker's heap goes back to the system."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from holdfast.engine.heap import RETURNED_EVERY, Heap

PIECE = 100_000
"""Bytes: too small to be mapped on its own."""


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim"
)
def test_what_was_freed_below_what_stays_is_given_back() -> None:
    heap = Heap()
    before = resident()
    pieces = [bytearray(PIECE) for _ in range(4 * RETURNED_EVERY // PIECE)]
    full = resident()
    assert full - before > 3 * RETURNED_EVERY
    for at in range(len(pieces) - 1):
        pieces[at] = bytearray()
    heap.freed(RETURNED_EVERY - 1)
    assert resident() > full - RETURNED_EVERY  # by itself it stays
    heap.freed(1)
    assert resident() < before + RETURNED_EVERY
    assert len(pieces[-1]) == PIECE
