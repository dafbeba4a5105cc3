"""Lets the wall clock of a process jump: first on its PYTHONPATH, Python imports this by itself.

The file that FAULTS_CLOCK names holds the seconds by which the clock is wrong. The monotonic clock
goes on, as it does when somebody sets a machine's clock.
"""

from __future__ import annotations

import os
import time

_FILE = os.environ.get("FAULTS_CLOCK")
_right = time.time
_right_ns = time.time_ns


def _wrong_by() -> float:
    assert _FILE is not None
    try:
        with open(_FILE, encoding="ascii") as file:  # noqa: PTH123  imported by every process
            return float(file.read())
    except FileNotFoundError:
        return 0.0


def _wrong() -> float:
    return _right() + _wrong_by()


def _wrong_ns() -> int:
    return _right_ns() + int(_wrong_by() * 1e9)


if _FILE is not None:
    time.time = _wrong
    time.time_ns = _wrong_ns
