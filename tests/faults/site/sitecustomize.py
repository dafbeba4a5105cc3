"""Changes the processes of a server under test: first on its PYTHONPATH, Python imports this.

FAULTS_CLOCK names a file with the seconds by which the wall clock is wrong. The monotonic clock
goes on, as it does when somebody sets a machine's clock. FAULTS_WORKERS names the socket of
`tests.faults.preloaded`: a worker that starts has itself replaced by one of there. FAULTS_LIMITS
holds constants of `holdfast.runs.engines` that are to be others, as JSON.
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
            return float(opened.read())
    except FileNotFoundError:
        return 0.0


def _wrong() -> float:
    return _right() + _wrong_by()


def _wrong_ns() -> int:
    return _right_ns() + int(_wrong_by() * 1e9)


if "FAULTS_CLOCK" in os.environ:
    time.time = _wrong
    time.time_ns = _wrong_ns
if "FAULTS_WORKERS" in os.environ and sys.orig_argv[-1] == "holdfast.engine.worker":
    from tests.faults.stand_in import stand_in

    stand_in(os.environ["FAULTS_WORKERS"])
if "FAULTS_LIMITS" in os.environ and "serve" in sys.orig_argv:
    import json

    from holdfast.runs import engines

    for _name, _limit in json.loads(os.environ["FAULTS_LIMITS"]).items():
        assert hasattr(engines, _name), _name
        setattr(engines, _name, _limit)
