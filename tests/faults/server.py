"""A server that faults are done to: with fail points, a clock of its own, and quick starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from holdfast.cli.server_process import ServerDied
from tests.faults.preloaded import working_pid
from tests.support.postgres import Postgres
from tests.support.server import ServerProcess

BASE_MODEL = "small-llama"
SITE = Path(__file__).with_name("site")
"""To be found by its processes before what is installed."""


_UNTIL_HEALTHY = 300.0
"""Seconds: a campaign runs beside whatever else there is to do."""
_PAUSE = 0.02


class _StoodIn(subprocess.Popen[bytes]):
    """What stands in for a preloaded server: signals are for the server itself."""

    def __init__(
        self, directory: Path, command: list[str], log: BinaryIO, environment: dict[str, str]
    ) -> None:
        super().__init__(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self._directory = directory

    def send_signal(self, sig: int) -> None:
        pid = self.working()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, sig)

    def working(self) -> int | None:
        """The process of the server, waiting for it to be forked; None when it has ended."""
        while self.poll() is None:
            pid = working_pid(self._directory, self.pid)
            if pid is not None:
                return pid
            time.sleep(0.002)
        return None


class FaultyServer(ServerProcess):
    """`preloaded` is where it and its workers are forked; without it they start as a user's do.

    `limits` are constants that are to be others, by their names, see `tests.faults.limits`. With
    `postgres`, its catalog is a new database there. `args` are options of `holdfast serve`.
    """

    def __init__(
        self,
        directory: Path,
        model: Path,
        preloaded: Path | None = None,
        limits: Mapping[str, float] | None = None,
        postgres: Postgres | None = None,
        args: Sequence[str] = (),
    ) -> None:
        self.points = directory.with_name(f"{directory.name}-points")
        """An empty file named as a fail point arms it."""
        self.points.mkdir(parents=True)
        self.clock = directory.with_name(f"{directory.name}-clock")
        self._preloaded = preloaded
        environment = {"HOLDFAST_FAILPOINTS": str(self.points), "FAULTS_CLOCK": str(self.clock)}
        if preloaded is not None:
            environment["FAULTS_PRELOADED"] = str(preloaded)
        if limits is not None:
            environment["FAULTS_LIMITS"] = json.dumps(dict(limits))
        self.postgres = postgres
        if postgres is not None:
            environment["HOLDFAST_CATALOG"] = self.database = postgres.database()
        super().__init__(
            directory,
            models={BASE_MODEL: model},
            args=args,
            environment=environment,
            paths=[SITE],
        )

    @property
    def pid(self) -> int:
        """The server's process; that which stands in for it only until there is one."""
        process = self._process
        working = process.working() if isinstance(process, _StoodIn) else None
        return super().pid if working is None else working

    def launch(self) -> None:
        """Start it, and wait for nothing."""
        if self._preloaded is None:
            super().launch()
            return
        assert not self.alive, "the server runs already"
        with self.log_file.open("ab") as log:
            self._process = _StoodIn(self._preloaded, self.command(), log, self.environment())

    def worker_pids(self) -> list[int]:
        """The engine workers that run now; not those that stand in for one."""
        found = super().worker_pids()
        if self._preloaded is None:
            return found
        return [pid for each in found if (pid := working_pid(self._preloaded, each)) is not None]

    def children(self) -> list[int]:
        """The processes that it has started, and those for which they stand in."""
        found = super().children()
        if self._preloaded is None:
            return found
        return [*found, *(pid for each in found if (pid := working_pid(self._preloaded, each)))]

    def terminate(self) -> None:
        """Ask it to end, and wait for nothing."""
        os.kill(self.pid, signal.SIGTERM)

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5):
                return True
        except OSError:
            return False

    def wait_until_healthy(self) -> None:
        """Wait until it answers. Raises ServerDied."""
        end = time.monotonic() + _UNTIL_HEALTHY
        while self.alive and time.monotonic() < end:
            if self.healthy():
                return
            time.sleep(_PAUSE)
        raise ServerDied(self.log[-3000:])

    def keep_starting(self, seconds: float | None = None) -> None:
        """See to it that it runs, as a supervisor does: start it again whenever it has ended.

        For so many seconds, or until it answers.
        """
        end = time.monotonic() + (_UNTIL_HEALTHY if seconds is None else seconds)
        while time.monotonic() < end:
            if not self.alive:
                self.launch()
            elif seconds is None and self.healthy():
                return
            time.sleep(_PAUSE)
        if seconds is None:
            raise ServerDied(self.log[-3000:])
