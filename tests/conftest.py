"""Settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from holdfast.catalog import Catalog
from tests.support.postgres import BINARIES, MISSING, Postgres, postgres_server
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


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server, started when the first test asks for it."""
    if BINARIES is None:
        pytest.skip(MISSING)
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def open_catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Catalog]:
    """Opens the same new catalog each time, on each kind of database."""
    if request.param == "SQLite":
        return partial(Catalog.open_file, tmp_path / "catalog.db")
    server = request.getfixturevalue("postgres")
    assert isinstance(server, Postgres)
    return partial(Catalog.open, server.catalog())


@pytest.fixture
def catalog(open_catalog: Callable[[], Catalog]) -> Iterator[Catalog]:
    """A new catalog, on each kind of database."""
    catalog = open_catalog()
    yield catalog
    catalog.close()
