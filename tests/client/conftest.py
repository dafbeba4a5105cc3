"""Clients of the scripted server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast import RetryConfig, ServiceClient, TrainingClient
from tests.client.scripted import ScriptedServer

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
