"""The time for which results that were read are kept: only while the server is up and answering."""

from __future__ import annotations

import time


class ServingClock:
    """UTC seconds when the server started, and from there on the seconds for which it has served.

    It does not jump with the system's clock, and stands still while the process is suspended: a
    client whose answer was lost meanwhile still finds it.
    """

    def __init__(self) -> None:
        self._ahead = time.time() - time.monotonic()

    def now(self) -> float:
        return time.monotonic() + self._ahead

    def forgive(self, seconds: float) -> None:
        """The server was not answering for that long."""
        self._ahead -= seconds
