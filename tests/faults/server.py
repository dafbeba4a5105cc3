"""A server that faults are done to: with fail points, and a clock of its own."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.cli.server_process import ServerDied
from tests.support.postgres import Postgres
from tests.support.server import ServerProcess

BASE_MODEL = "small-llama"
_UNTIL_HEALTHY = 300.0
"""Seconds: a campaign runs beside whatever else there is to do."""
_PAUSE = 0.02


class FaultyServer(ServerProcess):
    """`limits` are constants that are to be others, by name, see `tests.support.limits`.

    With `postgres`, its catalog is a new database there. `args` are options of `holdfast serve`.
    """

    def __init__(
        self,
        directory: Path,
        model: Path,
        *,
        limits: Mapping[str, float] | None = None,
        postgres: Postgres | None = None,
        args: Sequence[str] = (),
        quick: bool = True,
    ) -> None:
        self.points = directory.with_name(f"{directory.name}-points")
        """An empty file named as a fail point arms it."""
        self.points.mkdir(parents=True)
        self.clock = directory.with_name(f"{directory.name}-clock")
        environment = {"HOLDFAST_FAILPOINTS": str(self.points), "FAULTS_CLOCK": str(self.clock)}
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
            quick=quick,
        )

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
