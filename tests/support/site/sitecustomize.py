"""Changes the processes of a server under test: first on its PYTHONPATH, Python imports this.

FAULTS_CLOCK names a file with the seconds by which the wall clock is wrong. The monotonic clock
goes on, as it does when somebody sets a machine's clock. TESTS_PRELOADED names the directory of
`tests.support.preloaded`, where servers and workers are forked. FAULTS_LIMITS is read by
`tests.support.limits`.
"""

from __future__ import annotations

import os
import sys
import time

_right = time.time
_right_ns = time.time_ns


def _wrong_by() -> float:
    # Looked up each time: a preloaded process is given another environment.
    file = os.environ.get("FAULTS_CLOCK")
    if file is None:
        return 0.0
    try:
        with open(file, encoding="ascii") as opened:  # noqa: PTH123  imported by every process
            return float(opened.read() or 0.0)
    except FileNotFoundError:
        return 0.0


def _wrong() -> float:
    return _right() + _wrong_by()


def _wrong_ns() -> int:
    return _right_ns() + int(_wrong_by() * 1e9)


if "FAULTS_CLOCK" in os.environ:
    time.time = _wrong
    time.time_ns = _wrong_ns
# Nothing more is imported by all those processes that are neither.
_module, *_arguments = sys.orig_argv[2:] if sys.orig_argv[1:2] == ["-m"] else [""]
if _module in ("holdfast.cli", "holdfast.engine.worker", "tests.support.serve_with"):
    if "TESTS_PRELOADED" in os.environ:
        from tests.support.stand_in import stand_in

        stand_in(os.environ["TESTS_PRELOADED"], _module, _arguments)
    if _module == "holdfast.cli":
        from tests.support.limits import change_limits

        change_limits()
