"""What is between clients and a server: it passes all bytes on, and loses answers when told to.

The request was carried out, then the connection ends instead of the answer. A client cannot tell
that from a request that never arrived.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from tests.support.server import ServerProcess

_NO_SUBMISSIONS = (b"/retrieve_future ", b"/session_heartbeat ", b"/telemetry ")


class Network:
    """A context manager; clients use `url` instead of the server's."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._losing = 0
        self.lost = 0
        """Answers lost so far."""
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network")
        self._listening: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    def lose(self, count: int) -> None:
        """Lose the answers to the next submissions: neither polls nor heartbeats are any."""
        self._losing = count

    def __enter__(self) -> Self:
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connected, "127.0.0.1", 0), self._loop
        ).result()
        self._listening = listening
        self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        assert self._listening is not None
        self._listening.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._open(writer), suppress(OSError):
            to_read, to_write = await asyncio.open_connection("127.0.0.1", self._server.port)
            connection = _Connection(self)
            with self._open(to_write):
                tasks = [
                    asyncio.create_task(connection.requests(reader, to_write)),
                    asyncio.create_task(connection.answers(to_read, writer)),
                ]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def _open(self, writer: asyncio.StreamWriter) -> Iterator[None]:
        self._writers.add(writer)
        try:
            yield
        finally:
            self._writers.discard(writer)
            writer.close()

    def loses(self, request: bytes) -> bool:
        """Whether the answer to what begins like this is lost."""
        line = request.partition(b"\r\n")[0]
        if self._losing == 0 or not line.startswith(b"POST "):
            return False
        if any(path in line for path in _NO_SUBMISSIONS):
            return False
        self._losing -= 1
        return True


class _Connection:
    def __init__(self, network: Network) -> None:
        self._network = network
        self._loses = False

    async def requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                self._loses = self._loses or self._network.loses(data)
                writer.write(data)
                await writer.drain()

    async def answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self._loses:
                    self._network.lost += 1
                    return
                writer.write(data)
                await writer.drain()
