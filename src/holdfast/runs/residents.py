"""The runs that a worker holds: those used longest ago leave when they take too much memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Resident:
    leave: Callable[[], None]
    size: int = 0


class Residents:
    """Least recently used first. What is asked to leave does so when it is idle, or stays."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_key: dict[str, _Resident] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def size(self) -> int:
        """Bytes that they take, as far as is known."""
        return self._size

    def put(self, key: str, leave: Callable[[], None]) -> None:
        """The worker has been given that run's state; `leave` asks the run to take it away."""
        self.gone(key)
        self._by_key[key] = _Resident(leave)

    def used(self, key: str, size: int | None = None) -> None:
        """The run computes, or is now known to take so many bytes. Makes room where need be."""
        resident = self._by_key.pop(key, None)
        if resident is None:
            return
        self._by_key[key] = resident
        if size is not None:
            self._size += size - resident.size
            resident.size = size
        excess = self._size - self._limit
        for other, candidate in self._by_key.items():
            if excess <= 0 or other == key:
                return
            candidate.leave()
            excess -= candidate.size

    def gone(self, key: str) -> None:
        """The worker holds that run no more."""
        resident = self._by_key.pop(key, None)
        if resident is not None:
            self._size -= resident.size

    def clear(self) -> None:
        """The worker has ended."""
        self._by_key.clear()
        self._size = 0
