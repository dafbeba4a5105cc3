"""A server as a child process: started, killed, started again over the same data."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Self

_STARTUP = 60.0
"""Seconds that a server has to answer; it takes about one."""


class ServerDied(Exception):
    """The server ended while it was started; the message is the end of its log."""


class ServerProcess:
    """`holdfast serve` on a free port of this machine, its log in the data directory."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        self._data_dir = data_dir
        self._options = options
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        data_dir.mkdir(parents=True, exist_ok=True)
        self.log = data_dir / "server.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def start(self) -> float:
        """Start it, and wait until it answers; the seconds that took."""
        began = time.monotonic()
        command = [sys.executable, "-m", "holdfast.cli", "serve"]
        command += ["--port", str(self._port), "--data-dir", str(self._data_dir), *self._options]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        while time.monotonic() - began < _STARTUP:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", timeout=5):
                    return time.monotonic() - began
            except OSError:
                time.sleep(0.02)
        self.kill()
        raise ServerDied(self.log.read_text(errors="replace")[-2000:])

    def kill(self) -> None:
        """End it as a power cut would: SIGKILL, nothing finished, nothing closed."""
        if self._process is not None:
            if self._process.poll() is None:
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it gracefully."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
