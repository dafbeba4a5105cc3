"""Bytes to and from the disk, hashed on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blake3 import blake3

from holdfast.store.errors import CorruptBlob
from holdfast.store.files import ReadFile, WriteFile
from holdfast.store.model import Blob

CHUNK = 4 << 20
"""Bytes written, read and hashed at a time."""


def write_hashed(file: WriteFile, parts: Iterable[bytes | memoryview]) -> Blob:
    """Write all parts and return what they are."""
    hasher = blake3(max_threads=blake3.AUTO)
    size = 0
    for piece in _chunks(parts):
        hasher.update(piece)
        file.write(piece)
        size += len(piece)
    return Blob(hasher.hexdigest(), size)


def read_verified(file: ReadFile, blob: Blob, buffer: memoryview, what: str, path: str) -> None:
    """Fill `buffer` with the blob's bytes; CorruptBlob unless size and hash are right."""
    check_size(file, blob, what, path)
    hasher = blake3(max_threads=blake3.AUTO)
    for start in range(0, blob.size, CHUNK):
        piece = buffer[start : start + CHUNK]
        if file.readinto(piece) != len(piece):
            raise CorruptBlob(f"{what}: {path} ended early while it was read", path)
        hasher.update(piece)
    check_hash(hasher.hexdigest(), blob, what, path)


def verify_file(file: ReadFile, blob: Blob, what: str, path: str) -> None:
    """Like `read_verified`, keeping nothing."""
    check_size(file, blob, what, path)
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(CHUNK, blob.size)))
    left = blob.size
    while left:
        piece = buffer[: min(left, CHUNK)]
        if file.readinto(piece) != len(piece):
            raise CorruptBlob(f"{what}: {path} ended early while it was read", path)
        hasher.update(piece)
        left -= len(piece)
    check_hash(hasher.hexdigest(), blob, what, path)


def check_size(file: ReadFile, blob: Blob, what: str, path: str) -> None:
    if file.size != blob.size:
        raise CorruptBlob(
            f"{what} is damaged: {path} has {file.size} bytes, {blob.size} were saved", path
        )


def check_hash(found: str, blob: Blob, what: str, path: str) -> None:
    if found != blob.hash:
        raise CorruptBlob(f"{what} is damaged: the bytes of {path} have the hash {found}", path)


def _chunks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]
