"""What every store can do, wherever it keeps its bytes."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from holdfast.store.copies import Copy, read, read_into, stream
from holdfast.store.errors import (
    CorruptBlob,
    InvalidValue,
    MissingBlob,
    MissingManifest,
    MissingName,
    NameTaken,
    StoreError,
)
from holdfast.store.model import Blob, Manifest, NameKey
from holdfast.store.records import NameRecord

OnDamage = Callable[[StoreError], None]
"""Told of a damaged entry, which is then left out; without it the error is raised."""

Progress = Callable[[int, int], object]
"""Told how many bytes have been read, and how many there are in all."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep removed, and what it left for a later one."""

    names: tuple[NameKey, ...] = ()
    """Expired names."""
    manifests: int = 0
    blobs: int = 0
    size: int = 0
    """Bytes of the removed blobs."""
    waiting: int = 0
    """Entries that will go unless somebody comes to use them."""
    damaged: tuple[str, ...] = ()
    """Damaged files. While there are any, nothing is removed that they may refer to."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read in full, and everything that is wrong with it."""

    manifests: int
    blobs: int
    size: int
    """Bytes of the blobs read."""
    problems: tuple[StoreError, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of one checkpoint's blobs."""

    own: int
    """That no other checkpoint uses: what deleting this one sets free."""
    shared: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What checkpoints take on the disk."""

    checkpoints: Mapping[str, Size]
    """By the manifest's id."""
    total: int
    """Bytes of all their blobs, each counted once."""


class Store(ABC):
    """Checkpoints: immutable blobs and manifests, and names that point to manifests.

    Safe to use from several threads and several processes at once. What has returned is durable.
    Every method raises an error of `holdfast.store.errors`.
    """

    shared = False
    """Whether servers with catalogs of their own may keep checkpoints here as well: what one
    catalog does not know may be another's."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._before_change: list[Callable[[], None]] = []
        self._while_moving: list[Callable[[], None]] = []

    def before_change(self, call: Callable[[], None]) -> None:
        """Have `call` made before each change that others see; what it raises breaks that off.

        A name moves only if it is still what it was before the call. Blobs are not asked for: they
        can be put by anybody.
        """
        self._before_change.append(call)

    def while_moving(self, call: Callable[[], None]) -> None:
        """Have `call` made after each piece of a blob that was read or written, in any thread.

        A storage that is slow is told by that from one that stands still.
        """
        self._while_moving.append(call)

    @abstractmethod
    def put_blob(self, parts: Iterable[bytes | memoryview]) -> Blob:
        """Write a blob, hashed on the way; durable when it returns.

        Equal content that is there already is replaced by what was written now, so nothing of
        an older, perhaps damaged file is trusted. The blob stays for an hour of server time at
        least, or until it is published; put twice, until it is published twice.
        """

    def read_blob(self, blob: Blob, *, what: str) -> bytes:
        """A blob's verified bytes.

        `what` names it in errors, e.g. "adapter_model.safetensors of run/weights/final". Raises
        MissingBlob, or CorruptBlob when size or hash differ.
        """
        return read(self._copies(blob, what), blob, what)

    def read_blob_into(self, blob: Blob, buffer: memoryview, *, what: str) -> None:
        """`read_blob` into a writable buffer of exactly the blob's size.

        When it raises, the buffer's content means nothing.
        """
        view = buffer.cast("B")
        if len(view) != blob.size:
            raise InvalidValue(f"{what} has {blob.size} bytes, the buffer {len(view)}")
        read_into(self._copies(blob, what), blob, view, what)

    def stream_blob(
        self, blob: Blob, start: int = 0, stop: int | None = None, *, what: str
    ) -> Iterator[bytes]:
        """A blob's bytes from `start` to `stop`, in pieces, whatever its size.

        The whole blob is verified before the last piece is given, so that a damaged one is never
        given in full; a range, before its first piece. Raises as `read_blob` does.
        """
        stop = blob.size if stop is None else stop
        if not 0 <= start <= stop <= blob.size:
            raise InvalidValue(f"{what} has {blob.size} bytes, asked for {start} to {stop}")
        yield from stream(self._copies(blob, what), blob, start, stop, what)

    @abstractmethod
    def has_blob(self, blob: Blob) -> bool:
        """Whether a blob is there, in the right size; its content is not read."""

    @abstractmethod
    def publish(self, manifest: Manifest) -> str:
        """Store a manifest durably and return its id.

        Raises MissingBlob, or CorruptBlob for one of another size. With a name, it stays for an
        hour of server time at least, afterwards only while a name points to it or it is pinned;
        without one, until it is discarded. Publishing it again changes nothing.
        """

    @abstractmethod
    def read_manifest(self, manifest_id: str) -> Manifest:
        """A verified manifest. Raises MissingManifest or CorruptManifest."""

    def set_name(
        self,
        key: NameKey,
        manifest_id: str,
        *,
        replace: bool = False,
    ) -> None:
        """Point a name to a manifest, atomically: readers and crashes see the old or the new.

        A name that points elsewhere and has not expired is an error (NameTaken) unless `replace`.
        Raises MissingManifest when there is no such manifest.
        """
        free = (None, manifest_id)
        existing = self._point(key, manifest_id, lambda current: replace or current in free)
        if existing is not None and existing != manifest_id:
            raise NameTaken(f"there is a checkpoint {key} already", existing)

    @abstractmethod
    def resolve(self, key: NameKey) -> str | None:
        """The id that a name points to; None when it is not there or has expired."""

    @abstractmethod
    def delete_name(self, key: NameKey) -> bool:
        """Remove a name durably; whether it was there. Its bytes go with a later sweep."""

    @abstractmethod
    def names(
        self, run: str | None = None, *, on_damage: OnDamage | None = None
    ) -> Iterator[tuple[NameKey, str]]:
        """All names, or those of one run, that have not expired, with their manifests' ids."""

    @abstractmethod
    def unnamed(
        self, run: str | None = None, *, on_damage: OnDamage | None = None
    ) -> Iterator[tuple[str, Manifest]]:
        """Published manifests without a name, not discarded yet."""

    @abstractmethod
    def discard(self, manifest_id: str) -> bool:
        """Remove an unnamed manifest durably; whether it was there."""

    @abstractmethod
    def pin(self, manifest_id: str) -> AbstractContextManager[Manifest]:
        """Keep a manifest and its blobs from every sweep while the context lasts.

        Raises MissingManifest. The pin ends with the process that holds it.
        """

    @abstractmethod
    def sweep(self) -> SweepReport:
        """Remove what has expired and what nothing refers to any more.

        Meant to be called every minute or so by one process. Safe beside running saves and
        loads of any process, and whatever the clock does: see `holdfast.store.sweep`.
        """

    @abstractmethod
    def verify(
        self, manifest_id: str | None = None, *, progress: Progress | None = None
    ) -> VerifyReport:
        """Read one manifest and its blobs, or everything in the store, and report what is wrong."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""

    def amend(self, key: NameKey, **changes: Any) -> str:
        """Publish a changed copy of a name's manifest and move the name to it; the new id.

        `changes` are fields of Manifest, e.g. `expires`, `public`, `user_metadata`. A concurrent
        overwrite is not undone: the change then applies to the newer checkpoint. Raises
        MissingName.
        """
        while True:
            current = self.resolve(key)
            if current is None:
                raise MissingName(f"there is no checkpoint {key}")
            try:
                with self.pin(current) as manifest:
                    manifest_id = self.publish(dataclasses.replace(manifest, **changes))
                    if self._move_name(key, current, manifest_id):
                        return manifest_id
            except MissingManifest:
                if self.resolve(key) == current:
                    raise

    def usage(self, run: str | None = None) -> Usage:
        """What each checkpoint, named or not, of all runs or of one, takes on the disk."""
        manifests = {
            manifest_id: self.read_manifest(manifest_id) for _, manifest_id in self.names()
        }
        manifests.update(self.unnamed())
        users = Counter(blob for m in manifests.values() for blob in set(m.files.values()))
        sizes = {}
        for manifest_id, manifest in manifests.items():
            if run in (None, manifest.run):
                blobs = set(manifest.files.values())
                own = sum(blob.size for blob in blobs if users[blob] == 1)
                sizes[manifest_id] = Size(own, sum(blob.size for blob in blobs) - own)
        used = {blob for m in sizes for blob in manifests[m].files.values()}
        return Usage(sizes, sum(blob.size for blob in used))

    def _move_name(self, key: NameKey, current: str, manifest_id: str) -> bool:
        """Point a name from `current` to `manifest_id`; False when it points elsewhere now."""
        expected = (current, manifest_id)
        return self._point(key, manifest_id, lambda found: found in expected) == manifest_id

    @abstractmethod
    def _point(
        self, key: NameKey, manifest_id: str, accepts: Callable[[str | None], bool]
    ) -> str | None:
        """Point a name to a manifest if that `accepts` what it points to; what it does then.

        A damaged record is replaced if the empty text, which is no id, is accepted.
        """

    def _moved(self, count: int) -> None:
        for call in self._while_moving:
            call()

    def _about_to_change(self) -> None:
        for call in self._before_change:
            call()

    @abstractmethod
    def _copies(self, blob: Blob, what: str) -> Sequence[Copy]:
        """The copies of a blob, at least one, the best one first. MissingBlob if there is none."""

    def _for_name(self, key: NameKey, manifest_id: str) -> Manifest:
        """The manifest that a name is to point to. Raises InvalidValue if made for another one."""
        manifest = self.read_manifest(manifest_id)
        if manifest.key != key:
            raise InvalidValue(f"manifest {manifest_id} is {manifest.key or 'unnamed'}, not {key}")
        return manifest

    def _current(self, record: NameRecord | None) -> str | None:
        """What a name points to now; an expired one points nowhere."""
        if record is None or (record.expires is not None and record.expires <= self._wall()):
            return None
        return record.manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_there(size: int | None, blob: Blob, name: str, path: str) -> None:
    """A file to be published has `size` bytes, None: none. Raises MissingBlob or CorruptBlob."""
    if size is None:
        raise MissingBlob(f"{name} cannot be published: there is no {path}")
    if size != blob.size:
        raise CorruptBlob(
            f"{name} cannot be published: {path} has {size} bytes, not {blob.size}", path
        )


@contextmanager
def damage_to(on_damage: OnDamage | None) -> Iterator[None]:
    """Tell of damage instead of raising it, when there is somebody to be told."""
    try:
        yield
    except StoreError as error:
        if on_damage is None:
            raise
        on_damage(error)
