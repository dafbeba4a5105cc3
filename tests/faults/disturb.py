"""Disturbs a server while a script trains on it: kills, suspensions, a full disk, …"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from tests.faults.network import Network
from tests.faults.plan import Disturbance, Kind
from tests.faults.server import FaultyServer
from tests.faults.surroundings import (
    SmallDisk,
    damage_newest_snapshot,
    locked_database,
    no_room_for_files,
    set_clock,
)
from tests.support.processes import suspended

MOST_DEATHS = 2
"""Of the worker, between two steps of any one tenant: an operation that kills its worker by itself
does it three times."""
MOST_DISTURBANCES = 3
"""Likewise: an operation that is under way at six ends of the server is taken for their cause."""
LONGEST_OUTAGE = 10.0
"""Seconds of disturbances in a row, likewise: the Elixir client tries a request for one minute."""
LATEST = 3.0
"""Seconds for which a server may not come to what is to happen to it."""
_LOADED = "base model ready"
_HANGS = 120.0
"""Seconds after which a server that leaves a hung worker alone has failed."""


@dataclass(slots=True)
class _Since:
    """What was done since a tenant made a step."""

    deaths: int = 0
    """Of the worker."""
    disturbances: int = 0
    outage: float = 0.0
    """Seconds of them."""

    @property
    def bearable(self) -> bool:
        return (
            self.deaths < MOST_DEATHS
            and self.disturbances < MOST_DISTURBANCES
            and self.outage < LONGEST_OUTAGE
        )


class Disturber:
    """Disturbs a server in a thread: as planned, or by letting it die at fail points.

    It is the watcher of the script: between two disturbances the script makes a step, and when
    disturbing fails, the script is told at once.
    """

    def __init__(
        self,
        server: FaultyServer,
        tenants: int,
        *,
        disk: SmallDisk | None = None,
        network: Network | None = None,
    ) -> None:
        self._server = server
        self._disk = disk
        self._network = network
        self._steps = 0
        self._progress = threading.Event()
        self._stop = threading.Event()
        self._since = {tenant: _Since() for tenant in range(1, tenants + 1)}
        self._thread: threading.Thread | None = None
        self.done: Counter[str] = Counter()
        """How often each disturbance was made."""
        self.kills = 0
        """Processes ended by SIGKILL; a server and its worker together are one."""
        self.not_reached: list[str] = []
        """Fail points that were armed and never come to."""
        self.error: BaseException | None = None

    # --- For the script ----------------------------------------------------------------------

    def progress(self, tenant: int) -> None:
        self._since[tenant] = _Since()
        self._steps += 1
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
    def dying_at(self, points: Sequence[str], every: int) -> Iterator[None]:
        """Let the server die once at each of these fail points, whenever it comes to it.

        One more is armed after `every` steps of the script.
        """
        with self._running(lambda: self._die_at_each(points, every)):
            yield

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
            self.not_reached += sorted(path.name for path in self._server.points.iterdir())
            self._disarm()
            if self.error is None and not self._server.alive:
                self._server.kill_and_restart()
            self.check()

    # --- In its thread -----------------------------------------------------------------------

    def _follow(self, planned: Iterable[Disturbance]) -> None:
        for disturbance in planned:
            done = False
            while not done:
                if not self._wait_for_progress() or self._stop.wait(disturbance.pause):
                    return
                began = time.monotonic()
                done = self._disturb(disturbance)
                for since in list(self._since.values()):
                    since.disturbances += 1
                    since.outage += time.monotonic() - began

    def _wait_for_progress(self) -> bool:
        """Wait until the script has made a step, and every tenant one before it is too much."""
        while not self._stop.is_set():
            self._progress.wait()
            self._progress.clear()
            if all(since.bearable for since in list(self._since.values())):
                break
        return not self._stop.is_set()

    def _die_at_each(self, points: Sequence[str], every: int) -> None:
        left = list(points)
        while not self._stop.wait(0.01):
            if left and self._steps >= every * (len(points) - len(left)):
                (self._server.points / left.pop(0)).touch()
            if not self._server.alive:
                self._died("die at a point")
                self._server.kill()
                self._server.launch()  # it may come to the next one while it starts
        self.not_reached += left

    def _disturb(self, what: Disturbance) -> bool:
        """False when it was not possible now; then the server was only restarted."""
        server, seconds = self._server, what.seconds
        match what.kind:
            case "kill server":
                self._kill_server()
            case "kill worker":
                self._kill_worker()
            case "kill both":
                if server.kill_workers():
                    self._worker_died()
                self._kill_server()
            case "kill while starting":
                self._kill_while_starting(seconds)
            case "kill while stopping":
                server.terminate()
                self._stop.wait(seconds)
                self._kill_server()
            case "die at a point":
                if not self._die_at(what.point):
                    self.done[f"not reached: {what.point}"] += 1
                    return True
            case "restart":
                server.restart()
            case "hung worker":
                self._hang(self._new_workers())
            case "worker hung while loading":
                self._hang_while_loading()
            case "clock":
                set_clock(server.clock, what.clock)
            case "lost answers":
                self._lose_answers(1 + int(seconds) % 3)
            case "PostgreSQL restart" | "PostgreSQL crash" | "PostgreSQL cut off":
                self._disturb_postgres(what.kind, seconds)
            case "damaged snapshot" | "damaged manifest":
                server.stop()  # which keeps a snapshot of each run
                damaged = damage_newest_snapshot(server, manifest=what.kind == "damaged manifest")
                server.start()
                if not damaged:
                    return False
            case _:
                during, _, trouble = what.kind.rpartition(", ")
                with self._trouble(trouble):
                    self._stop.wait(seconds if not during else seconds / 2)
                    if during:
                        self._start_in_trouble(during, seconds / 2)
                server.keep_starting()
        self.done[what.name] += 1
        return True

    def _disturb_postgres(self, kind: Kind, seconds: float) -> None:
        postgres = self._server.postgres
        assert postgres is not None
        if kind == "PostgreSQL cut off":
            postgres.cut_off(self._server.database)
        elif kind == "PostgreSQL restart":
            postgres.restart()
        else:
            postgres.stop(signal.SIGQUIT)
            self._stop.wait(seconds)
            postgres.start()

    def _kill_server(self) -> None:
        self.kills += 1
        self._server.kill_and_restart()

    def _kill_worker(self) -> list[int]:
        """Its worker, once it has one; which it was."""
        pids = self._new_workers()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kills += 1
        self._worker_died()
        return pids

    def _worker_died(self) -> None:
        for since in list(self._since.values()):
            since.deaths += 1

    def _kill_while_starting(self, seconds: float) -> None:
        """The server as it comes up, then the worker while it brings the runs back."""
        self._server.kill()
        self.kills += 1
        self._server.launch()
        self._stop.wait(seconds)
        self._kill_server()
        self._new_workers()
        self._stop.wait(seconds / 4)
        self._kill_worker()

    def _hang(self, pids: Sequence[int]) -> None:
        """Suspend these workers until their server has ended them."""
        with suspended(pids):
            end = time.monotonic() + _HANGS
            while set(pids) & set(self._server.worker_pids()) and not self._stop.wait(0.1):
                assert time.monotonic() < end, "the server leaves a hung worker alone"
        self._worker_died()

    def _hang_while_loading(self) -> None:
        """Suspend a new worker before it has loaded its base model, until it has been ended."""
        while not self._stop.is_set():
            pids = self._new_workers(self._kill_worker())
            loaded = self._server.log.count(_LOADED)
            with suspended(pids):
                self._stop.wait(0.3)
                if self._server.log.count(_LOADED) == loaded:
                    self._hang(pids)
                    return

    def _new_workers(self, before: Collection[int] = ()) -> list[int]:
        """Wait for a worker, other than those; none when the script ends first."""
        while not (pids := set(self._server.worker_pids()) - set(before)):
            if self._stop.wait(0.002):
                break
        return list(pids)

    def _lose_answers(self, count: int) -> None:
        assert self._network is not None, "nothing is between the clients and the server"
        before = self._network.lost
        self._network.lose(count)
        end = time.monotonic() + LATEST
        while self._network.lost - before < count and time.monotonic() < end:
            if self._stop.wait(0.02):
                break
        self._network.lose(0)

    def _start_in_trouble(self, during: str, seconds: float) -> None:
        """Kill or restart the server; for some seconds it may not be able to start."""
        if during == "kill":
            self.kills += 1
            self._server.kill()
        else:
            assert during == "restart", during
            self._server.stop()
        self._server.keep_starting(seconds)

    def _trouble(self, kind: str) -> AbstractContextManager[None]:
        match kind:
            case "suspend server":
                return suspended([self._server.pid])
            case "suspend worker":
                return suspended(self._server.worker_pids())
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
        (self._server.points / point).touch()
        deadline = time.monotonic() + LATEST
        while self._server.alive and time.monotonic() < deadline and not self._stop.is_set():
            time.sleep(0.01)
        self._disarm()
        if self._server.alive:
            return False
        self._kill_server()
        return True

    def _died(self, name: str) -> None:
        self.done[name] += 1
        self.kills += 1

    def _disarm(self) -> None:
        for armed in self._server.points.iterdir():
            armed.unlink(missing_ok=True)


class DisturbingFailed(Exception):
    """What was to disturb a script did not work; its cause says why."""
