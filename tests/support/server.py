"""A real `holdfast serve` process: started, killed and started again on the same data and port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from holdfast.store import Manifest, NameKey, Store, open_store

START_SECONDS = 60.0
"""Far above what a start takes, so that only a server that hangs fails a test."""


class ServerProcess:
    """One server with its data directory. A context manager that starts and stops it.

    `models` are base models by name, beside the shipped one. The first one named is loaded at the
    start, every other one when it is first used. `settings` are fields of
    `holdfast.server.settings.Settings` that have no flag; they start the server through
    `tests.support.serve_with` instead of the command line.
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
    ) -> None:
        self.directory = directory
        self.data_dir = directory / "data"
        self.port = free_port()
        self._models = dict(models or {})
        self._args = list(args)
        self._settings = settings
        self._threads = threads
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / "server.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Everything that all lives of the server wrote."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def alive(self) -> bool:
        """Whether the process runs: it may have ended by itself."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        """Start the server, and wait until it answers unless `wait` is false."""
        assert self._process is None, "the server runs already"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("HOLDFAST_")},
                    **self._environment,
                },
                cwd=Path(__file__).parents[2],
            )
        if wait:
            self.wait_until_healthy()

    def wait_until_healthy(self) -> None:
        """Wait until the server answers; AssertionError with its log when it does not."""
        deadline = time.monotonic() + START_SECONDS
        while not self._is_healthy():
            ended = self._process is None or self._process.poll() is not None
            assert not ended, f"the server ended while it started:\n{self.log}"
            assert time.monotonic() < deadline, f"the server does not answer:\n{self.log}"
            time.sleep(0.02)

    def stop(self) -> None:
        """End the server as an operator would. Idempotent."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the server did not stop within 60 s:\n{self.log}") from None

    def kill(self) -> None:
        """End the server with SIGKILL."""
        assert self._process is not None, "the server does not run"
        process, self._process = self._process, None
        process.kill()  # which does nothing to one that has ended by itself
        process.wait()

    def kill_and_restart(self) -> None:
        """kill -9, and a new process on the same data and the same port."""
        self.kill()
        self.start()

    def restart(self) -> None:
        """An orderly stop, and a new process on the same data and the same port."""
        self.stop()
        self.start()

    def worker_pids(self) -> list[int]:
        """The engine workers that run now."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [
            int(pid)
            for pid in children
            if b"holdfast.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def kill_workers(self) -> int:
        """kill -9 to every engine worker of this server; how many there were."""
        pids = self.worker_pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)

    def store(self) -> Store:
        """The server's checkpoint store, opened beside it."""
        return open_store(self.data_dir / "store")

    def manifest(self, tinker_path: str) -> Manifest:
        """The manifest that a `tinker://` path points to."""
        with self.store() as store:
            found = store.resolve(key_of(tinker_path))
            assert found is not None, f"the store has no {tinker_path}"
            return store.read_manifest(found)

    def _is_healthy(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/api/v1/healthz", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def _command(self) -> list[str]:
        if self._settings is not None:
            values = {
                "data_dir": str(self.data_dir),
                "port": self.port,
                "models": {name: str(path) for name, path in self._models.items()},
                "threads": self._threads,
                "device": "cpu",
                **self._settings,
            }
            return [sys.executable, "-m", "tests.support.serve_with", json.dumps(values)]
        models = [f"--model={name}={path}" for name, path in self._models.items()]
        return [
            str(Path(sys.executable).with_name("holdfast")),
            "serve",
            f"--data-dir={self.data_dir}",
            f"--port={self.port}",
            f"--threads={self._threads}",
            "--device=cpu",
            *models,
            *self._args,
        ]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def key_of(tinker_path: str) -> NameKey:
    """The store's key of a `tinker://RUN/KIND/NAME` path."""
    run, kind, name = tinker_path.removeprefix("tinker://").split("/")
    return NameKey(run, kind, name)
