"""The order of one run's operations: a pure state machine, without clock, database or engine.

Numbers are executed in ascending order, one at a time. A number is *passed* when its effect on the
training state is complete, and *settled* when its outcome is final; a save is passed once its copy
is taken and settled once it is durable. After a loss of the training state the order is rewound to
the position of a snapshot, and the numbers after it come up again: settled ones to be replayed.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

GAP_LEASE = 360.0
"""Seconds for which a missing number is waited for: longer than a client retries a submission."""
GAP_LEASE_ELIXIR = 10.0
"""The Elixir client uses numbers up without sending them, and never sends out of order ..."""
GAP_LEASE_ELIXIR_FORWARD = 120.0
"""... but between the forward and the reserved backward of a custom loss, later ones overtake."""
GAP_LEASE_AFTER_REFUSAL = 5.0
"""Once a definite refusal was given, the missing number is most likely the refused one ..."""
MOST_AHEAD = 10_000
"""A number so far above the highest there is was not given out by a client that counts."""
MOST_UNSETTLED = 10_000
"""Operations that a run may have before it. A client that sends on without waiting for results is
then told to send the next one again later ..."""
MOST_UNSETTLED_BYTES = 16 << 30
"""... as with bodies of so many bytes."""
REFUSAL_REACHES = 32
"""... or one that its client gave up with it: so far above the highest number there is. Numbers
beyond were given out later, and are missing for another reason."""


class State(StrEnum):
    ACCEPTED = "accepted"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"

    @property
    def settled(self) -> bool:
        return self in (State.DONE, State.FAILED, State.SKIPPED)


class Accept(StrEnum):
    """What became of a submission."""

    NEW = "new"
    DUPLICATE = "duplicate"
    """The same request again: answer it with the same request id."""
    CONFLICT = "conflict"
    """The number is taken by another request, which is untouched."""
    LATE = "late"
    """The number was skipped before this request came: a failed future."""
    FORGOTTEN = "forgotten"
    """The number was settled long ago; what it was is in the journal, if anywhere."""


@dataclass(slots=True)
class Entry:
    """One number of the run."""

    seq: int
    kind: str
    body_hash: str | None
    state: State = State.ACCEPTED
    size: int = 0
    """Bytes of its body, while it is unsettled."""
    attempts: int = 0
    """Deaths of a worker while it ran."""
    begun_again: int = 0
    """Times that it was begun as the first after a start."""
    suspect: bool = False
    """It may have been under way when the last server ended, and has not been begun since."""
    late: bool = False
    """Came after it had been skipped: its place is empty, its mark has a place of its own."""


@dataclass(frozen=True, slots=True)
class Gap:
    """`seq` is missing while a later number waits; at `due` it is skipped."""

    seq: int
    due: float


class Order:
    """Numbers of one run, from 0.

    `elixir` chooses the shorter leases of that client. `floor` is the oldest position that a
    snapshot can rewind to, `position` the newest. Times are seconds of a monotonic clock.
    """

    def __init__(
        self,
        *,
        elixir: bool = False,
        position: int = -1,
        floor: int = -1,
        refused_to: int = -1,
    ) -> None:
        self.elixir = elixir
        self.position = position
        """Every number up to here has been passed."""
        self._reached = position
        self._floor = floor
        self._entries: dict[int, Entry] = {}
        self._skipped: set[int] = set()
        """Numbers up to the floor that were skipped, and whose requests may still come."""
        self._unsettled: set[int] = set()
        self._unsettled_bytes = 0
        self._by_number: list[int] = []
        """A heap of the unsettled numbers, and of such that have been settled since."""
        self._highest = position
        self.refused_to = refused_to
        """Up to here, a refusal explains why a number is missing."""
        self._gap: tuple[int, float] | None = None
        self._late_marks: dict[int, list[int]] = {}
        self._held = False
        self._under_way: int | None = None

    def __contains__(self, seq: int) -> bool:
        return seq <= self._floor or seq in self._entries

    def __getitem__(self, seq: int) -> Entry:
        return self._entries[seq]

    @property
    def highest(self) -> int:
        """The highest number that was accepted, refused or skipped."""
        return self._highest

    @property
    def reached(self) -> int:
        """The highest number that was ever passed: what precedes it is history, and replayed.

        Higher ones may be settled: those that were refused before their turn came.
        """
        return self._reached

    @property
    def under_way(self) -> int | None:
        """The number whose effect was begun, and is not known to be complete.

        The training state may be that of this number already, and not of the position.
        """
        return self._under_way

    @property
    def replays_from_start(self) -> bool:
        """Whether every operation from number 0 can be replayed."""
        return self._floor < 0

    @property
    def unsettled(self) -> list[Entry]:
        """Accepted and running entries, in order."""
        return [self._entries[seq] for seq in sorted(self._unsettled)]

    def done_after(self, position: int) -> list[Entry]:
        """Those that are done after a position to which it can be rewound, in order."""
        done = (e for e in self._entries.values() if e.state is State.DONE and e.seq > position)
        return sorted(done, key=lambda entry: entry.seq)

    def is_too_far(self, seq: int) -> bool:
        """Whether a number is so high that it must be a mistake."""
        return seq > self._highest + MOST_AHEAD

    def is_full(self, seq: int) -> bool:
        """Whether so much is unsettled that a number has to come later.

        Not one below another that is there: that may be waiting for it.
        """
        much = (
            len(self._unsettled) >= MOST_UNSETTLED or self._unsettled_bytes >= MOST_UNSETTLED_BYTES
        )
        return much and seq > self._highest

    def any_unsettled_below(self, seq: int) -> bool:
        """Whether one of the numbers below `seq` has no outcome yet."""
        waiting = self._by_number
        while waiting and waiting[0] not in self._unsettled:
            heapq.heappop(waiting)
        return bool(waiting) and waiting[0] < seq

    def classify(self, seq: int, kind: str, body_hash: str) -> Accept:
        """What a submission is; changes nothing."""
        if self.was_skipped(seq):
            return Accept.LATE
        known = self._entries.get(seq)
        if known is None:
            return Accept.FORGOTTEN if seq <= self._floor else Accept.NEW
        same = known.body_hash == body_hash and known.kind == kind
        return Accept.DUPLICATE if same else Accept.CONFLICT

    def knows(self, seq: int) -> bool:
        """Whether a number has an entry still: it was not forgotten."""
        return seq in self._entries

    def was_skipped(self, seq: int) -> bool:
        """Whether a number was given up and has not come since."""
        if seq in self._skipped:
            return True
        return seq in self._entries and self._entries[seq].state is State.SKIPPED

    def add(self, entry: Entry) -> None:
        """Enter a journaled operation: accepted, refused, skipped, or read back after a restart.

        One that was running has not been executed.
        """
        assert entry.seq not in self._entries
        if entry.state is State.RUNNING:
            entry.state = State.ACCEPTED
        if entry.state is State.SKIPPED and entry.seq <= self._floor:
            self._skipped.add(entry.seq)
        else:
            self._entries[entry.seq] = entry
        if not entry.state.settled:
            self._unsettled.add(entry.seq)
            self._unsettled_bytes += entry.size
            heapq.heappush(self._by_number, entry.seq)
        self._highest = max(self._highest, entry.seq)

    def read_back(self, entries: Iterable[Entry], overtaken: Collection[int] = ()) -> None:
        """Enter what a restarted server finds in the journal.

        `overtaken` are those that failed because the run's end came first: they never came up.
        """
        for entry in entries:
            self.add(entry)
            if entry.state is State.DONE:  # only what came up was ever done
                self._reached = max(self._reached, entry.seq)
        number = self._reached
        while (later := self._entries.get(number + 1)) is not None:
            number += 1
            # Accepted, and failed when it came up. A refusal has no body, and is settled ahead.
            executed = later.state is State.FAILED and later.body_hash is not None
            if executed and not later.late and number not in overtaken:
                self._reached = number
        while (after := self._entries.get(self._reached + 1)) is not None:
            if not after.state.settled or after.seq in overtaken:
                break
            self._reached += 1

    def refused(self, seq: int | None = None) -> int:
        """A definite refusal was given, of `seq` where that is known: shortens the wait for gaps.

        Returns up to which number.
        """
        highest = self._highest if seq is None else max(seq, self._highest)
        self.refused_to = max(self.refused_to, highest + REFUSAL_REACHES)
        return self.refused_to

    def hold(self) -> int:
        """Begin nothing more, until `go_on`: a late request is being journaled.

        Returns the position at which that takes effect: after what has been passed, also where
        that is still to be replayed, and after the operation under way.
        """
        self._held = True
        return self._reached + (self._under_way == self._reached + 1)

    def go_on(self) -> None:
        """The late request is journaled, or was not taken."""
        self._held = False

    @property
    def held(self) -> bool:
        """Whether the next operation may not begin yet."""
        return self._held and self.position >= self._reached

    def arrived_late(self, seq: int, kind: str, body_hash: str | None) -> None:
        """Settle a skipped number's late request, which is journaled, as failed."""
        assert self.was_skipped(seq)
        self._skipped.discard(seq)
        self._entries[seq] = Entry(seq, kind, body_hash, State.FAILED, late=True)

    def add_late_mark(self, seq: int, position: int) -> None:
        """The late forward_backward `seq` marks the gradients once `position` is passed."""
        self._late_marks.setdefault(position, []).append(seq)

    def late_marks(self) -> list[int]:
        """Late forward_backwards whose mark falls at the current position."""
        return self._late_marks.get(self.position, [])

    def next(self, now: float) -> Entry | Gap | None:
        """What comes up: an entry to execute or replay, a gap to wait for, or nothing yet."""
        seq = self.position + 1
        entry = self._entries.get(seq)
        if self.held:
            return None
        if entry is not None:
            if entry.state is not State.SKIPPED:
                self._gap = None
            return None if entry.state is State.RUNNING else entry
        if self._highest <= seq:
            return None
        if self.any_unsettled_below(seq) and any(
            e.state is State.RUNNING and e.seq < seq for e in self.unsettled
        ):
            return None
        if self._gap is None or self._gap[0] != seq:
            # Numbers that are missing in a row are one gap: the rest of it was waited for as long.
            goes_on = self._gap is not None and self._gap[0] == seq - 1
            self._gap = (seq, self._gap[1] if self._gap is not None and goes_on else now)
        return Gap(seq, self._gap[1] + self._lease())

    def wait_anew(self) -> None:
        """The wait for a gap starts again: the server was not there, or took nothing."""
        self._gap = None

    def begin(self, seq: int) -> None:
        """The entry that came up is being executed, or its effect brought about again."""
        assert seq == self.position + 1 and not self.held
        self._under_way = seq
        if not self._entries[seq].state.settled:
            self._entries[seq].state = State.RUNNING

    def passed(self, seq: int) -> None:
        """The entry's effect on the training state is complete."""
        assert seq == self.position + 1
        self._under_way = None
        self.position = seq
        self._reached = max(self._reached, seq)

    def settle(self, seq: int, state: State) -> None:
        """The entry's outcome is final."""
        entry = self._entries[seq]
        assert not entry.state.settled
        entry.state = state
        self._unsettled.remove(seq)
        self._unsettled_bytes -= entry.size

    def again(self, seq: int) -> None:
        """The entry's execution was lost; it comes up again."""
        self._under_way = None
        self._entries[seq].state = State.ACCEPTED

    def rewind(self, position: int) -> None:
        """The training state is that of `position` again; what follows comes up once more."""
        assert self._floor <= position <= self.position
        self.position = position
        self._under_way = None
        self._gap = None
        for entry in self.unsettled:
            entry.state = State.ACCEPTED

    def forget(self, position: int) -> None:
        """Numbers up to `position` will not be replayed any more.

        Those that were skipped are still known as such, until `forget_skipped`: their requests may
        still come.
        """
        assert position <= self.position
        self._floor = max(self._floor, position)
        for seq in [s for s, e in self._entries.items() if s <= position and e.state.settled]:
            if self._entries.pop(seq).state is State.SKIPPED:
                self._skipped.add(seq)
        for at in [p for p in self._late_marks if p < position]:
            del self._late_marks[at]

    def forget_skipped(self, seqs: Iterable[int]) -> None:
        """The journal knows these skipped numbers no more: nobody sends them any more."""
        self._skipped.difference_update(seqs)

    def _lease(self) -> float:
        if self.position < self.refused_to:
            return GAP_LEASE_AFTER_REFUSAL
        if not self.elixir:
            return GAP_LEASE
        last = self._entries.get(self.position)
        after_forward = last is not None and last.kind == "forward"
        return GAP_LEASE_ELIXIR_FORWARD if after_forward else GAP_LEASE_ELIXIR
