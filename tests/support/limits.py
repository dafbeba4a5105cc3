"""Other limits for a server under test than a user's server has: FAULTS_LIMITS.

It holds constants of `holdfast.runs.engines` and `holdfast.runs.worker_memory`, as JSON.
"""

from __future__ import annotations

import json
import os


def change_limits() -> None:
    """In a server's process, before it serves."""
    limits = os.environ.get("FAULTS_LIMITS")
    if limits is None:
        return
    from holdfast.runs import engines, worker_memory

    for name, limit in json.loads(limits).items():
        (module,) = (m for m in (engines, worker_memory) if hasattr(m, name))
        setattr(module, name, limit)
