"""Expiry and garbage collection.

The difficulty is a save that runs beside the sweep, perhaps in another process: its blobs are on
the disk before any manifest refers to them. Three rules, none of which reads a wall clock:

- A blob that was put, and a manifest that is to be named, carries a mark until something durable
  refers to it. A mark protects what it names until two sweeps an hour apart have seen the mark.
- What nothing refers to and no mark protects goes once two sweeps a minute apart have seen that,
  and have seen the same file: putting the same content again starts anew.
- Removing happens under a lock that every change takes as well, after looking again. So whatever
  a save finds in place under that lock stays until the save refers to it.

Names expire by the wall clock, and go once two sweeps an hour apart have both seen them expired:
a clock that jumps for less than an hour removes nothing.

Times are server time (`holdfast.store.aging`), noted in `sweep.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from uuid import uuid4

from holdfast.store.aging import LONG, Ages, Identity
from holdfast.store.base import SweepReport
from holdfast.store.disk import SWEEP_STATE, Disk
from holdfast.store.errors import Corrupt, IOFailed, Unavailable, UnsupportedFormat
from holdfast.store.model import NameKey

SHORT = 60.0
"""Seconds of server time between the two sweeps that must see something unreferenced."""

_MAX_STATE = 1 << 28

_DAMAGE = (Corrupt, UnsupportedFormat, IOFailed)
"""Of one entry, which may refer to anything; also a bad sector, or a directory in its place."""


@dataclass(slots=True)
class _Scan:
    """What one look at the store has found."""

    candidates: dict[str, Identity] = field(default_factory=dict)
    """Path under the root -> identity, of all that could go."""
    expired: dict[str, NameKey] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)


class Sweeper:
    """Sweeps one store. State is kept in the store, so that restarts do not start anew."""

    def __init__(
        self, disk: Disk, wall: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        self._disk = disk
        self._wall = wall
        self._monotonic = monotonic
        self._id = uuid4().hex
        self._last = 0.0
        self._unsaved: Ages | None = None
        """What could not be written: on a full disk, of all times, sweeping must go on."""
        self._lock = Lock()
        self._references: dict[str, tuple[str, ...]] = {}
        """Manifest id -> hashes of its blobs. Manifests never change."""

    def sweep(self) -> SweepReport:
        with self._lock:
            return self._sweep()

    def _sweep(self) -> SweepReport:
        state = self._unsaved or self._load()
        moment = self._monotonic()
        state.look(self._id, moment - self._last)
        self._last = moment
        scan = self._scan()
        state.see(scan.candidates)
        report = SweepReport(waiting=len(scan.candidates), damaged=tuple(sorted(scan.damaged)))
        if any(self._ripe(path, state) for path in scan.candidates):
            with self._disk.removing():
                report = self._remove(self._scan(), state)
        self._unsaved = state
        with suppress(Unavailable):
            self._save(state)
            self._unsaved = None
        return report

    def _ripe(self, path: str, state: Ages) -> bool:
        long = path.startswith(("names/", "fresh/"))
        return state.of(path) >= (LONG if long else SHORT)

    def _remove(self, scan: _Scan, state: Ages) -> SweepReport:
        """Remove what is ripe and, looked at again, still to go. Runs under the lock."""
        ripe: dict[str, list[str]] = {}
        for path, identity in scan.candidates.items():
            seen = state.since.get(path)
            if seen is not None and seen[1] == identity and self._ripe(path, state):
                ripe.setdefault(path.partition("/")[0], []).append(path)
        removed = {directory: len(paths) for directory, paths in ripe.items()}
        sizes = [self._size(path) for path in ripe.get("blobs", ())]
        # What refers goes first, and durably: it must not come back alone after a loss of power.
        self._unlink(ripe, "pins", "tmp", "fresh", "names")
        if "manifests" in ripe:
            self._disk.settle("names")
            self._unlink(ripe, "manifests")
        if "blobs" in ripe:
            self._disk.settle("manifests")
            self._disk.settle("unnamed")
            self._unlink(ripe, "blobs")
        for paths in ripe.values():
            for path in paths:
                del state.since[path]
        return SweepReport(
            names=tuple(scan.expired[path] for path in ripe.get("names", ())),
            manifests=removed.get("manifests", 0),
            blobs=removed.get("blobs", 0),
            size=sum(sizes),
            waiting=len(scan.candidates) - sum(removed.values()),
            damaged=tuple(sorted(scan.damaged)),
        )

    def _unlink(self, ripe: dict[str, list[str]], *directories: str) -> None:
        for directory in directories:
            for path in ripe.get(directory, ()):
                self._disk.unlink(self._disk.path(path))

    def _scan(self) -> _Scan:
        scan = _Scan()
        # What is referred to is listed before what refers to it: beside a running save this look
        # may miss a reference only to what it does not list.
        blobs = self._disk.list("blobs")
        manifests = self._disk.list("manifests")
        marked = self._scan_marks(scan)
        named = self._scan_names(scan)
        pinned = self._scan_locked(scan, "pins")
        self._scan_locked(scan, "tmp")
        used = self._scan_references(scan)
        if named is not None:
            keep = named | marked | pinned
            self._consider(scan, (f"manifests/{entry}" for entry in manifests if entry not in keep))
        if used is not None:
            keep = used | marked
            self._consider(scan, (f"blobs/{entry}" for entry in blobs if entry not in keep))
        return scan

    def _scan_marks(self, scan: _Scan) -> set[str]:
        entries = self._disk.list("fresh")
        self._consider(scan, (f"fresh/{entry}" for entry in entries))
        return {entry.partition(".")[0] for entry in entries}

    def _scan_names(self, scan: _Scan) -> set[str] | None:
        """Ids that names point to, expired ones too; None when a damaged one may point anywhere."""
        found: set[str] = set()
        whole = True
        for entry in self._disk.list("names"):
            path = f"names/{entry}"
            try:
                record = self._disk.read_record(entry)
            except _DAMAGE:
                scan.damaged.add(self._disk.path(path))
                whole = False
                continue
            if record is not None:
                found.add(record.manifest)
                if record.expires is not None and record.expires <= self._wall():
                    scan.expired[path] = record.key
                    self._consider(scan, (path,))
        return found if whole else None

    def _scan_locked(self, scan: _Scan, directory: str) -> set[str]:
        """What the entries in use are named after; the others can go."""
        held = set()
        for entry in self._disk.list(directory):
            path = f"{directory}/{entry}"
            with suppress(FileNotFoundError):
                if self._disk.files.is_locked(self._disk.path(path)):
                    held.add(entry.partition(".")[0])
                else:
                    self._consider(scan, (path,))
        return held

    def _scan_references(self, scan: _Scan) -> set[str] | None:
        """Hashes of all blobs that manifests refer to; None when a damaged one may refer to any."""
        known = self._references
        self._references = {}
        used: set[str] = set()
        whole = True
        for directory in ("unnamed", "manifests"):  # the way discarding moves them
            for entry in self._disk.list(directory):
                references = known.get(entry)
                if references is None:
                    try:
                        manifest = self._disk.read_manifest(directory, entry)
                    except _DAMAGE:
                        scan.damaged.add(self._disk.path(directory, entry))
                        whole = False
                        continue
                    if manifest is None:
                        continue
                    references = tuple(blob.hash for blob in manifest.files.values())
                self._references[entry] = references
                used.update(references)
        return used if whole else None

    def _consider(self, scan: _Scan, paths: Iterable[str]) -> None:
        for path in paths:
            status = self._disk.files.stat(self._disk.path(path))
            if status is not None and status.is_dir:  # not ours, and not to be unlinked
                scan.damaged.add(self._disk.path(path))
            elif status is not None:
                scan.candidates[path] = status.identity

    def _size(self, path: str) -> int:
        status = self._disk.files.stat(self._disk.path(path))
        return 0 if status is None else status.size

    def _load(self) -> Ages:
        """What earlier sweeps left; nothing when it is damaged or not there."""
        path = self._disk.path(SWEEP_STATE)
        data = self._disk.read_small(path, _MAX_STATE)
        return Ages() if data is None else Ages.decode(data, path)

    def _save(self, state: Ages) -> None:
        """Not synced: losing it only delays, and a torn one does not match its hash."""
        with self._disk.temporary("noting what a sweep has seen") as (file, temporary):
            file.write(state.encode())
            self._disk.files.rename(temporary, self._disk.path(SWEEP_STATE))
