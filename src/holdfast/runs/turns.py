"""Turns at a worker: one at a time, in the order asked for, but those that are waited for first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

PATIENCE = 30.0
"""Seconds after which a turn that nobody waits for is taken like the others."""
COURTESY = 0.05
"""Seconds for which those that nobody waits for leave the worker to the one that had it."""


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

    @property
    def taken(self) -> bool:
        """Whether somebody holds the turn."""
        return self._taken

    @asynccontextmanager
    async def take(self, wanted: Callable[[], bool] = _always) -> AsyncIterator[None]:
        """Hold the turn. `wanted` says, whenever one is given, whether somebody waits for this."""
        if self._taken or (self._waiting and not wanted()):
            waiter = _Waiter(asyncio.get_running_loop().create_future(), wanted, time.monotonic())
            self._waiting.append(waiter)
            try:
                await waiter.ready
            except asyncio.CancelledError:
                if not waiter.ready.cancelled():  # it was given the turn at that moment
                    self._pass_on()
                raise
        self._taken = True
        try:
            yield
        finally:
            self._pass_on(after_wanted=wanted())

    def _pass_on(self, *, after_wanted: bool = False) -> None:
        """Give the turn to the next, if there is one.

        After one that is waited for, those that are not hold back for a moment: it is about to
        ask for its next turn, and would otherwise share the worker with each of them.
        """
        self._taken = False
        self._waiting = [w for w in self._waiting if not w.ready.cancelled()]
        now = time.monotonic()
        following = next((w for w in self._waiting if w.urgent(now)), None)
        if following is None and self._waiting:
            if after_wanted:
                self._waiting[0].ready.get_loop().call_later(COURTESY, self._offer)
                return
            following = self._waiting[0]
        if following is not None:
            self._waiting.remove(following)
            self._taken = True
            following.ready.set_result(None)

    def _offer(self) -> None:
        if not self._taken:
            self._pass_on()
