"""Named points at which a test can end the process, as a power cut would.

They are off unless HOLDFAST_FAILPOINTS names a directory. A file in it with the name of a point
arms that point once: whoever reaches it first takes the file away and dies by SIGKILL.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

POINTS = (
    "commit.before",
    "commit.after",
    "submission.journaled",
    "operation.computed",
    "outcome.recorded",
    "save.copied",
    "save.written",
    "save.published",
    "snapshot.copied",
    "snapshot.written",
    "snapshot.published",
    "publish.manifest",
    "publish.named",
    "load.published",
    "load.restored",
    "end.noted",
)
"""Every point there is."""

_DIRECTORY = os.environ.get("HOLDFAST_FAILPOINTS")


def reach(point: str) -> None:
    """The process has come to this point."""
    if _DIRECTORY is not None:
        _die_if_armed(Path(_DIRECTORY), point)


def _die_if_armed(directory: Path, point: str) -> None:
    assert point in POINTS, point
    try:
        (directory / point).unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
