"""The time for which results that were read are kept: only while the server is up and answering."""

from __future__ import annotations

import time

_TICK = 0.001
"""Seconds, far more than the resolution of a float of this size."""


class ServingClock:
    """UTC seconds when the server started, and from there on the seconds for which it has served.

    It does not jump with the system's clock, and stands still while the process is suspended: a
    client whose answer was lost meanwhile still finds it.
    """

    def __init__(self) -> None:
        self._ahead = time.time() - time.monotonic()

    def now(self) -> float:
        return time.monotonic() + self._ahead

    def go_on_from(self, seconds: float) -> None:
        """An earlier server noted this time: what comes now comes later, whatever clocks say."""
        self._ahead += max(0.0, seconds + _TICK - self.now())

    def forgive(self, seconds: float) -> None:
        """The server was not answering for that long."""
        self._ahead -= seconds
