"""A checkpoint as a tar archive: the same bytes every time, in any range."""

from __future__ import annotations

import base64
import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from holdfast.store import Blob, Manifest, Store

MANIFEST = "holdfast.json"
"""The manifest's name in the archive: it has the size and hash of every other file."""

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """Consecutive bytes of the archive: at hand, or a blob's."""

    start: int
    size: int
    read: Callable[[], bytes]


class Archive:
    """A manifest and its files. Blobs are verified whenever they are read."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self.etag = manifest.id
        self._parts: list[_Part] = []
        self.size = 0
        text = manifest.to_bytes()
        self._add_file(MANIFEST, len(text), manifest.created, lambda: text)
        for name, blob in sorted(manifest.files.items()):
            self._add_file(name, blob.size, manifest.created, self._reader(manifest, name, blob))
        self._add(tarfile.BLOCKSIZE * 2, lambda: bytes(tarfile.BLOCKSIZE * 2))

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to, not including, `end`. Raises the store's errors."""
        for part in self._parts:
            first, last = max(start, part.start), min(end, part.start + part.size)
            if first >= last:
                continue
            data = memoryview(part.read())
            for at in range(first, last, _CHUNK):
                yield bytes(data[at - part.start : min(at + _CHUNK, last) - part.start])

    def digest(self) -> str:
        """The sha-256 of the whole archive, as a Repr-Digest field (RFC 9530)."""
        return _digest(self)

    def __hash__(self) -> int:
        return hash(self.etag)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Archive) and other.etag == self.etag

    def _reader(self, manifest: Manifest, name: str, blob: Blob) -> Callable[[], bytes]:
        return lambda: self._store.read_blob(blob, what=f"{name} of {manifest.label}")

    def _add_file(self, name: str, size: int, created: float, read: Callable[[], bytes]) -> None:
        info = tarfile.TarInfo(name)
        info.size = size
        info.mtime = int(created)
        header = info.tobuf(tarfile.USTAR_FORMAT if size < 8 << 30 else tarfile.GNU_FORMAT)
        self._add(len(header), lambda: header)
        self._add(size, read)
        padding = -size % tarfile.BLOCKSIZE
        self._add(padding, lambda: bytes(padding))

    def _add(self, size: int, read: Callable[[], bytes]) -> None:
        self._parts.append(_Part(self.size, size, read))
        self.size += size


@lru_cache(maxsize=64)
def _digest(archive: Archive) -> str:
    total = hashlib.sha256()
    for chunk in archive.read(0, archive.size):
        total.update(chunk)
    return f"sha-256=:{base64.b64encode(total.digest()).decode()}:"


def parse_range(text: str | None, size: int) -> tuple[int, int] | None:
    """The start and end (not included) that a Range header asks for; None for the whole.

    Several ranges and other units are answered with the whole (RFC 9110, 14.2). Raises ValueError
    for a range that lies outside.
    """
    if text is None:
        return None
    unit, _, ranges = text.partition("=")
    first, dash, last = ranges.strip().partition("-")
    if unit.strip().lower() != "bytes" or not dash or "," in ranges:
        return None
    if not (first + last).isascii() or not (first + last).isdigit():
        return None
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    else:
        start, end = max(0, size - int(last)), size
    if start >= size or start >= end:
        raise ValueError(f"range {text!r} lies outside of the {size} bytes")
    return start, end
