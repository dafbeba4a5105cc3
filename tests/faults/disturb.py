"""What is done to a server while a script trains on it: kills, suspensions, fail points."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

from holdfast import failpoints
from tests.support.server import ServerProcess

QUIET = 0.3
"""Seconds at most between a step of the script and the next disturbance."""


class Disturber:
    """Disturbs a server at random moments, in a thread, until it is told to stop.

    Between two disturbances the script makes at least a step, so that no operation is killed as
    often as one that kills its worker by itself would be.
    """

    def __init__(
        self, server: ServerProcess, points: Path, seed: int, *, only_points: bool = False
    ) -> None:
        self._server = server
        self._points = points
        self._random = random.Random(seed)
        self._only_points = only_points
        self._progress = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="disturber")
        self.done: Counter[str] = Counter()
        """How often each disturbance was made."""
        self.error: BaseException | None = None
        self.not_reached: list[str] = []
        """Fail points that were armed and never come to."""

    def progress(self) -> None:
        """The script made a step."""
        self._progress.set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Make no more of them, and leave a server that runs."""
        self._stop.set()
        self._progress.set()
        self._thread.join()
        self.not_reached = self.armed()
        self._clear()
        if not self._server.alive:
            self._server.kill_and_restart()

    @property
    def kills(self) -> int:
        return sum(n for name, n in self.done.items() if name.startswith(("kill", "at ")))

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._progress.clear()
                if self._only_points or not self._progress.wait(timeout=1):
                    self._look_after()
                    time.sleep(0.01)
                    continue
                time.sleep(self._random.uniform(0, QUIET))
                if not self._stop.is_set():
                    self._disturb()
        except BaseException as error:  # shown by the test
            self.error = error

    def arm_every_point(self) -> None:
        """Let the server die once at each of its fail points, whenever it comes to it."""
        for point in failpoints.POINTS:
            (self._points / point).touch()

    def armed(self) -> list[str]:
        """Fail points that were not reached."""
        return sorted(path.name for path in self._points.iterdir())

    def _look_after(self) -> None:
        """Start a server again that has reached its fail point."""
        if not self._server.alive:
            self.done["at a point"] += 1
            self._server.kill()
            self._server.launch()  # it may come to the next one while it starts

    def _disturb(self) -> None:
        what = self._random.choices(
            ["kill server", "kill worker", "kill both", "suspend", "point"],
            weights=[2, 2, 1, 1, 4],
        )[0]
        match what:
            case "kill server":
                self._server.kill_and_restart()
            case "kill worker":
                if self._server.kill_workers() == 0:
                    return
            case "kill both":
                self._server.kill_workers()
                self._server.kill_and_restart()
            case "suspend":
                os.kill(self._server.pid, signal.SIGSTOP)
                time.sleep(self._random.uniform(0.1, 2))
                os.kill(self._server.pid, signal.SIGCONT)
            case "point":
                what = self._at_a_point()
        self.done[what] += 1

    def _at_a_point(self) -> str:
        """Arm a fail point, wait for the server to die there, start it again."""
        point = self._random.choice(failpoints.POINTS)
        (self._points / point).touch()
        deadline = time.monotonic() + 10
        while self._server.alive and time.monotonic() < deadline and not self._stop.is_set():
            time.sleep(0.01)
        self._clear()
        if self._server.alive:
            return f"not reached: {point}"
        self._server.kill_and_restart()
        return f"at {point}"

    def _clear(self) -> None:
        for armed in self._points.iterdir():
            armed.unlink(missing_ok=True)
