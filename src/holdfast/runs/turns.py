"""Turns at a worker: one at a time, in the order asked for, but those that are waited for first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

PATIENCE = 30.0
"""Seconds after which a turn that nobody waits for is taken like the others."""


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class _Waiter:
    ready: asyncio.Future[None]
    wanted: Callable[[], bool]
    since: float

    def urgent(self, now: float) -> bool:
        return self.wanted() or now - self.since >= PATIENCE


class Turns:
    """A lock whose waiters come in two classes, each served first come, first served."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: list[_Waiter] = []

    @asynccontextmanager
    async def take(self, wanted: Callable[[], bool] = _always) -> AsyncIterator[None]:
        """Hold the turn. `wanted` says, whenever one is given, whether somebody waits for this."""
        if self._taken:
            waiter = _Waiter(asyncio.get_running_loop().create_future(), wanted, time.monotonic())
            self._waiting.append(waiter)
            try:
                await waiter.ready
            except asyncio.CancelledError:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                else:  # it was given the turn at that moment
                    self._pass_on()
                raise
        self._taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        now = time.monotonic()
        waiting = [waiter for waiter in self._waiting if not waiter.ready.done()]
        following = next((w for w in waiting if w.urgent(now)), waiting[0] if waiting else None)
        if following is None:
            self._taken = False
            return
        self._waiting.remove(following)
        following.ready.set_result(None)
