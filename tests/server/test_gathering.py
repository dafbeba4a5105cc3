"""The head of an answer and its body come in one piece, and nothing is held back for long."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.server.gathering import _MOST_HELD, Gathering

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
