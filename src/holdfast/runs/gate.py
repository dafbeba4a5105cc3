"""Operations that are executed side by side, and some that are executed alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

QUARANTINED_AFTER = 2
"""Starts of a server that began the same operation as the first of its run, and then ended: after
so many nothing else is executed beside it, or before its outcome is durable."""


class Gate:
    """Lets many through at once, or one alone. Who is to be alone does not wait for newcomers."""

    def __init__(self) -> None:
        self._inside = 0
        self._first: set[asyncio.Task[None]] = set()
        """Nobody is let through before they have ended."""
        self._alone = False
        self._waiting = 0
        """For being alone."""
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def among_others(self) -> AsyncIterator[None]:
        """Beside others that are let through so."""
        while self._alone or self._waiting or self._first:
            await self._change()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._changed.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Beside nobody."""
        self._waiting += 1
        try:
            while self._alone or self._inside or self._first:
                await self._change()
            self._alone = True
        finally:
            self._waiting -= 1
            self._changed.set()
        try:
            yield
        finally:
            self._alone = False
            self._changed.set()

    def close_until(self, task: asyncio.Task[None]) -> None:
        """Let nobody through until this has ended."""
        self._first.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._first.discard(task)
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
