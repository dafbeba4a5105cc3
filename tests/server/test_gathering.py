"""The head of an answer and its body come in one piece, and nothing is held back for long."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from holdfast.server.gathering import _MOST_HELD, Gathering, GatheringProtocol

pytestmark = pytest.mark.anyio


class Connection(asyncio.Transport):
    """Notes what it is given to send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert self.sent[-1:] != [b"closed"]
        self.sent.append(bytes(data))

    def close(self) -> None:
        self.sent.append(b"closed")


async def test_what_one_turn_writes_is_sent_at_its_end_in_one_piece() -> None:
    connection = Connection()
    gathering = Gathering(connection, asyncio.get_running_loop())
    gathering.write(b"head ")
    gathering.write(b"body")
    assert connection.sent == []
    await asyncio.sleep(0)
    assert connection.sent == [b"head body"]
    gathering.write(b"next")
    await asyncio.sleep(0)
    assert connection.sent == [b"head body", b"next"]


async def test_nothing_is_held_back_when_it_is_much() -> None:
    """Or else whoever writes it would not learn that the client reads slowly."""
    connection = Connection()
    gathering = Gathering(connection, asyncio.get_running_loop())
    gathering.write(b"head")
    gathering.write(bytes(_MOST_HELD))
    assert connection.sent == [b"head" + bytes(_MOST_HELD)]
    await asyncio.sleep(0)
    assert len(connection.sent) == 1


async def test_what_is_held_back_is_sent_before_the_end() -> None:
    connection = Connection()
    gathering = Gathering(connection, asyncio.get_running_loop())
    gathering.write(b"answer")
    gathering.close()
    await asyncio.sleep(0)
    assert connection.sent == [b"answer", b"closed"]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the path and the body, in two pieces; slowly where the path says so."""
    body = b""
    more = True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    if scope["path"] == "/slow":
        await asyncio.sleep(0.05)
    answer = scope["path"].encode() + b" " + body
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer[:1], "more_body": True})
    await send({"type": "http.response.body", "body": answer[1:]})


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected() -> AsyncIterator[Streams]:
    """A connection to a server with this protocol."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(echo, http=GatheringProtocol, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        try:
            async with asyncio.timeout(20):
                yield reader, writer
        finally:
            writer.close()
            server.should_exit = True
            await serving


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: server", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n"), head
    (size,) = (line[16:] for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
    return await reader.readexactly(int(size))


async def test_requests_that_come_at_once_are_answered_in_their_order() -> None:
    async with connected() as (reader, writer):
        large = bytes(3 * _MOST_HELD)
        for path, body in (("/slow", b"1"), ("/a", b""), ("/b", large), ("/c", b"4")):
            writer.write(post(path, body))
        assert await answer(reader) == b"/slow 1"
        assert await answer(reader) == b"/a "
        assert await answer(reader) == b"/b " + large
        assert await answer(reader) == b"/c 4"


async def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    async with connected() as (reader, writer):
        request = post("/a", b"body", "expect: 100-continue")
        writer.write(request[:-4])
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(request[-4:])
        assert await answer(reader) == b"/a body"


async def test_the_last_answer_comes_before_the_end_of_the_connection() -> None:
    async with connected() as (reader, writer):
        writer.write(post("/a", b"1", "connection: close"))
        assert await answer(reader) == b"/a 1"
        assert await reader.read() == b""
