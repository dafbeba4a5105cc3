"""A server as a child process: started, killed, started again over the same data."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Self

_STARTUP = 60.0
"""Seconds that a server has to answer; it takes about one."""
_SHUTDOWN = 30.0


class ServerDied(Exception):
    """The server ended while it was started; the message is the end of its log."""


class ServerProcess:
    """`holdfast serve` on a free port of this machine, its log in the data directory.

    Started, killed and started again on the same data and the same port. A context manager that
    starts and stops it.
    """

    def __init__(self, data_dir: Path, *options: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        data_dir.mkdir(parents=True, exist_ok=True)
        self.log_file = data_dir / "server.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None, "the server does not run"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs: it may have ended by itself."""
        return self._process is not None and self._process.poll() is None

    def command(self) -> list[str]:
        """What is executed."""
        return [
            sys.executable,
            "-m",
            "holdfast.cli",
            "serve",
            f"--port={self.port}",
            f"--data-dir={self.data_dir}",
            *self._options,
        ]

    def environment(self) -> dict[str, str]:
        """What it is executed with: where this machine's other servers keep things is not said."""
        elsewhere = ("HOLDFAST_STORE", "HOLDFAST_CATALOG", "HOLDFAST_CONFIG")
        return {name: value for name, value in os.environ.items() if name not in elsewhere}

    def start(self) -> float:
        """Start it, and wait until it answers; the seconds that took. Raises ServerDied."""
        began = time.monotonic()
        self.launch()
        self.wait_until_healthy()
        return time.monotonic() - began

    def launch(self) -> None:
        """Start it, and wait for nothing."""
        assert not self.alive, "the server runs already"
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
            )

    def wait_until_healthy(self) -> None:
        """Wait until it answers. Raises ServerDied when it ended, or does not answer in time."""
        deadline = time.monotonic() + _STARTUP
        while self.alive and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", timeout=5):
                    return
            except OSError:
                time.sleep(0.02)
        self.kill()
        raise ServerDied(self.log_file.read_text(errors="replace")[-2000:])

    def kill(self) -> None:
        """End it as a power cut would: SIGKILL, nothing finished, nothing closed. Idempotent."""
        if self._process is not None:
            self._process.kill()  # which does nothing to one that has ended by itself
            self._process.wait()
            self._process = None

    def stop(self) -> bool:
        """End it gracefully; False when it had to be killed. Idempotent."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_SHUTDOWN)
            except subprocess.TimeoutExpired:
                self.kill()
                return False
            self._process = None
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
