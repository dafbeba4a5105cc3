"""The runs that a worker holds: those used longest ago leave when they take too much memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

ROOM_TAKES = 60.0
"""Seconds for which a state that is to be given to a worker waits for others to leave."""


@dataclass(slots=True)
class _Resident:
    leave: Callable[[], None]
    size: int
    leaving: bool = False
    fixed: bool = False
    """It leaves when it can, and nobody can say when: it is neither asked to nor waited for."""


class Residents:
    """Least recently used first. What is asked to leave does so when it is idle, or stays."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_key: dict[str, _Resident] = {}
        self._size = 0
        self._usual = 0
        self._coming = 0
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def size(self) -> int:
        """Bytes that they take; one of which that is not known yet is taken for the last known."""
        return self._size

    @property
    def has_room(self) -> bool:
        """Whether one more may come: it fits, or all that are there are needed there."""
        if self._expected + self._usual <= self._limit:
            return True
        return not self._coming and not any(x.leaving for x in self._by_key.values())

    async def come(self) -> None:
        """Wait until there is room for one more, for a while at most, and keep it until `came`."""
        self._make_room(self._expected + self._usual - self._limit)
        with suppress(TimeoutError):
            async with asyncio.timeout(ROOM_TAKES):
                while not self.has_room:
                    self._changed.clear()
                    await self._changed.wait()
        self._coming += 1

    def came(self) -> None:
        """It is there, or does not come."""
        self._coming -= 1
        self._changed.set()

    def put(self, key: str, leave: Callable[[], None], *, fixed: bool = False) -> None:
        """The worker has been given that run's state; `leave` asks the run to take it away."""
        self.gone(key)
        self._by_key[key] = _Resident(leave, self._usual, fixed=fixed)
        self._size += self._usual
        self._make_room(self._size - self._limit, but=key)

    def used(self, key: str) -> None:
        """The run computes: it stays, and is the last to leave."""
        resident = self._by_key.pop(key, None)
        if resident is not None:
            self._by_key[key] = resident
            self._stays(resident)
            self._make_room(self._size - self._limit, but=key)

    def takes(self, key: str, size: int) -> None:
        """It is now known how many bytes the run's state takes."""
        self._usual = size
        resident = self._by_key.get(key)
        if resident is not None:
            self._size += size - resident.size
            resident.size = size
            self._changed.set()
            self._make_room(self._size - self._limit, but=key)

    def stays(self, key: str) -> None:
        """A run that was asked to leave cannot: its state is nowhere else."""
        resident = self._by_key.get(key)
        if resident is not None:
            self._stays(resident)

    def fix(self, key: str) -> None:
        """That run leaves when it can, and nobody can say when."""
        resident = self._by_key.get(key)
        if resident is not None:
            resident.fixed = True
            self._stays(resident)

    def gone(self, key: str) -> None:
        """The worker holds that run no more."""
        resident = self._by_key.pop(key, None)
        if resident is not None:
            self._size -= resident.size
            self._changed.set()

    def all_leave(self) -> None:
        """Ask all to leave, but those that are fixed."""
        for resident in self._by_key.values():
            if not resident.fixed:
                resident.leaving = True
                resident.leave()

    async def have_left(self, patience: float) -> None:
        """Wait until none is there, for so many seconds at most for the next one to leave.

        Not for those that are fixed.
        """
        with suppress(TimeoutError):
            while (there := self._to_leave) > 0:
                async with asyncio.timeout(patience):
                    while self._to_leave >= there:
                        self._changed.clear()
                        await self._changed.wait()

    def clear(self) -> None:
        """The worker has ended."""
        self._by_key.clear()
        self._size = 0
        self._changed.set()

    def _stays(self, resident: _Resident) -> None:
        resident.leaving = False
        self._changed.set()

    @property
    def _to_leave(self) -> int:
        return sum(not resident.fixed for resident in self._by_key.values())

    @property
    def _expected(self) -> int:
        """Bytes that they take when all have come that are about to."""
        return self._size + self._coming * self._usual

    def _make_room(self, excess: int, but: str | None = None) -> None:
        for key, candidate in self._by_key.items():
            if excess <= 0:
                return
            if candidate.fixed or (key == but and not candidate.leaving):
                continue
            if not candidate.leaving:
                candidate.leaving = True
                candidate.leave()
            excess -= candidate.size
