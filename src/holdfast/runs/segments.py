"""Segment files: the journal's large bodies and results, appended and synced before they count.

    ROOT/NAME   "HFSEGMNT", version (u32), 4 bytes of zeros, then records:
                length (u64), blake3 of the content (32 bytes), content

Numbers are little-endian. A record counts once a row of the catalog refers to it, and the catalog
commits only after `sync`: what a crash leaves behind that is referred to is whole, whatever else
the file ends in. A process never writes to a segment of an earlier one.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from blake3 import blake3

from holdfast.catalog import CatalogUnavailable, SyncFailed
from holdfast.runs.errors import RunError
from holdfast.store.files import Files, LocalFiles, ReadFile, WriteFile

VERSION = 1
LARGE = 64 << 10
"""Bytes above which a body or result goes to a segment."""
FULL = 16 << 20
"""Bytes from which on a segment takes no more records."""

_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that have their reason in this process or machine, not in a file."""
_MAGIC = b"HFSEGMNT"
_HEADER = struct.Struct("<8sI4x")
_RECORD = struct.Struct("<Q32s")


class JournalDamaged(RunError):
    """Something in a segment is not what was written, or cannot be read."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__("journal_damaged", f"{path} {what}", category="server")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is."""

    segment: str
    start: int


@dataclass(slots=True, eq=False)
class _Open:
    name: str
    file: WriteFile
    size: int = 0
    is_entered: bool = False
    """Whether its directory entry is durable."""


class Segments:
    """The segments of a data directory.

    `append`, `sync` and `closed` belong to the catalog's writer, the rest to any thread. What has
    more than `above` bytes belongs here; None: nothing, all of it goes to the catalog.
    """

    def __init__(
        self, root: str | Path, files: Files | None = None, *, above: int | None = LARGE
    ) -> None:
        self._root = str(root)
        self._above = above
        self._files = files or LocalFiles()
        self._current: _Open | None = None
        self._unsynced: list[_Open] = []

    def takes(self, size: int) -> bool:
        """Whether so many bytes are to be kept here, and not in the catalog."""
        return self._above is not None and size > self._above

    def append(self, data: bytes) -> Place:
        """Write a record, which counts after the next `sync`.

        Raises CatalogUnavailable when the disk does not take it; the next one goes to a new file.
        """
        try:
            segment = self._writable()
            place = Place(segment.name, segment.size)
            segment.file.write(_RECORD.pack(len(data), blake3(data).digest()))
            segment.file.write(data)
        except OSError as error:
            self._give_up()
            raise CatalogUnavailable(
                f"the journal took no write: {error.strerror} ({self._root})"
            ) from error
        segment.size += _RECORD.size + len(data)
        if segment.size >= FULL:
            self._give_up()
        return place

    def sync(self) -> None:
        """Make durable what was appended. Raises SyncFailed, after which nothing is known of it."""
        while self._unsynced:
            segment = self._unsynced[-1]
            try:
                segment.file.sync()
                if not segment.is_entered:
                    self._files.sync_dir(self._root)
                    segment.is_entered = True
            except OSError as error:
                raise SyncFailed(f"{self._path(segment.name)}: {error.strerror}") from error
            self._unsynced.pop()
            if segment is not self._current:
                segment.file.close()

    def read(self, place: Place, size: int) -> bytes:
        """A verified record. Raises JournalDamaged; FileNotFoundError when the file is gone.

        OSError when nothing can be read now, which says nothing about the file.
        """
        path = self._path(place.segment)
        try:
            return self._read(path, place.start, size)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in _SHORTAGES:
                raise
            raise JournalDamaged(path, f"cannot be read: {error.strerror}") from error

    def closed(self) -> dict[str, int]:
        """Segments that take no more records, by name, with their sizes in bytes."""
        names = [] if self._files.stat(self._root) is None else self._files.list(self._root)
        open_ones = {segment.name for segment in self._unsynced}
        if self._current is not None:
            open_ones.add(self._current.name)
        found = {name: self._files.stat(self._path(name)) for name in names}
        return {
            name: status.size
            for name, status in found.items()
            if status is not None and name not in open_ones
        }

    def remove(self, names: Iterable[str]) -> None:
        """Remove segments that nothing refers to. Need not be durable: they are found again."""
        for name in names:
            with suppress(OSError):
                self._files.unlink(self._path(name))

    def close(self) -> None:
        """Give up the file that is being written; what was not synced does not count."""
        self._give_up()
        for segment in self._unsynced:
            segment.file.close()
        self._unsynced.clear()

    def path(self, place: Place) -> str:
        """The file of a record, for messages."""
        return self._path(place.segment)

    def _writable(self) -> _Open:
        """The segment that takes the next record; it is among the unsynced."""
        if self._current is None:
            self._make_root()
            name = uuid4().hex
            segment = _Open(name, self._files.create(self._path(name)))
            self._current = segment
            self._unsynced.append(segment)
            segment.file.write(_HEADER.pack(_MAGIC, VERSION))
            segment.size = _HEADER.size
        elif self._current not in self._unsynced:
            self._unsynced.append(self._current)
        return self._current

    def _make_root(self) -> None:
        with suppress(FileExistsError):
            self._files.mkdir(self._root)
        # Also when it was there: whoever made it may not have lived to do this.
        self._files.sync_dir(self._root.rpartition("/")[0] or "/")

    def _give_up(self) -> None:
        segment, self._current = self._current, None
        if segment is not None and segment not in self._unsynced:
            segment.file.close()

    def _read(self, path: str, start: int, size: int) -> bytes:
        file = self._files.open(path)
        try:
            magic, version = _HEADER.unpack(_exactly(file, _HEADER.size, path))
            if magic != _MAGIC:
                raise JournalDamaged(path, "is damaged: it does not begin as a segment does")
            if version != VERSION:
                raise JournalDamaged(
                    path, f"is a segment of version {version}; this Holdfast reads {VERSION}"
                )
            file.seek(start)
            length, digest = _RECORD.unpack(_exactly(file, _RECORD.size, path))
            if length != size:
                raise JournalDamaged(path, f"is damaged: no record of {size} bytes at {start}")
            data = _exactly(file, size, path)
        finally:
            file.close()
        if blake3(data).digest() != digest:
            raise JournalDamaged(path, f"is damaged: the record at {start} has another hash")
        return data

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _exactly(file: ReadFile, size: int, path: str) -> bytes:
    buffer = bytearray(size)
    if file.readinto(memoryview(buffer)) < size:
        raise JournalDamaged(path, "is damaged: it ends too early")
    return bytes(buffer)
