"""When a worker has grown so much that it is to be replaced."""

from __future__ import annotations

import structlog

GROWN = 1.5
"""A worker is replaced only above so many times what it took right after its load: below that
the next one would be as large again before long."""
SHORTEST_LIFE = 600.0
"""Seconds that a worker lives before it is replaced: what training takes in any case may be above
the limit too, and each replacement costs the time of a load."""

_log = structlog.get_logger("holdfast.engines")


class WorkerMemory:
    """The limit of a worker's resident memory, in bytes; 0: none. And what its newest one takes."""

    def __init__(self, model: str, limit: int) -> None:
        self.limit = limit
        self._model = model
        self._replaced_above = limit
        self._said = False

    def loaded(self, memory: int | None) -> None:
        """A worker has loaded its base model, and takes so much now."""
        least = round(GROWN * (memory or 0))
        self._replaced_above = max(self.limit, least)
        if 0 < self.limit < least and not self._said:
            self._said = True
            _log.warning(
                "worker-memory is too low: a worker takes about as much, or more, right after its "
                f"load. It is replaced above {GROWN:g} times that instead; set worker-memory above "
                "that, by what its runs and a step take",
                model=self._model,
                limit_mib=mib(self.limit),
                after_load_mib=mib(memory or 0),
                replaced_above_mib=mib(least),
            )

    def outgrown(self, memory: int | None, age: float) -> bool:
        """Whether a worker that has lived for `age` seconds is to be replaced."""
        if not self.limit or memory is None or age < SHORTEST_LIFE:
            return False
        return memory > self._replaced_above


def mib(size: int) -> int:
    """Bytes in the unit in which the limit is given."""
    return round(size / (1 << 20))
