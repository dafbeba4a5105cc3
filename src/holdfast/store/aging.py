"""How long something has been ready to go, in server time.

Server time is the monotonic time between two sweeps in a row by the same process, added up in a
note kept in the store; a machine that is off, or two processes that sweep by turns, only delay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.store.errors import Corrupt
from holdfast.store.model import canonical_json
from holdfast.store.records import seal, unseal

LONG = 3600.0
"""Seconds of server time between the two sweeps that must see a name expired or a save unused."""

Identity = tuple[int | str, ...]
"""Changes when something else takes the place of what was seen."""

_VERSION = 1
_MAX_SIZE = 1 << 28


@dataclass(slots=True)
class Ages:
    """What sweeps remember: server time, and since when each candidate has been one."""

    sweeper: str = ""
    now: float = 0.0
    since: dict[str, tuple[float, Identity]] = field(default_factory=dict)

    @classmethod
    def decode(cls, data: bytes, path: str) -> Ages:
        """What `encode` wrote; empty when it is damaged, which only delays."""
        try:
            document = unseal(data, path, _MAX_SIZE)
        except Corrupt:
            return cls()
        if document["version"] != _VERSION:
            return cls()
        since = {
            entry: (start, tuple(identity))
            for entry, (start, identity) in document["since"].items()
        }
        return cls(document["sweeper"], document["now"], since)

    def encode(self) -> bytes:
        """One sealed JSON text."""
        return seal(
            canonical_json(
                {
                    "version": _VERSION,
                    "sweeper": self.sweeper,
                    "now": self.now,
                    "since": self.since,
                }
            )
        )

    def look(self, sweeper: str, since_last: float) -> None:
        """A sweep by `sweeper` begins, whose last one was `since_last` seconds ago."""
        if self.sweeper == sweeper:
            self.now += since_last
        self.sweeper = sweeper

    def see(self, candidates: Mapping[str, Identity]) -> None:
        """These are all there are; what was none before, or is another one now, starts anew."""
        self.since = {
            path: seen
            if (seen := self.since.get(path)) is not None and seen[1] == identity
            else (self.now, identity)
            for path, identity in candidates.items()
        }

    def of(self, path: str) -> float:
        """Seconds for which a candidate has been one."""
        return self.now - self.since[path][0]
