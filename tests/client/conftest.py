"""Clients of the scripted server."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from holdfast import RetryConfig, ServiceClient, TrainingClient
from tests.client.scripted import ScriptedServer
from tests.support.server import ServerProcess

QUICK = RetryConfig(give_up_after=10.0, first_delay=0.01, max_delay=0.05)


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def client(scripted: ScriptedServer) -> Iterator[ServiceClient]:
    with ServiceClient(base_url=scripted.url, retry_config=QUICK) as made:
        yield made


@pytest.fixture
def training(client: ServiceClient) -> TrainingClient:
    return client.create_lora_training_client("tiny", rank=8).result(10)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server with the shipped model, for all tests of the client that need one."""
    with ServerProcess(tmp_path_factory.mktemp("client-server")) as running:
        yield running


@pytest.fixture
def service(server: ServerProcess) -> Iterator[ServiceClient]:
    with ServiceClient(base_url=server.url) as made:
        yield made


@contextmanager
def quiet(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Fails when the loop has anything to complain about, as of an error that nobody asked for."""
    complaints: list[object] = []
    gc.collect()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        yield
        gc.collect()  # asyncio complains when it throws the future away
        assert complaints == []
    finally:
        loop.set_exception_handler(before)
