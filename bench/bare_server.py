"""The least that a server of this kind can do: bodies over HTTP into two rows of SQLite, durably.

The same HTTP server, event loop and database as Holdfast's, with one thread that commits what has
come together. No body is looked at, and the write-ahead log only grows. What `bench.journal`
compares with.

    python -m bench.bare_server PORT FILE
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import sys
import threading
from typing import Any

import uvicorn

_SCHEMA = """
CREATE TABLE operations (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, size INTEGER NOT NULL);
CREATE TABLE contents (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
"""
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=0")
_HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-length", b"2"), (b"content-type", b"application/json")],
}

_Item = tuple[bytes, "asyncio.Future[None]"]


class BareServer:
    """An ASGI app."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        message = await receive()
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        durable = asyncio.get_running_loop().create_future()
        self._items.put((body, durable))
        await durable
        await send(_HEAD)
        await send({"type": "http.response.body", "body": b"{}"})

    def _write(self) -> None:
        connection = sqlite3.connect(self._file, isolation_level=None)
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        connection.executescript(_SCHEMA)
        while True:
            batch = [self._items.get()]
            while not self._items.empty():
                batch.append(self._items.get())
            connection.execute("BEGIN IMMEDIATE")
            for body, _ in batch:
                values = ("forward_backward", len(body))
                connection.execute("INSERT INTO operations (kind, size) VALUES (?, ?)", values)
                connection.execute("INSERT INTO contents (data) VALUES (?)", (body,))
            connection.execute("COMMIT")
            batch[0][1].get_loop().call_soon_threadsafe(_tell, batch)


def _tell(batch: list[_Item]) -> None:
    for _, durable in batch:
        durable.set_result(None)


if __name__ == "__main__":
    uvicorn.run(
        BareServer(sys.argv[2]),
        port=int(sys.argv[1]),
        access_log=False,
        lifespan="off",
        log_config=None,
        proxy_headers=False,
    )
