"""The store's place in an object storage: its layout, and the small objects that change.

    URL/holdfast-store.json      format marker
    URL/blobs/HASH/COPY          immutable bytes, one copy for each time they were put
    URL/doomed/HASH/COPY         what sweeps have decided about that copy
    URL/manifests/ID/COPY        a manifest, its state, and which copies of its blobs it uses
    URL/names/RUN/KIND@NAME      where a name points, and where it is about to
    URL/pins/ID/COPY             a pin, rewritten every few minutes by its holder
    URL/sweep.json               what earlier sweeps saw

COPY is random, and never used again once it was deleted: there are no locks, so an object may be
deleted long after that was decided. A name's object is never deleted by a sweep; one that expired
is left empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import uuid4

from holdfast.store.cells import ManifestCell, MarkCell, NameCell
from holdfast.store.errors import (
    Corrupt,
    CorruptManifest,
    CorruptName,
    NotAStore,
    StoreError,
    UnsupportedFormat,
)
from holdfast.store.model import NameKey
from holdfast.store.objects import Got, Listed, Objects, Version, Writer
from holdfast.store.records import check_marker, file_name, marker, run_prefix

STORE_VERSION = 1
"""Of the layout above."""

MARKER = "holdfast-store.json"
SWEEP_STATE = "sweep.json"
_FORMAT = "holdfast.object-store"

T = TypeVar("T")
AnyCell = MarkCell | ManifestCell | NameCell
Cell = TypeVar("Cell", MarkCell, ManifestCell, NameCell)
Decode = Callable[[bytes, str], T]
"""A cell from an object's bytes and how messages call it."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """An object that changes, as it was in one version."""

    key: str
    version: Version
    value: T | StoreError
    """The error when it is damaged."""

    def whole(self) -> T:
        """Its content; raises what is wrong with it."""
        if isinstance(self.value, StoreError):
            raise self.value
        return self.value


def content_of(key: str) -> str:
    """The hash in a key."""
    return key.split("/")[1]


def copy_of(key: str) -> str:
    """The last part of a key."""
    return key.rpartition("/")[2]


def is_unnamed(key: str) -> bool:
    """Whether a manifest's key is that of one made without a name."""
    return copy_of(key).startswith("unnamed.")


def new_manifest_key(manifest_id: str, *, unnamed: bool) -> str:
    return f"manifests/{manifest_id}/{'unnamed' if unnamed else 'named'}.{uuid4().hex}"


def name_key(key: NameKey) -> str:
    return f"names/{file_name(key).replace('@', '/', 1)}"


class Bucket:
    """What every operation on a store in an object storage is made of."""

    def __init__(self, objects: Objects, writer: Writer, *, create: bool) -> None:
        self.objects = objects
        self.writer = writer
        self._seen: dict[str, Entry[Any]] = {}
        self._prepare(create)

    def path(self, *parts: str) -> str:
        """How messages call an object."""
        return "/".join((self.objects.url, *parts))

    # Reading

    def marks(self) -> list[Entry[MarkCell]]:
        """What sweeps have decided about copies of blobs."""
        return self._entries(self.objects.list("doomed"), MarkCell.decode)

    def manifests(self, listed: Iterable[Listed]) -> list[Entry[ManifestCell]]:
        return self._entries(listed, _decode_manifest)

    def manifests_of(self, manifest_id: str) -> list[Entry[ManifestCell]]:
        """All copies of a manifest."""
        return self.manifests(self.objects.list(f"manifests/{manifest_id}"))

    def names(self, run: str | None = None) -> list[Entry[NameCell]]:
        where = "names" if run is None else f"names/{run_prefix(run).removesuffix('@')}"
        return self._entries(self.objects.list(where), _decode_name)

    def name(self, key: NameKey) -> Entry[NameCell] | None:
        return self._read(name_key(key), _decode_name)

    def _read(self, key: str, decode: Decode[T]) -> Entry[T] | None:
        (got,) = self.objects.get([key])
        return None if got is None else self._decoded(key, got, decode)

    def _entries(self, listed: Iterable[Listed], decode: Decode[T]) -> list[Entry[T]]:
        """What is still there of what was listed; in the listed version, or a newer one."""
        found = list(listed)
        seen = {f.key: self._seen.get(f.key) for f in found}
        new = [f.key for f in found if (old := seen[f.key]) is None or old.version.etag != f.etag]
        for key, got in zip(new, self.objects.get(new), strict=True):
            seen[key] = None if got is None else self._decoded(key, got, decode)
        there = {key: entry for key, entry in seen.items() if entry is not None}
        self._seen.update(there)
        return list(there.values())

    def _decoded(self, key: str, got: Got, decode: Decode[T]) -> Entry[T]:
        value: T | StoreError
        try:
            value = decode(got.data, self.path(key))
        except (Corrupt, UnsupportedFormat) as error:
            value = error
        return Entry(key, got.version, value)

    def forget_all_but(self, keys: Iterable[str]) -> None:
        """Nothing but these is there any more."""
        there = set(keys)
        self._seen = {key: seen for key, seen in list(self._seen.items()) if key in there}

    # Changing

    def create(self, key: str, cell: AnyCell) -> Version | None:
        """None when there is one already."""
        return self.writer.create(key, cell.encode())

    def swap(self, entry: Entry[Cell], cell: Cell) -> Version | None:
        """None when it is not in that version any more."""
        return self.writer.swap(entry.key, cell.encode(), entry.version)

    def keep_copy(self, key: str) -> bool:
        """Whether a copy of a blob is there and stays, now that something refers to it."""
        mark = key.replace("blobs/", "doomed/", 1)
        while (entry := self._read(mark, MarkCell.decode)) is not None:
            state = entry.whole().state
            if state == "dead":
                return False
            if state == "kept" or self.swap(entry, MarkCell("kept")):
                break
        # In this order: the mark of a dead copy goes only when the copy has gone.
        return self.objects.size(key) is not None

    def keep_manifest(self, manifest_id: str) -> Entry[ManifestCell] | None:
        """A copy of a manifest that stays, now that something refers to it."""
        damage = None
        for found in self.manifests_of(manifest_id):
            entry: Entry[ManifestCell] | None = found
            while entry is not None:
                if isinstance(entry.value, StoreError):
                    damage = entry.value
                    break
                if entry.value.state in ("kept", "loose"):
                    return entry
                if entry.value.state != "doomed":
                    break
                self.swap(entry, entry.value.into("loose"))
                entry = self._read(entry.key, _decode_manifest)
        if damage is not None:
            raise damage
        return None

    def is_alive(self, key: str) -> bool:
        """Whether a copy of a manifest is there, and not dead."""
        entry = self._read(key, _decode_manifest)
        return entry is not None and entry.whole().state != "dead"

    # Opening

    def _prepare(self, create: bool) -> None:
        (found,) = self.objects.get([MARKER])
        if found is None and not create:
            raise NotAStore(f"there is no store at {self.objects.url}")
        if found is None:
            if foreign := self.objects.list("", limit=1):
                raise NotAStore(
                    f"{self.objects.url} is not a Holdfast store, and not empty: "
                    f"it holds {foreign[0].key!r}"
                )
            self.writer.create(MARKER, marker(_FORMAT, STORE_VERSION))
            (found,) = self.objects.get([MARKER])
        check_marker(
            None if found is None else found.data, self.path(MARKER), _FORMAT, STORE_VERSION
        )


def _decode_manifest(data: bytes, path: str) -> ManifestCell:
    cell = ManifestCell.decode(data, path)
    if cell.manifest.id != path.split("/")[-2]:
        raise CorruptManifest(f"{path} is the manifest {cell.manifest.id}", path)
    return cell


def _decode_name(data: bytes, path: str) -> NameCell:
    cell = NameCell.decode(data, path)
    if cell.record is not None and not path.endswith(f"/{name_key(cell.record.key)}"):
        raise CorruptName(f"{path} is the record of another name, {cell.record.key}", path)
    return cell
