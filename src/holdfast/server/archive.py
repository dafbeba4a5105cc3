"""What can be downloaded of a checkpoint: the same bytes every time, in any range."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache

from holdfast.store import Archive, Manifest, Store


@dataclass(frozen=True)
class Download:
    """A checkpoint's tar archive, or one of its files. Blobs are verified whenever they are read.

    Raises KeyError for a file that the checkpoint does not have.
    """

    store: Store
    manifest: Manifest
    file: str | None = None
    """None for the archive."""

    def __post_init__(self) -> None:
        if self.file is not None:
            self.manifest.files[self.file]

    @property
    def etag(self) -> str:
        """Of these bytes, and no others."""
        return self.manifest.id if self.file is None else self.manifest.files[self.file].hash

    @property
    def size(self) -> int:
        """Bytes."""
        return self._archive.size if self.file is None else self.manifest.files[self.file].size

    @property
    def media_type(self) -> str:
        return "application/x-tar" if self.file is None else "application/octet-stream"

    def read(self, start: int, stop: int) -> Generator[bytes]:
        """The bytes from `start` up to, not including, `stop`. Raises the store's errors.

        The manifest is pinned meanwhile: deleting the checkpoint does not break a download off.
        """
        with self.store.pin(self.manifest.id):
            if self.file is None:
                yield from self._archive.read(start, stop)
            else:
                blob = self.manifest.files[self.file]
                what = f"{self.file} of {self.manifest.label}"
                yield from self.store.stream_blob(blob, start, stop, what=what)

    def digest(self) -> str:
        """The sha-256 of all bytes, as a Repr-Digest field (RFC 9530). Reads all of them once."""
        return _digest(_Key(self.etag, self))

    @property
    def _archive(self) -> Archive:
        return Archive(self.store, self.manifest)


class _Key:
    """A download by what it is."""

    def __init__(self, etag: str, download: Download) -> None:
        self.etag = etag
        self.download = download

    def __hash__(self) -> int:
        return hash(self.etag)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.etag == self.etag


@lru_cache(maxsize=256)
def _digest(key: _Key) -> str:
    total = hashlib.sha256()
    for chunk in key.download.read(0, key.download.size):
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
