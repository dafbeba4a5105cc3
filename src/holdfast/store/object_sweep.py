"""Expiry and garbage collection in an object storage, without locks.

The difficulty is that a save and a sweep, each in a process of its own, cannot see each other, and
that either may stand still for any time between two of its calls. No rule here trusts a clock for
what is referred to:

- Whoever wants to rely on something (publish: on copies of blobs; set a name, pin: on a manifest)
  first writes durably that it does, and then looks at the state of what it relies on.
- A sweep dooms what it finds unused. It declares dead what was doomed before it began to look, and
  is still unused: conditionally on the doomed version, which whoever relies on it meanwhile has
  replaced. So either the sweep sees the reference, or the other one sees the doom and lifts it, or
  sees the death and takes another copy. Only what is dead is deleted, and no key comes back.
- A manifest that is being published is a reference from its first moment, though nobody reads it
  before its last one. A name that is being moved refers to both manifests.

Time serves only those who have not come to refer yet: a copy of a blob that was put, and a manifest
that is to be named, stay until two sweeps an hour apart have seen them unused. What was once used
waits no longer than for the second sweep. A pin whose holder has not rewritten it, and a
publication or a move of a name that its process has not ended, are given up after an hour; all
three by a conditional write or under a key of their own, so that who comes back late is refused.

Names expire by the wall clock, and go once two sweeps an hour apart have both seen them expired.

Any number of processes may sweep, but server time (`holdfast.store.aging`) goes on only for one:
the others stand back as long as they see it at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from uuid import uuid4

from holdfast.store.aging import LONG, Ages, Identity
from holdfast.store.base import SweepReport
from holdfast.store.bucket import SWEEP_STATE, Bucket, Entry, content_of, is_unnamed
from holdfast.store.cells import ManifestCell, MarkCell, NameCell
from holdfast.store.errors import StoreError
from holdfast.store.model import NameKey
from holdfast.store.objects import Got, Listed, Version

STAND_BACK = 600.0
"""Seconds without a sweep by the process that swept last, after which another one takes over."""


LEFT = 3600.0
"""Seconds of server time after which a pin that nobody has rewritten is taken for left behind."""


@dataclass(slots=True)
class _Scan:
    """One look at the store. What is referred to was read before what refers to it."""

    blobs: dict[str, Listed]
    """By the key of the copy."""
    marks: dict[str, Entry[MarkCell]]
    """By the key of the copy that they are of."""
    manifests: list[Entry[ManifestCell]]
    names: list[Entry[NameCell]]
    pins: list[Listed]
    damaged: list[str] = field(default_factory=list)
    candidates: dict[str, Identity] = field(default_factory=dict)
    """Key -> version, of all that could go."""
    used: set[str] = field(default_factory=set)
    """Keys of what a name or a manifest refers to."""
    awaited: set[str] = field(default_factory=set)
    """Ids of manifests that a name is about to point to, or that are pinned."""

    def uses(self, manifest: str) -> bool:
        """Whether a manifest's key is referred to."""
        return manifest in self.used or content_of(manifest) in self.awaited


class ObjectSweeper:
    """Sweeps one store."""

    def __init__(
        self, bucket: Bucket, wall: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        self._bucket = bucket
        self._wall = wall
        self._monotonic = monotonic
        self._id = uuid4().hex
        self._last = 0.0
        self._other: tuple[Version, float] | None = None
        """The last note of another process's sweep, and when it was first seen."""
        self._known: set[str] = set()
        """Keys of what was used at an earlier sweep: nobody has to come to use it first."""
        self._lock = Lock()

    def sweep(self) -> SweepReport:
        with self._lock:
            return self._sweep()

    def _sweep(self) -> SweepReport:
        (note,) = self._bucket.objects.get([SWEEP_STATE])
        ages = Ages() if note is None else Ages.decode(note.data, self._bucket.path(SWEEP_STATE))
        moment = self._monotonic()
        if note is not None and self._is_others(note, ages, moment):
            return SweepReport()
        ages.look(self._id, moment - self._last)
        self._last = moment
        scan = self._scan()
        self._weigh(scan)
        ages.see(scan.candidates)
        report = self._remove(scan, ages)
        if note is None:
            self._bucket.writer.create(SWEEP_STATE, ages.encode())
        else:
            self._bucket.writer.swap(SWEEP_STATE, ages.encode(), note.version)
        return report

    def _is_others(self, note: Got, ages: Ages, moment: float) -> bool:
        """Whether another process is at work."""
        if ages.sweeper in ("", self._id):
            return False
        if self._other is None or self._other[0] != note.version:
            self._other = (note.version, moment)
        return moment - self._other[1] < STAND_BACK

    # Looking

    def _scan(self) -> _Scan:
        objects = self._bucket.objects
        blobs = objects.list("blobs")
        marks = self._bucket.marks()
        listed = objects.list("manifests")
        manifests = self._bucket.manifests(listed)
        names = self._bucket.names()
        pins = objects.list("pins")
        keys = (entry.key for entries in (marks, manifests, names) for entry in entries)
        self._bucket.forget_all_but(keys)
        return _Scan(
            {found.key: found for found in blobs},
            {f"blobs/{entry.key.partition('/')[2]}": entry for entry in marks},
            manifests,
            names,
            pins,
        )

    def _weigh(self, scan: _Scan) -> None:
        """Find what refers to what, what could go, and what is damaged."""
        names_whole = manifests_whole = True
        for name in scan.names:
            if isinstance(name.value, StoreError):
                names_whole = False
                scan.damaged.append(self._bucket.path(name.key))
                continue
            cell = name.value
            if cell.record is not None:
                scan.used.add(f"manifests/{cell.record.manifest}/{cell.copy}")
            if cell.pending is not None:
                scan.awaited.add(cell.pending)
            if cell.pending is not None or self._is_expired(cell):
                scan.candidates[name.key] = (name.version.etag,)
        for pin in scan.pins:
            scan.awaited.add(content_of(pin.key))
            scan.candidates[pin.key] = (pin.etag,)
        for manifest in scan.manifests:
            if isinstance(manifest.value, StoreError):
                manifests_whole = False
                scan.damaged.append(self._bucket.path(manifest.key))
                continue
            if manifest.value.state != "dead":
                scan.used |= manifest.value.uses
            if names_whole and manifest.value.state != "kept" and not scan.uses(manifest.key):
                scan.candidates[manifest.key] = (manifest.version.etag,)
        for copy in {**scan.blobs, **scan.marks} if manifests_whole else ():
            if copy not in scan.used:
                mark = scan.marks.get(copy)
                scan.candidates[copy] = ("" if mark is None else mark.version.etag,)

    def _is_expired(self, cell: NameCell) -> bool:
        record = cell.record
        return record is not None and record.expires is not None and record.expires <= self._wall()

    # Removing

    def _remove(self, scan: _Scan, ages: Ages) -> SweepReport:
        """Go on with everything by one step."""
        names = list(self._clear_names(scan, ages))
        left = [pin.key for pin in scan.pins if ages.of(pin.key) >= LEFT]
        manifests = [entry.key for entry in scan.manifests if self._bury(entry, scan, ages)]
        copies = [copy for copy in {**scan.blobs, **scan.marks} if self._fell(copy, scan, ages)]
        self._bucket.objects.delete([*left, *manifests, *copies])
        # Only now: while a mark says that its copy is dead, nobody takes it for there.
        self._bucket.objects.delete([scan.marks[c].key for c in copies if c in scan.marks])
        gone = {*left, *manifests, *copies}
        there = {*scan.blobs, *(entry.key for entry in scan.manifests)} - gone
        self._known = (self._known | scan.used) & there
        removed = [scan.blobs[copy] for copy in copies if copy in scan.blobs]
        return SweepReport(
            names=tuple(names),
            manifests=len(manifests),
            blobs=len(removed),
            size=sum(found.size for found in removed),
            waiting=len(scan.candidates.keys() - gone) - len(names),
            damaged=tuple(scan.damaged),
        )

    def _clear_names(self, scan: _Scan, ages: Ages) -> Iterator[NameKey]:
        """Take out what has expired, and moves that were not ended; the expired ones' names."""
        for entry in scan.names:
            if entry.key not in scan.candidates or ages.of(entry.key) < LONG:
                continue
            cell = entry.whole()
            expired = self._is_expired(cell)
            rest = NameCell() if expired else NameCell(cell.record, cell.copy)
            if self._bucket.swap(entry, rest) and expired and cell.record is not None:
                yield cell.record.key

    def _bury(self, entry: Entry[ManifestCell], scan: _Scan, ages: Ages) -> bool:
        """Whether a copy of a manifest is dead now."""
        if isinstance(entry.value, StoreError):
            return False
        cell = entry.value
        if cell.state == "dead":
            return True
        if entry.key not in scan.candidates:
            if cell.state == "doomed":
                self._bucket.swap(entry, cell.into("loose"))
            return False
        discarded = cell.state == "loose" and is_unnamed(entry.key)
        if cell.state == "doomed" or (cell.state == "staged" and ages.of(entry.key) >= LONG):
            return self._bucket.swap(entry, cell.into("dead")) is not None
        if cell.state == "loose" and (
            discarded or entry.key in self._known or ages.of(entry.key) >= LONG
        ):
            self._bucket.swap(entry, cell.into("doomed"))
        return False

    def _fell(self, copy: str, scan: _Scan, ages: Ages) -> bool:
        """Whether a copy of a blob is dead now."""
        mark = scan.marks.get(copy)
        state = "kept" if mark is None else mark.whole().state
        if state == "dead":
            return True
        if copy not in scan.candidates:
            if mark is not None and state == "doomed":
                self._bucket.swap(mark, MarkCell("kept"))
            return False
        if mark is not None and state == "doomed":
            return self._bucket.swap(mark, MarkCell("dead")) is not None
        if copy in self._known or ages.of(copy) >= LONG:
            if mark is None:
                self._bucket.create(copy.replace("blobs/", "doomed/", 1), MarkCell("doomed"))
            else:
                self._bucket.swap(mark, MarkCell("doomed"))
        return False
