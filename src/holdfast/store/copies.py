"""Reading a blob of which there may be several copies: a whole one is found if there is any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import structlog
from blake3 import blake3

from holdfast.store.errors import CorruptBlob, MissingBlob
from holdfast.store.files import ReadFile
from holdfast.store.model import Blob
from holdfast.store.transfer import read_pieces, read_verified, stream_verified, verify_pieces

Copy = Callable[[], AbstractContextManager[tuple[ReadFile, str]]]
"""Opens a copy of a blob: its file, of the right size, and where that is.

MissingBlob, then and while it is read, when it is not there; CorruptBlob for a wrong size.
"""

T = TypeVar("T")

_log = structlog.get_logger("holdfast.store")


def read(copies: Sequence[Copy], blob: Blob, what: str) -> bytes:
    """The first copy that is whole. Raises MissingBlob or CorruptBlob."""

    def fill(file: ReadFile, path: str) -> bytearray:
        # Not before the file's size is known to be right: the blob's may be anybody's claim.
        buffer = bytearray(blob.size)
        read_verified(file, blob, memoryview(buffer), what, path)
        return buffer

    return bytes(_first_whole(copies, fill)[0])


def read_into(copies: Sequence[Copy], blob: Blob, buffer: memoryview, what: str) -> None:
    """`read` into a buffer of the blob's size."""
    _first_whole(copies, lambda file, path: read_verified(file, blob, buffer, what, path))


def stream(copies: Sequence[Copy], blob: Blob, start: int, stop: int, what: str) -> Iterator[bytes]:
    """The bytes from `start` to `stop`, the last ones only when the whole blob is right.

    All of a single copy is given while it is hashed. A range, or what can be had from another copy
    as well, is read twice: to compare the whole with its hash, noting the hash of each piece that
    is asked for, and to give those pieces, each compared with what was noted.
    """
    if len(copies) == 1 and (start, stop) == (0, blob.size):
        with copies[0]() as (file, path):
            yield from stream_verified(file, blob, what, path)
        return
    digests, copies = _first_whole(
        copies, lambda file, path: verify_pieces(file, blob, start, stop, what, path)
    )
    refused: list[CorruptBlob | MissingBlob] = []
    for copy in copies:
        try:
            with copy() as (file, path):
                file.seek(start)
                for piece in read_pieces(file, start, stop, what, path):
                    if blake3(piece).digest() != digests[0]:
                        raise CorruptBlob(f"{what} is damaged: {path} changed meanwhile", path)
                    yield piece
                    start += len(piece)
                    digests.popleft()
            return
        except (CorruptBlob, MissingBlob) as error:
            refused.append(error)
    raise _worst(refused)


def _first_whole(
    copies: Sequence[Copy], read: Callable[[ReadFile, str], T]
) -> tuple[T, Sequence[Copy]]:
    """What reading the first whole copy gives; that copy, and those that come after it."""
    refused: list[CorruptBlob | MissingBlob] = []
    for number, copy in enumerate(copies):
        try:
            with copy() as (file, path):
                found = read(file, path)
        except (CorruptBlob, MissingBlob) as error:
            refused.append(error)
        else:
            for damage in refused:
                if isinstance(damage, CorruptBlob):
                    _log.error("another copy is read", error=str(damage), instead=path)
            return found, copies[number:]
    raise _worst(refused)


def _worst(refused: list[CorruptBlob | MissingBlob]) -> CorruptBlob | MissingBlob:
    return next((error for error in refused if isinstance(error, CorruptBlob)), refused[0])
