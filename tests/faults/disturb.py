"""What is done to a server while a script trains on it: kills, suspensions, a full disk, …"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from holdfast import failpoints
from tests.faults.surroundings import SmallDisk, locked_database, no_room_for_files, set_clock
from tests.support.server import ServerProcess

Kind = Literal[
    "kill server",
    "kill worker",
    "kill both",
    "die at a point",
    "restart",
    "suspend server",
    "suspend worker",
    "no room",
    "full disk",
    "locked database",
    "clock",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_WEIGHTS = {"kill server": 3, "kill worker": 3, "kill both": 2, "die at a point": 6}
"""How often each kind is drawn; once where nothing stands here."""

MOST_KILLS = 2
"""Between two steps of any one tenant: an operation that kills its worker by itself does it three
times."""
QUIET = 0.3
"""Seconds at most between a step of the script and the next disturbance."""
LATEST = 3.0
"""Seconds for which a server may not come to the fail point where it is to die."""
_DAY = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Disturbance:
    """One thing to be done, after a pause; some last for some seconds, or have an object."""

    kind: Kind
    pause: float = 0.0
    seconds: float = 0.0
    point: str = failpoints.POINTS[0]
    clock: float = 0.0
    """Seconds by which the clock is wrong from now on."""

    @property
    def name(self) -> str:
        return f"die at {self.point}" if self.kind == "die at a point" else self.kind


def plan(
    seed: int, kinds: Sequence[Kind] = KINDS, *, longest: float = 60.0
) -> Iterator[Disturbance]:
    """Disturbances without end, the same ones for the same seed."""
    draw = random.Random(seed)
    weights = [_WEIGHTS.get(kind, 1) for kind in kinds]
    while True:
        kind = draw.choices(kinds, weights)[0]
        pause, share = draw.uniform(0, QUIET), draw.random()
        point = draw.choice(failpoints.POINTS)
        clock = draw.uniform(-3, 3) * _DAY
        # Mostly short; rarely a minute.
        suspended = min(longest, 0.1 * (longest / 0.1) ** (share**2))
        seconds = suspended if kind.startswith("suspend") else min(longest, 0.5 + 9 * share)
        yield Disturbance(kind, pause, seconds, point, clock)


class Disturber:
    """Disturbs a server in a thread: as planned, or by letting it die at every fail point.

    It is the watcher of the script: between two disturbances the script makes a step, and when
    disturbing fails, the script is told at once.
    """

    def __init__(
        self,
        server: ServerProcess,
        points: Path,
        clock: Path,
        tenants: int,
        disk: SmallDisk | None = None,
    ) -> None:
        self._server = server
        self._points = points
        self._clock = clock
        self._disk = disk
        self._progress = threading.Event()
        self._stop = threading.Event()
        self._since = dict.fromkeys(range(1, tenants + 1), 0)
        """Kills since each tenant made a step."""
        self._thread: threading.Thread | None = None
        self.done: Counter[str] = Counter()
        """How often each disturbance was made."""
        self.not_reached: list[str] = []
        """Fail points that were armed and never come to."""
        self.error: BaseException | None = None

    # --- For the script ----------------------------------------------------------------------

    def progress(self, tenant: int) -> None:
        self._since[tenant] = 0
        self._progress.set()

    def finished(self, tenant: int) -> None:
        self._since.pop(tenant)

    def check(self) -> None:
        """Raises when disturbing has failed: the server may be in a state that nothing ends."""
        if self.error is not None:
            raise DisturbingFailed("the disturber failed") from self.error

    # --- For those who let it run ------------------------------------------------------------

    @contextmanager
    def following(self, planned: Iterable[Disturbance]) -> Iterator[None]:
        """Do one thing after the other, as long as the script runs."""
        with self._running(lambda: self._follow(planned)):
            yield

    @contextmanager
    def dying_at(self, points: Iterable[str]) -> Iterator[None]:
        """Let the server die once at each of these fail points, whenever it comes to it."""
        for point in points:
            (self._points / point).touch()
        with self._running(self._look_after):
            yield

    @property
    def kills(self) -> int:
        return sum(n for name, n in self.done.items() if name.startswith(("kill", "die")))

    @contextmanager
    def _running(self, work: Callable[[], None]) -> Iterator[None]:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=guarded, name="disturber")
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._progress.set()
            self._thread.join()
            self.not_reached = sorted(path.name for path in self._points.iterdir())
            self._disarm()
            if self.error is None and not self._server.alive:
                self._server.kill_and_restart()
        self.check()

    # --- In its thread -----------------------------------------------------------------------

    def _follow(self, planned: Iterable[Disturbance]) -> None:
        for disturbance in planned:
            if not self._wait_for_progress() or self._stop.wait(disturbance.pause):
                return
            self._disturb(disturbance)

    def _wait_for_progress(self) -> bool:
        """Wait until the script has made a step, and every tenant one since the last kills."""
        while not self._stop.is_set():
            self._progress.wait()
            self._progress.clear()
            if all(kills < MOST_KILLS for kills in list(self._since.values())):
                break
        return not self._stop.is_set()

    def _look_after(self) -> None:
        """Start a server again whenever it has reached a fail point."""
        while not self._stop.wait(0.01):
            if not self._server.alive:
                self.done["die at a point"] += 1
                self._server.kill()
                self._server.launch()  # it may come to the next one while it starts

    def _disturb(self, what: Disturbance) -> None:
        server = self._server
        match what.kind:
            case "kill server":
                server.kill_and_restart()
            case "kill worker":
                while server.kill_workers() == 0 and not self._stop.wait(0.1):
                    pass  # there is none yet
            case "kill both":
                server.kill_workers()
                server.kill_and_restart()
            case "die at a point":
                if not self._die_at(what.point):
                    self.done[f"not reached: {what.point}"] += 1
                    return
            case "restart":
                server.restart()
            case "clock":
                set_clock(self._clock, what.clock)
            case _:
                with self._trouble(what.kind):
                    self._stop.wait(what.seconds)
        self.done[what.name] += 1
        if what.kind.startswith(("kill", "die")):
            for tenant in list(self._since):
                self._since[tenant] += 1

    def _trouble(self, kind: Kind) -> AbstractContextManager[None]:
        match kind:
            case "suspend server":
                return _suspended([self._server.pid])
            case "suspend worker":
                return _suspended(self._server.worker_pids())
            case "no room":
                return no_room_for_files(self._server)
            case "full disk":
                assert self._disk is not None, "there is no disk that could be filled"
                return self._disk.full()
            case "locked database":
                return locked_database(self._server)
        raise AssertionError(kind)

    def _die_at(self, point: str) -> bool:
        """Arm a fail point, wait for the server to die there, start it again."""
        (self._points / point).touch()
        deadline = time.monotonic() + LATEST
        while self._server.alive and time.monotonic() < deadline and not self._stop.is_set():
            time.sleep(0.01)
        self._disarm()
        if self._server.alive:
            return False
        self._server.kill_and_restart()
        return True

    def _disarm(self) -> None:
        for armed in self._points.iterdir():
            armed.unlink(missing_ok=True)


class DisturbingFailed(Exception):
    """What was to disturb a script did not work; its cause says why."""


@contextmanager
def _suspended(pids: Sequence[int]) -> Iterator[None]:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
