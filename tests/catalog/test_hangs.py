"""A PostgreSQL server that stops to answer, while its machine acknowledges what it is sent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from holdfast.catalog import Catalog, CatalogUnavailable, database, postgresql
from holdfast.catalog.database import SYNC_FAILED
from tests.catalog.replaced import add_key, add_one_over, keys
from tests.support.postgres import Postgres

TAKES = 0.5
"""Seconds that these tests wait for an answer."""
AT_ONCE = 20 * TAKES
"""Seconds within which whoever waits no longer than that is told, on a busy machine."""


@contextmanager
def suspended(*pids: int, takes: float = TAKES) -> Iterator[Callable[[], None]]:
    """Processes that do nothing until this ends, or the function that it gives is called.

    A transaction that they do not answer is given up after `takes` seconds.
    """

    def wake() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.MonkeyPatch.context() as changes:
            changes.setattr(database, "READ_TAKES", TAKES)
            changes.setattr(database, "WRITE_TAKES", takes)
            changes.setattr(database, "WRITE_WAITS", TAKES)
            yield wake
    finally:
        wake()


async def writer_of(catalog: Catalog) -> int:
    """The process of the server that serves a catalog's writer."""
    found: int = await catalog.write(lambda c: c.scalar(sa.text("SELECT pg_backend_pid()")))
    return found


async def eventually(write: Callable[[], Awaitable[object]]) -> None:
    """What is tried until it is taken: the session that was given up ends when it can."""
    async with asyncio.timeout(30):
        while True:
            try:
                await write()
                return
            except CatalogUnavailable:
                await asyncio.sleep(0.05)


async def unavailable(catalog: Catalog, *, match: str, key: str = "refused") -> None:
    began = time.monotonic()
    with pytest.raises(CatalogUnavailable, match=match):
        await catalog.write(partial(add_key, key=key))
    assert time.monotonic() - began < AT_ONCE


@pytest.mark.anyio
async def test_a_write_that_is_not_answered_is_given_up_and_was_not_made(opened: Catalog) -> None:
    await opened.claim("the server")
    with suspended(await writer_of(opened)):
        await unavailable(opened, match="not answered in time")
        # The session that hangs still has the lease, which nobody may take from it.
        await unavailable(opened, match="lease")
    await eventually(lambda: opened.write(partial(add_key, key="after")))
    assert await opened.read(keys) == ["after"]
    opened.verify_epoch()


@pytest.mark.anyio
async def test_a_server_that_wakes_in_time_was_only_slow(opened: Catalog) -> None:
    pid = await writer_of(opened)
    with suspended(pid, takes=30.0) as wake:
        waking = threading.Timer(TAKES, wake)
        waking.start()
        await opened.write(partial(add_key, key="a"))
        waking.join()
    assert await opened.read(keys) == ["a"]
    assert await writer_of(opened) == pid


@pytest.mark.anyio
async def test_nobody_waits_for_a_writer_that_hangs(opened: Catalog) -> None:
    """Who comes meanwhile is told, though what the writer has in hand is not decided."""
    with suspended(await writer_of(opened), takes=30.0) as wake:
        in_hand = asyncio.create_task(opened.write(partial(add_key, key="in hand")))
        await asyncio.sleep(0.1)
        later = [unavailable(opened, match="not come to this write") for _ in range(20)]
        await asyncio.gather(*later)
        assert not in_hand.done()
        wake()
        await in_hand
    await opened.write(partial(add_key, key="after"))
    assert await opened.read(keys) == ["after", "in hand"]


@pytest.mark.anyio
async def test_a_whole_server_that_hangs_is_unavailable_meanwhile(
    postgres: Postgres, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgresql._DEFAULTS, "connect_timeout", 2)
    catalog = Catalog.open(address)
    await catalog.claim("the server")
    assert await catalog.read(keys) == []
    with suspended(*postgres.processes()):
        began = time.monotonic()
        with pytest.raises(CatalogUnavailable, match="not answered in time"):
            catalog.verify_epoch()
        with pytest.raises(CatalogUnavailable, match="not answered"):
            await catalog.read(keys)
        assert time.monotonic() - began < 2 * AT_ONCE
        await unavailable(catalog, match="not answered in time")
        await unavailable(catalog, match="timeout")  # there is no connection any more
    await eventually(lambda: catalog.write(partial(add_key, key="after")))
    assert await catalog.read(keys) == ["after"]
    catalog.close()


@pytest.mark.anyio
async def test_a_read_that_is_not_answered_leaves_no_thread_behind(opened: Catalog) -> None:
    over = threading.Event()
    with suspended(opened.read_now(lambda c: c.scalar(sa.text("SELECT pg_backend_pid()")))):

        def read(connection: sa.Connection) -> None:
            try:
                keys(connection)
            finally:
                over.set()

        with pytest.raises(CatalogUnavailable, match="not answered"):
            await opened.read(read)
        assert await asyncio.to_thread(over.wait, AT_ONCE)
    assert await opened.read(keys) == []


@pytest.mark.anyio
@pytest.mark.parametrize("claimed", [True, False])
async def test_a_commit_that_is_not_answered_is_made_once(
    opened: Catalog, claimed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was sent, and the server makes it when it wakes: nobody is told that it was not made."""
    if claimed:
        await opened.claim("the server")
    pid = await writer_of(opened)
    stopped = threading.Event()

    def suspend() -> None:
        if not stopped.is_set():
            os.kill(pid, signal.SIGSTOP)
            stopped.set()

    opened.before_commit(suspend)
    monkeypatch.setattr(database, "WRITE_TAKES", TAKES)
    monkeypatch.setattr(database, "WRITE_WAITS", 2 * TAKES)
    writing = asyncio.create_task(add_one_over(opened))
    try:
        await asyncio.to_thread(stopped.wait, 30)
        await unavailable(opened, match="not come to this write")
        assert not writing.done()
    finally:
        os.kill(pid, signal.SIGCONT)
    await writing
    monkeypatch.undo()
    assert await opened.read(keys) == ["0"]
    await add_one_over(opened)
    assert await opened.read(keys) == ["0", "1"]


IN_DOUBT = """
import asyncio, os, signal, sys
from functools import partial
import sqlalchemy as sa
from holdfast.catalog import Catalog, database
from tests.catalog.replaced import add_key

database.IN_DOUBT = 0.5

async def main():
    catalog = Catalog.open(sys.argv[1])
    await catalog.claim("the server")
    pid = await catalog.write(lambda c: c.scalar(sa.text("SELECT pg_backend_pid()")))
    print(pid, flush=True)
    database.WRITE_TAKES = 0.5
    catalog.before_commit(lambda: os.kill(pid, signal.SIGSTOP))
    try:
        await catalog.write(partial(add_key, key="a"))
    except BaseException as error:
        print("told", type(error).__name__)
    print("lived on")

asyncio.run(main())
"""


@pytest.mark.anyio
async def test_a_process_ends_whose_commit_nobody_answers_for(
    opened: Catalog, address: str
) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", IN_DOUBT, address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    pid, *told = done.stdout.split()
    os.kill(int(pid), signal.SIGCONT)
    assert (done.returncode, told) == (SYNC_FAILED, []), done.stderr
    assert "lost during a commit" in done.stderr
    assert await opened.claim("the next one") == 2
    assert await opened.read(keys) == ["a"]  # as it happens
