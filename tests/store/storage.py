"""An object storage in memory that switches to another process, or ends one, at any call.

It keeps what S3, GCS and Azure promise: a write is there, or not there, for everybody at once.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from holdfast.store.files import ReadFile
from holdfast.store.objects import Got, Listed, Version


@dataclass
class Storage:
    """What is stored: all processes that use it see the same."""

    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Content and version by key."""
    versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held by a write that has a condition: threads may use it at once."""

    def put(self, key: str, data: bytes) -> Version:
        number = next(self.versions)
        self.objects[key] = (data, number)
        return Version(str(number))


class MemoryObjects:
    """One process's way to a storage. `calling` is told before each call, and may raise."""

    url = "mem://bucket/prefix"

    def __init__(
        self, storage: Storage, calling: Callable[[str, str], None] = lambda name, key: None
    ) -> None:
        self.storage = storage
        self.calling = calling

    def create(self, key: str, data: bytes) -> Version | None:
        self.calling("create", key)
        with self.storage.lock:
            return None if key in self.storage.objects else self.storage.put(key, data)

    def swap(self, key: str, data: bytes, version: Version) -> Version | None:
        self.calling("swap", key)
        with self.storage.lock:
            found = self.storage.objects.get(key)
            if found is None or str(found[1]) != version.etag:
                return None
            return self.storage.put(key, data)

    def upload(self, key: str, pieces: Iterable[memoryview], size: int) -> None:
        data = b"".join(pieces)
        assert len(data) == size
        self.calling("upload", key)
        self.storage.put(key, data)

    def get(self, keys: Sequence[str]) -> list[Got | None]:
        return [self._get(key) for key in keys]

    def _get(self, key: str) -> Got | None:
        self.calling("get", key)
        found = self.storage.objects.get(key)
        return None if found is None else Got(found[0], Version(str(found[1])))

    @contextmanager
    def open(self, key: str) -> Iterator[ReadFile | None]:
        got = self._get(key)
        yield None if got is None else _File(self, key, got.data)

    def size(self, key: str) -> int | None:
        self.calling("size", key)
        found = self.storage.objects.get(key)
        return None if found is None else len(found[0])

    def list(self, prefix: str, limit: int | None = None) -> list[Listed]:
        self.calling("list", prefix)
        return [
            Listed(key, len(data), float(number), str(number))
            for key, (data, number) in sorted(dict(self.storage.objects).items())
            if not prefix or key.startswith(f"{prefix}/")
        ][:limit]

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.calling("delete", key)
            self.storage.objects.pop(key, None)

    def close(self) -> None:
        """Nothing is held."""


class _File:
    """Read part by part: it may be gone before the end."""

    def __init__(self, objects: MemoryObjects, key: str, data: bytes) -> None:
        self.size = len(data)
        self._objects = objects
        self._key = key
        self._position = 0

    def readinto(self, buffer: memoryview) -> int:
        self._objects.calling("read", self._key)
        found = self._objects.storage.objects.get(self._key)
        if found is None:
            raise FileNotFoundError(self._key)
        piece = found[0][self._position :][: len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def seek(self, position: int) -> None:
        self._position = position

    def close(self) -> None:
        """Nothing is held."""
