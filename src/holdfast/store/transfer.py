"""Bytes to and from the disk, hashed on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from queue import Queue
from tempfile import SpooledTemporaryFile
from threading import Thread
from typing import Protocol

from blake3 import blake3

from holdfast.store.errors import CorruptBlob
from holdfast.store.files import ReadFile
from holdfast.store.model import Blob

CHUNK = 2 << 20
"""Bytes written, read and hashed at a time."""

_INLINE = 8 << 20
"""Bytes after which hashing moves to a thread of its own; before, starting one costs more."""

_AHEAD = 4
"""Chunks that may wait to be hashed."""


_SPOOL = 64 << 20
"""Bytes of a stream that are kept in memory until its hash is known."""


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: memoryview, /) -> object: ...


def write_hashed(file: Sink, parts: Iterable[bytes | memoryview]) -> Blob:
    """Write all parts and return what they are."""
    size = 0
    with _Hasher(blake3.AUTO) as hasher:
        for piece in _chunks(parts):
            hasher.update(piece)
            file.write(piece)
            size += len(piece)
    return Blob(hasher.hexdigest(), size)


@contextmanager
def hashed(parts: Iterable[bytes | memoryview]) -> Iterator[tuple[Blob, Iterator[memoryview]]]:
    """What the parts are, before any of them is needed, and then their bytes in pieces.

    Parts that are not in memory are kept, on the disk when they are many.
    """
    if isinstance(parts, Sequence):
        yield write_hashed(_Nothing(), parts), _chunks(parts)
        return
    with SpooledTemporaryFile(_SPOOL) as spool:
        blob = write_hashed(spool, parts)
        spool.seek(0)
        yield blob, map(memoryview, iter(lambda: spool.read(CHUNK), b""))


class _Nothing:
    def write(self, data: memoryview, /) -> None:
        """Only hashed."""


def read_verified(file: ReadFile, blob: Blob, buffer: memoryview, what: str, path: str) -> None:
    """Fill `buffer` with the bytes of a file of the right size; CorruptBlob on another hash."""
    pieces = (buffer[start : start + CHUNK] for start in range(0, blob.size, CHUNK))
    _read(file, blob, pieces, what, path)


def verify_file(file: ReadFile, blob: Blob, what: str, path: str) -> None:
    """Like `read_verified`, keeping nothing."""
    verify_pieces(file, blob, 0, 0, what, path)


def verify_pieces(
    file: ReadFile, blob: Blob, start: int, stop: int, what: str, path: str
) -> deque[bytes]:
    """Like `verify_file`; the blake3 digests of what `read_pieces` gives from `start` to `stop`."""
    digests: deque[bytes] = deque()
    # One more than can be waiting, being hashed and being read at a time.
    buffers = [memoryview(bytearray(min(CHUNK, blob.size))) for _ in range(_AHEAD + 3)]

    def pieces() -> Iterator[memoryview]:
        spans = (*_spans(0, start), *_spans(start, stop), *_spans(stop, blob.size))
        for number, (first, last) in enumerate(spans):
            piece = buffers[number % len(buffers)][: last - first]
            yield piece  # to be filled
            if start <= first < stop:
                digests.append(blake3(piece).digest())

    _read(file, blob, pieces(), what, path)
    return digests


def stream_verified(file: ReadFile, blob: Blob, what: str, path: str) -> Iterator[bytes]:
    """All bytes; the last ones only when they are right."""
    hasher = blake3(max_threads=blake3.AUTO)
    last = b""
    for piece in read_pieces(file, 0, blob.size, what, path):
        if last:
            yield last
        hasher.update(piece)
        last = piece
    _check_hash(hasher.hexdigest(), blob, what, path)
    yield last


def read_pieces(file: ReadFile, start: int, stop: int, what: str, path: str) -> Iterator[bytes]:
    """The bytes from `start`, where the file is, to `stop`. Nothing is verified."""
    for first, last in _spans(start, stop):
        buffer = bytearray(last - first)
        if file.readinto(memoryview(buffer)) != len(buffer):
            raise CorruptBlob(f"{what}: {path} ended early while it was read", path)
        yield bytes(buffer)


def _spans(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of the pieces from `start` to `stop`."""
    return ((first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK))


def check_size(size: int, blob: Blob, what: str, path: str) -> None:
    """CorruptBlob unless a file has the blob's size; comes before anything else is read of it."""
    if size != blob.size:
        raise CorruptBlob(
            f"{what} is damaged: {path} has {size} bytes, {blob.size} were saved", path
        )


def _check_hash(found: str, blob: Blob, what: str, path: str) -> None:
    if found != blob.hash:
        raise CorruptBlob(f"{what} is damaged: the bytes of {path} have the hash {found}", path)


def _read(file: ReadFile, blob: Blob, pieces: Iterable[memoryview], what: str, path: str) -> None:
    with _Hasher(blake3.AUTO if blob.size > _INLINE else 1) as hasher:
        for piece in pieces:
            if file.readinto(piece) != len(piece):
                raise CorruptBlob(f"{what}: {path} ended early while it was read", path)
            hasher.update(piece)
    _check_hash(hasher.hexdigest(), blob, what, path)


class _Hasher:
    """blake3 beside the caller's work: on a thread of its own once it pays.

    A piece must not change before the context ends, or `_AHEAD` + 2 later pieces were given.
    """

    def __init__(self, max_threads: int) -> None:
        self._hasher = blake3(max_threads=max_threads)
        self._inline = 0
        self._queue: Queue[memoryview | None] | None = None

    def update(self, piece: memoryview) -> None:
        if self._inline < _INLINE:
            self._inline += len(piece)
            self._hasher.update(piece)
            return
        if self._queue is None:
            self._queue = Queue(_AHEAD)
            self._thread = Thread(target=self._work, args=(self._queue,), name="blake3")
            self._thread.start()
        self._queue.put(piece)

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *error: object) -> None:
        if self._queue is not None:
            self._queue.put(None)
            self._thread.join()

    def _work(self, queue: Queue[memoryview | None]) -> None:
        while (piece := queue.get()) is not None:
            self._hasher.update(piece)


class Watched:
    """A file that tells how many bytes are read of it."""

    def __init__(self, file: ReadFile, advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance
        self.size = file.size
        self.seek = file.seek
        self.close = file.close

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(buffer)
        self._advance(count)
        return count


def watched(
    parts: Iterable[bytes | memoryview], advance: Callable[[int], None]
) -> Iterator[memoryview]:
    """The parts in pieces; tells of each once it was taken and the next one is asked for."""
    for piece in _chunks(parts):
        yield piece
        advance(len(piece))


def _chunks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]
