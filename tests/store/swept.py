"""Stores to sweep, whose clocks are moved by hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

from holdfast.store import LocalStore, Manifest, ObjectStore, Store, SweepReport
from holdfast.store.objects import Writer
from tests.store.model import Clock
from tests.store.samples import WEIGHTS, key_of, manifest_of
from tests.store.storage import MemoryObjects, Storage

HOUR = 3600.0

AnyStore = TypeVar("AnyStore", bound=Store)


class Swept(ABC, Generic[AnyStore]):
    """A store, and what is left in it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = self.open()

    @abstractmethod
    def open(self) -> AnyStore:
        """The store as another process has it."""

    @abstractmethod
    def files(self) -> set[str]:
        """All that is kept in it, but for its own notes."""

    @abstractmethod
    def spoil_note(self, data: bytes) -> None:
        """Replace what earlier sweeps have noted."""

    def content(self) -> set[str]:
        """The same without names."""
        return {file for file in self.files() if not file.startswith("names/")}

    def sweep(self, *after: float, store: Store | None = None) -> SweepReport:
        """Sweep once after each of these times; the last report."""
        report = SweepReport()
        for seconds in after:
            self.clock.monotonic += seconds
            report = (store or self.store).sweep()
        return report

    def save(self, content: bytes, name: str | None = "final", **changes: object) -> Manifest:
        manifest = manifest_of({WEIGHTS: self.store.put_blob([content])}, name=name, **changes)
        self.store.publish(manifest)
        if name is not None:
            self.store.set_name(key_of(manifest), manifest.id, replace=True)
        return manifest


class LocalSwept(Swept[LocalStore]):
    """On a real disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        super().__init__()

    def open(self) -> LocalStore:
        return LocalStore(
            self.root, wall=lambda: self.clock.wall, monotonic=lambda: self.clock.monotonic
        )

    def files(self) -> set[str]:
        return {
            f"{directory}/{path.name}"
            for directory in ("blobs", "manifests", "unnamed", "names", "tmp", "fresh", "pins")
            for path in (self.root / directory).iterdir()
        }

    def spoil_note(self, data: bytes) -> None:
        (self.root / "sweep.json").write_bytes(data)


class StoredSwept(Swept[ObjectStore]):
    """In an object storage."""

    def __init__(self) -> None:
        self.storage = Storage()
        super().__init__()

    def open(self) -> ObjectStore:
        objects = MemoryObjects(self.storage)
        return ObjectStore(
            objects,
            writer=Writer(objects, lambda tried: None),
            wall=lambda: self.clock.wall,
            monotonic=lambda: self.clock.monotonic,
        )

    def files(self) -> set[str]:
        return {key for key in self.storage.objects if "/" in key}

    def there(self, directory: str) -> list[str]:
        """Keys of the objects in a directory, the oldest first."""
        return [key for key in self.storage.objects if key.startswith(f"{directory}/")]

    def spoil_note(self, data: bytes) -> None:
        self.storage.put("sweep.json", data)
