"""A real S3 server process on loopback (moto's), for as long as the tests run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx2

from holdfast.cli.server_process import free_port

_STARTUP = 60.0
"""Seconds; far above what a start takes."""


class S3Server:
    """A server that runs. Every test takes a bucket of its own."""

    def __init__(self, url: str) -> None:
        self.url = url

    def bucket(self) -> str:
        """The name of a new bucket."""
        name = f"bucket-{uuid4().hex}"
        httpx2.put(f"{self.url}/{name}").raise_for_status()
        return name

    @property
    def environment(self) -> dict[str, str]:
        """What makes S3 clients use this server."""
        return environment_of(self.url)


def environment_of(url: str) -> dict[str, str]:
    """What makes S3 clients use a server at this address."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """Start a server, which writes its log into the directory."""
    port = free_port()
    log = directory / "s3.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + _STARTUP
        while True:
            try:
                httpx2.get(f"{url}/moto-api/", timeout=5)
                break
            except httpx2.TransportError:
                assert process.poll() is None, f"the S3 server ended:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"it does not answer:\n{log.read_text()}"
                time.sleep(0.05)
        yield S3Server(url)
    finally:
        process.kill()
        process.wait()
