"""What is to be done to a server, and when: drawn from a seed, the same for the same seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from holdfast import failpoints

Kind = Literal[
    "kill server",
    "kill worker",
    "kill both",
    "kill while starting",
    "kill while stopping",
    "die at a point",
    "restart",
    "suspend server",
    "suspend worker",
    "hung worker",
    "worker hung while loading",
    "no room",
    "full disk",
    "kill, full disk",
    "restart, full disk",
    "locked database",
    "kill, locked database",
    "restart, locked database",
    "clock",
    "lost answers",
    "damaged snapshot",
    "damaged manifest",
    "PostgreSQL restart",
    "PostgreSQL crash",
    "PostgreSQL cut off",
]
"""Those with a comma happen in the middle of the trouble behind it."""
KINDS: tuple[Kind, ...] = tuple(k for k in get_args(Kind) if not k.startswith("PostgreSQL"))
"""Of a server whose catalog is a file."""
POSTGRES_KINDS: tuple[Kind, ...] = tuple(
    k for k in get_args(Kind) if not k.endswith("locked database") and not k.startswith("damaged")
)
"""Of one whose catalog is on PostgreSQL. The others look into the file."""

_WEIGHTS = {
    "kill server": 8,
    "kill worker": 8,
    "kill both": 5,
    "kill while starting": 4,
    "kill while stopping": 4,
    "die at a point": 16,
    "restart": 2,
    "lost answers": 6,
    "damaged snapshot": 3,
    "damaged manifest": 2,
    "PostgreSQL restart": 4,
    "PostgreSQL crash": 8,
    "PostgreSQL cut off": 8,
}
"""How often each kind is drawn; once where nothing stands here."""
_LONGEST = {"suspend server": 60.0, "suspend worker": 12.0}
_LONGEST_TROUBLE = 10.0
_MOMENT = 2.0
"""Seconds in which a server starts and recovers, more or less."""

QUIET = 0.3
"""Seconds at most between a step of the script and the next disturbance."""
_DAY = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Disturbance:
    """One thing to be done, after a pause; some last for some seconds, or have an object."""

    kind: Kind
    pause: float = 0.0
    seconds: float = 0.0
    point: str = failpoints.POINTS[0]
    clock: float = 0.0
    """Seconds by which the clock is wrong from now on."""

    @property
    def name(self) -> str:
        return f"die at {self.point}" if self.kind == "die at a point" else self.kind


def plan(seed: int, kinds: Sequence[Kind] = KINDS) -> Iterator[Disturbance]:
    """Disturbances without end, the same ones for the same seed."""
    draw = random.Random(seed)
    weights = [_WEIGHTS.get(kind, 1) for kind in kinds]
    while True:
        kind = draw.choices(kinds, weights)[0]
        pause, share = draw.uniform(0, QUIET), draw.random()
        point = draw.choice(failpoints.POINTS)
        clock = draw.uniform(-3, 3) * _DAY
        yield Disturbance(kind, pause, _seconds(kind, share), point, clock)


def _seconds(kind: Kind, share: float) -> float:
    if kind in _LONGEST:  # mostly short
        return 0.1 * math.pow(_LONGEST[kind] / 0.1, share**2)
    if kind.startswith("kill while"):
        return _MOMENT * share
    return 0.5 + (_LONGEST_TROUBLE - 0.5) * share
