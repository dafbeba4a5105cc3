"""The stop of a server: what it takes no more, and who is still answered."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from holdfast.runs.errors import stopping

T = TypeVar("T")


class Stopping:
    """How far the stop has come. From its beginning on nothing new is taken."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.done = asyncio.Event()
        """The runs have stopped: what has no outcome by now gets it after the next start."""

    def check(self) -> None:
        """Raises Unavailable once the stop has begun."""
        if self.begun.is_set():
            raise stopping()

    async def wait_for(self, waiting: Coroutine[Any, Any, T]) -> T | None:
        """The result of `waiting`; None when the runs have stopped before that."""
        task = asyncio.create_task(waiting)
        done = asyncio.create_task(self.done.wait())
        try:
            await asyncio.wait([task, done], return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            done.cancel()
