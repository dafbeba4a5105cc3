"""The object port: the few calls through which the store touches an object storage.

Small, so that tests can replace it by a storage that switches to another process, or loses one, at
any call. Keys are relative to the store's prefix. Every call raises an error of the store's tree;
a write that raised `Unavailable` may still have been carried out.

What is asked of the storage: an object appears whole or not at all; whoever reads or lists after a
write has returned sees it; a conditional write takes effect only when its condition holds. S3, GCS
and Azure Blob Storage promise all three.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from holdfast.store.errors import Unavailable
from holdfast.store.files import ReadFile

_TRIES = 4
"""How often a conditional write is tried whose outcome is not known."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an object, as conditional writes ask for it."""

    etag: str
    generation: str | None = None
    """What Google's storage goes by instead."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing says of an object."""

    key: str
    size: int
    modified: float
    """Seconds since 1970, by the storage's clock."""
    etag: str


@dataclass(frozen=True, slots=True)
class Got:
    """A small object's content, and which version it is."""

    data: bytes
    version: Version


class Objects(Protocol):
    """A bucket, or what is below a prefix of one."""

    url: str

    def create(self, key: str, data: bytes) -> Version | None:
        """Write a new object; None when there is one already."""
        ...

    def swap(self, key: str, data: bytes, version: Version) -> Version | None:
        """Replace an object; None when it is not, or no longer, in that version."""
        ...

    def upload(self, key: str, pieces: Iterable[memoryview], size: int) -> None:
        """Write an object of any size under a key that nobody else uses."""
        ...

    def get(self, keys: Sequence[str]) -> list[Got | None]:
        """Read small objects; None for one that is not there."""
        ...

    def open(self, key: str) -> AbstractContextManager[ReadFile | None]:
        """Read a large object; None when it is not there. OSError when that fails later."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes; None when it is not there."""
        ...

    def list(self, prefix: str, limit: int | None = None) -> list[Listed]:
        """All objects below a prefix, or the first ones of them."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there do not matter."""
        ...

    def close(self) -> None: ...


class Writer:
    """Conditional writes of small objects whose content is never the same twice.

    A response that was lost leaves open whether its request was carried out. It is repeated then,
    and one that finds its own content in place has succeeded.
    """

    def __init__(self, objects: Objects, pause: Callable[[int], None] | None = None) -> None:
        self._objects = objects
        self.pause = pause or _pause
        """Called before another try, with how many there have been."""

    def create(self, key: str, data: bytes) -> Version | None:
        return self._settle(key, data, lambda: self._objects.create(key, data))

    def swap(self, key: str, data: bytes, version: Version) -> Version | None:
        return self._settle(key, data, lambda: self._objects.swap(key, data, version))

    def _settle(self, key: str, data: bytes, write: Callable[[], Version | None]) -> Version | None:
        for tried in range(1, _TRIES + 1):
            try:
                written = write()
            except Unavailable:
                if tried == _TRIES:
                    raise
                self.pause(tried)
                continue
            if written is not None:
                return written
            break
        (found,) = self._objects.get([key])
        return found.version if found is not None and found.data == data else None


def _pause(tried: int) -> None:
    time.sleep(random.uniform(0.5, 1.0) * min(2.0, 0.02 * 2**tried))
