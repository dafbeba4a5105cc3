"""Settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.s3 import S3Server, s3_server

# Read when torch is first imported. Tests share the processors with each other and with servers:
# as in a worker, a compute thread that waits must not keep others from running.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server, started when the first test asks for it."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, to which the environment points."""
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    return s3_process
