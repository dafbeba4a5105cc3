"""A real `holdfast serve` process: started, killed and started again on the same data and port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from holdfast.cli import server_process
from holdfast.server.data_dir import existing_store
from holdfast.store import Manifest, NameKey, Store
from tests.support.preloaded import IS_POSSIBLE, python_path, quick_starts, working_pid


class _StoodIn(subprocess.Popen[bytes]):
    """What stands in for a preloaded server: signals are for the server itself."""

    def __init__(self, command: list[str], log: BinaryIO, environment: dict[str, str]) -> None:
        super().__init__(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def send_signal(self, sig: int) -> None:
        pid = self.working()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, sig)

    def working(self) -> int | None:
        """The process of the server, waiting for it to be forked; None when it has ended."""
        while self.poll() is None:
            pid = working_pid(self.pid)
            if pid is not None:
                return pid
            time.sleep(0.002)
        return None


class ServerProcess(server_process.ServerProcess):
    """One server with its data directory, and a look into both.

    `models` are base models by name, beside the shipped one. The first one named is loaded at the
    start, every other one when it is first used. `settings` are fields of
    `holdfast.server.settings.Settings` that have no flag; they start the server through
    `tests.support.serve_with` instead of the command line, and each start reads them anew. A
    `quick` one and its workers are forked from what has loaded libraries, see
    `tests.support.preloaded`; others start as a user's do.
    """

    def __init__(
        self,
        directory: Path,
        *,
        models: Mapping[str, Path] | None = None,
        args: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
        quick: bool = True,
    ) -> None:
        super().__init__(
            directory / "data",
            f"--threads={threads}",
            "--device=cpu",
            *(f"--model={name}={path}" for name, path in (models or {}).items()),
            *args,
        )
        self.directory = directory
        self.log_file = directory / "server.log"
        self._models = dict(models or {})
        self.settings = settings
        self._threads = threads
        self._environment = dict(environment or {})
        self._quick = quick and IS_POSSIBLE

    @property
    def pid(self) -> int:
        """The server's process; that which stands in for it only until there is one."""
        process = self._process
        working = process.working() if isinstance(process, _StoodIn) else None
        return super().pid if working is None else working

    @property
    def log(self) -> str:
        """Everything that all lives of the server wrote."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def command(self) -> list[str]:
        if self.settings is None:
            return super().command()
        values = {
            "data_dir": str(self.data_dir),
            "port": self.port,
            "models": {name: str(path) for name, path in self._models.items()},
            "threads": self._threads,
            "device": "cpu",
            **self.settings,
        }
        return [sys.executable, "-m", "tests.support.serve_with", json.dumps(values)]

    def environment(self) -> dict[str, str]:
        """Nothing of whoever runs the tests decides what a server does."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith("HOLDFAST_")}
        start = quick_starts() if self._quick else {"PYTHONPATH": python_path()}
        return {**ours, **start, **self._environment}

    def launch(self) -> None:
        """Start it, and wait for nothing."""
        if not self._quick:
            super().launch()
            return
        assert not self.alive, "the server runs already"
        with self.log_file.open("ab") as log:
            self._process = _StoodIn(self.command(), log, self.environment())

    def stop(self) -> bool:
        """End the server as an operator would. Idempotent."""
        assert super().stop(), f"the server did not stop in time:\n{self.log}"
        return True

    def kill_and_restart(self) -> None:
        """kill -9, and a new process on the same data and the same port."""
        self.kill()
        self.start()

    def restart(self) -> None:
        """An orderly stop, and a new process on the same data and the same port."""
        self.stop()
        self.start()

    def children(self) -> list[int]:
        """The processes that the server has started, and those for which they stand in."""
        found = self._children()
        return [
            *found,
            *(pid for each in found if (pid := self._working(each)) not in (None, each)),
        ]

    def worker_pids(self) -> list[int]:
        """The engine workers that run now; not those that stand in for one."""
        found = [pid for pid in self._children() if b"holdfast.engine.worker" in _command_line(pid)]
        return [pid for each in found if (pid := self._working(each)) is not None]

    def _children(self) -> list[int]:
        try:
            found = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended by itself
            return []
        return [int(pid) for pid in found.split()]

    def _working(self, pid: int) -> int | None:
        """The process for which one stands in, if it does."""
        return working_pid(pid) if self._quick else pid

    def kill_workers(self) -> int:
        """kill -9 to every engine worker of this server; how many there were."""
        pids = self.worker_pids()
        for pid in pids:
            with suppress(ProcessLookupError):  # it has ended by itself meanwhile
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def store(self) -> Store:
        """The server's checkpoint store, opened beside it."""
        return existing_store(self.data_dir, None)

    def manifest(self, tinker_path: str) -> Manifest:
        """The manifest that a `tinker://` path points to."""
        with self.store() as store:
            found = store.resolve(key_of(tinker_path))
            assert found is not None, f"the store has no {tinker_path}"
            return store.read_manifest(found)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""  # it has ended


def key_of(tinker_path: str) -> NameKey:
    """The store's key of a `tinker://RUN/KIND/NAME` path."""
    run, kind, name = tinker_path.removeprefix("tinker://").split("/")
    return NameKey(run, kind, name)
