"""A network that breaks at random between the client and a real server changes no bit."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from types import TracebackType
from typing import Self

import pytest

from holdfast import AdamParams, Future, RetryConfig, ServiceClient, TrainingClient, types
from tests.client.scenario import MODEL, batch
from tests.support.server import ServerProcess

SEEDS = (1, 2, 3, 4, 5, 6)


class FlakyProxy:
    """Passes bytes on until a connection's luck runs out, in either direction; then resets both."""

    def __init__(self, port: int, seed: int) -> None:
        self.broken = 0
        self._target = port
        self._draw = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()

        async def listen() -> None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result(5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        async def stop() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _reset(writer)
            return
        budgets = [self._draw.choice((200, 900, 1500, 3000, 6000)) for _ in range(2)]
        pumps = [
            asyncio.create_task(_pump(reader, back, budgets[0])),
            asyncio.create_task(_pump(there, writer, budgets[1])),
        ]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            self.broken += any(not task.cancelled() and task.result() for task in done)
        except asyncio.CancelledError:
            pass
        finally:
            for task in pumps:
                task.cancel()
            _reset(writer)
            _reset(back)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int) -> bool:
    """Whether it ended because the budget was used up."""
    try:
        while data := await reader.read(4096):
            writer.write(data[:budget])
            await writer.drain()
            budget -= len(data)
            if budget <= 0:
                return True
    except ConnectionError:
        pass
    return False


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def whole(client: TrainingClient) -> list[object]:
    """What every operation of a training showed; each step's metrics count its batch."""
    futures: list[Future[object]] = []
    for seed in SEEDS:
        futures.append(client.forward_backward(batch(types, seed), "cross_entropy"))  # type: ignore[arg-type]
        futures.append(client.optim_step(AdamParams(learning_rate=2e-3)))  # type: ignore[arg-type]
    return [future.result(100) for future in futures]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_training_through_a_breaking_network_is_the_same_to_the_last_bit(
    server: ServerProcess, seed: int
) -> None:
    with ServiceClient(base_url=server.url) as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=5).result(60)
        calm = whole(client)
        path = client.save_state("end").result(60).path
    patience = RetryConfig(give_up_after=100.0, first_delay=0.005, max_delay=0.05)
    with (
        FlakyProxy(server.port, seed) as proxy,
        ServiceClient(base_url=f"http://127.0.0.1:{proxy.port}", retry_config=patience) as service,
    ):
        client = service.create_lora_training_client(MODEL, rank=4, seed=5).result(60)
        shaken = whole(client)
        other = client.save_state("end").result(100).path
        assert proxy.broken >= 5, "the network was too good to prove anything"
    assert shaken == calm
    assert hashes(server, path) == hashes(server, other)


def hashes(server: ServerProcess, path: str) -> dict[str, str]:
    return {name: blob.hash for name, blob in server.manifest(path).files.items()}


@pytest.mark.timeout(100)
def test_one_operation_more_would_be_seen(server: ServerProcess) -> None:
    """The negative: a forward_backward applied twice changes what the test compares."""
    with ServiceClient(base_url=server.url) as service:
        once = service.create_lora_training_client(MODEL, rank=4, seed=5).result(60)
        twice = service.create_lora_training_client(MODEL, rank=4, seed=5).result(60)
        twice.forward_backward(batch(types, SEEDS[0]), "cross_entropy").result(60)
        assert whole(once) != whole(twice)
