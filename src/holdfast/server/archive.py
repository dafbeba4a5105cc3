"""What can be downloaded of a checkpoint: the same bytes every time, in any range."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from holdfast.store import Archive, Manifest, Store

_READERS = 4
_DIGESTERS = 2
_DIGESTS = 256


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
        """The sha-256 of all bytes, as a Repr-Digest field (RFC 9530). Reads all of them."""
        total = hashlib.sha256()
        for chunk in self.read(0, self.size):
            total.update(chunk)
        return f"sha-256=:{base64.b64encode(total.digest()).decode()}:"

    @property
    def _archive(self) -> Archive:
        return Archive(self.store, self.manifest)


class Reading:
    """The threads that downloads are read in, away from those of everything else a server does.

    A digest reads a whole archive: each is computed once at a time, and the last ones are kept.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_READERS, "archive")
        self._digesters = ThreadPoolExecutor(_DIGESTERS, "digest")
        self._digests: dict[str, asyncio.Future[str]] = {}
        """By what they are of, the oldest first."""

    async def digest(self, download: Download) -> str:
        """`download.digest()`. Raises the store's errors."""
        etag = download.etag
        found = self._digests.get(etag)
        if found is None or (found.done() and found.exception() is not None):
            loop = asyncio.get_running_loop()
            found = loop.run_in_executor(self._digesters, download.digest)
            while len(self._digests) >= _DIGESTS:
                del self._digests[next(iter(self._digests))]
            self._digests[etag] = found
        return await asyncio.shield(found)  # others may be waiting for it

    async def next(self, chunks: Iterator[bytes]) -> bytes | None:
        """The next of a download's chunks; None after the last."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, next, chunks, None)

    def close(self) -> None:
        """Wait for what is being read; nothing more is begun."""
        for threads in (self._digesters, self._threads):
            threads.shutdown(cancel_futures=True)


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
