"""The store in an object storage: S3 and its like, Google Cloud Storage, Azure Blob Storage.

How its writes and its sweeps fit together without locks is told in `holdfast.store.object_sweep`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from uuid import uuid4

from holdfast.store.audit import Audit, size_of
from holdfast.store.base import (
    OnDamage,
    Progress,
    Store,
    SweepReport,
    VerifyReport,
    check_there,
    damage_to,
)
from holdfast.store.bucket import (
    Bucket,
    Entry,
    content_of,
    copy_of,
    is_unnamed,
    name_key,
    new_manifest_key,
)
from holdfast.store.cells import ManifestCell, NameCell, encode
from holdfast.store.copies import Copy
from holdfast.store.errors import (
    CorruptName,
    MissingBlob,
    MissingManifest,
    StoreError,
    Unavailable,
    storage_errors,
)
from holdfast.store.files import ReadFile
from holdfast.store.model import Blob, Manifest, NameKey, check_id, content_hash
from holdfast.store.object_sweep import ObjectSweeper
from holdfast.store.objects import Listed, Objects, Version, Writer
from holdfast.store.records import NameRecord
from holdfast.store.transfer import Watched, check_size, hashed, watched

HEARTBEAT = 300.0
"""Seconds after which a pin is rewritten. A sweep takes one that was not for an hour for left."""


class ObjectStore(Store):
    """A store in an object storage, created when nothing is there unless told not to `create` it.

    `writer`, `wall` (seconds since 1970) and `monotonic` (seconds) are replaced by tests.
    """

    shared = True

    def __init__(
        self,
        objects: Objects,
        *,
        create: bool = True,
        writer: Writer | None = None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(wall)
        self._objects = objects
        self._bucket = Bucket(objects, writer or Writer(objects), create=create)
        self._sweeper = ObjectSweeper(self._bucket, wall, monotonic)
        self._pins: dict[str, Version] = {}
        self._changing_pins = threading.Lock()
        self._used: dict[str, str] = {}
        """Hash of a blob -> the copy that the manifest read last uses, which sweeps keep."""
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

    def close(self) -> None:
        self._closed.set()
        if self._heart is not None:
            self._heart.join()
        self._objects.close()

    # Blobs

    def put_blob(self, parts: Iterable[bytes | memoryview]) -> Blob:
        with storage_errors("keeping a blob until it is sent"), hashed(parts) as (blob, pieces):
            key = f"blobs/{blob.hash}/{uuid4().hex}"
            self._objects.upload(key, watched(pieces, self._moved), blob.size)
        return blob

    def _copies(self, blob: Blob, what: str) -> list[Copy]:
        listed = self._listed(blob)
        if not listed:
            path = self._bucket.path("blobs", blob.hash)
            raise MissingBlob(f"{what} is missing: there is no {path}")
        used = self._used.get(blob.hash)
        listed.sort(key=lambda found: found.key != used)
        return [partial(self._open_copy, found, blob, what) for found in listed]

    @contextmanager
    def _open_copy(self, found: Listed, blob: Blob, what: str) -> Iterator[tuple[ReadFile, str]]:
        path = self._bucket.path(found.key)
        check_size(found.size, blob, what, path)
        removed = f"{what} is missing: {path} was removed meanwhile"
        with storage_errors(f"reading {what} from {path}"), self._objects.open(found.key) as file:
            if file is None:
                raise MissingBlob(removed)
            try:
                yield Watched(file, self._moved), path
            except FileNotFoundError:
                raise MissingBlob(removed) from None

    def has_blob(self, blob: Blob) -> bool:
        return any(found.size == blob.size for found in self._listed(blob))

    def _listed(self, blob: Blob) -> list[Listed]:
        """All copies of a blob, those of the right size and the newest ones first."""
        found = self._objects.list(f"blobs/{check_id(blob.hash, 'blob hash')}")
        return sorted(found, key=lambda f: (f.size == blob.size, f.modified, f.key), reverse=True)

    # Manifests

    def publish(self, manifest: Manifest) -> str:
        manifest_id = content_hash(manifest.to_bytes())
        unnamed = manifest.name is None
        if unnamed and any(not isinstance(e.value, StoreError) for e in self._kept(manifest_id)):
            return manifest_id
        dead: set[str] = set()
        while True:
            self._about_to_change()
            cell = ManifestCell("staged", self._choose(manifest, dead), manifest)
            key = new_manifest_key(manifest_id, unnamed=unnamed)
            try:
                # From now on sweeps see what it uses, so what is there now stays.
                staged = self._bucket.create(key, cell)
                dead |= {copy for copy in sorted(cell.uses) if not self._bucket.keep_copy(copy)}
                if staged is not None and dead.isdisjoint(cell.uses):
                    entry = Entry(key, staged, cell)
                    if self._bucket.swap(entry, cell.into("kept" if unnamed else "loose")):
                        return manifest_id
            except StoreError:
                with suppress(Unavailable):  # else a sweep removes it
                    self._objects.delete([key])
                raise
            self._objects.delete([key])

    def _choose(self, manifest: Manifest, dead: set[str]) -> dict[str, str]:
        """The newest copy of each of a manifest's blobs."""
        chosen = {}
        for name, blob in manifest.files.items():
            copies = (copy for copy in self._listed(blob) if copy.key not in dead)
            found = next(copies, None)
            if found is None:
                check_there(None, blob, name, self._bucket.path("blobs", blob.hash))
            else:
                check_there(found.size, blob, name, self._bucket.path(found.key))
                chosen[blob.hash] = copy_of(found.key)
        return chosen

    def read_manifest(self, manifest_id: str) -> Manifest:
        damage = None
        for entry in self._bucket.manifests_of(check_id(manifest_id)):
            if isinstance(entry.value, StoreError):
                damage = entry.value
            elif entry.value.state not in ("staged", "dead"):
                return self._read(entry.value)
        raise damage or MissingManifest(
            f"there is no manifest {manifest_id} in {self._objects.url}"
        )

    def _read(self, cell: ManifestCell) -> Manifest:
        self._used |= {hash: f"blobs/{hash}/{copy}" for hash, copy in cell.copies.items()}
        return cell.manifest

    def unnamed(
        self, run: str | None = None, *, on_damage: OnDamage | None = None
    ) -> Iterator[tuple[str, Manifest]]:
        listed = self._objects.list("manifests")
        seen = set()
        for entry in self._bucket.manifests(found for found in listed if is_unnamed(found.key)):
            manifest_id = content_of(entry.key)
            with damage_to(on_damage):
                cell = entry.whole()
                if cell.state == "kept" and manifest_id not in seen:
                    seen.add(manifest_id)
                    if run in (None, cell.manifest.run):
                        yield manifest_id, cell.manifest

    def discard(self, manifest_id: str) -> bool:
        there = False
        self._about_to_change()
        while kept := list(self._kept(check_id(manifest_id))):
            there = True
            for entry in kept:
                if isinstance(entry.value, StoreError):
                    self._objects.delete([entry.key])
                else:
                    self._bucket.swap(entry, entry.value.into("loose"))
        return there

    def _kept(self, manifest_id: str) -> Iterator[Entry[ManifestCell]]:
        """Copies that stay until the manifest is discarded; a damaged one may be such a one."""
        for entry in self._bucket.manifests_of(manifest_id):
            damaged = isinstance(entry.value, StoreError)
            if is_unnamed(entry.key) and (damaged or entry.whole().state == "kept"):
                yield entry

    # Pins

    @contextmanager
    def pin(self, manifest_id: str) -> Iterator[Manifest]:
        key = f"pins/{check_id(manifest_id)}/{uuid4().hex}"
        version = self._bucket.writer.create(key, encode({}))
        assert version is not None
        try:
            entry = self._bucket.keep_manifest(manifest_id)
            if entry is None:
                raise MissingManifest(f"there is no manifest {manifest_id} in {self._objects.url}")
            self._hold(key, version)
            yield self._read(entry.whole())
        finally:
            with self._changing_pins:
                self._pins.pop(key, None)
                with suppress(Unavailable):  # else a sweep removes it
                    self._objects.delete([key])

    def _hold(self, key: str, version: Version) -> None:
        with self._changing_pins:
            self._pins[key] = version
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat_on, name="pins", daemon=True)
                self._heart.start()

    def _beat_on(self) -> None:
        while not self._closed.wait(HEARTBEAT):
            with suppress(Unavailable):  # there is time for another beat
                self.beat()

    def beat(self) -> None:
        """Show that the pins of this process are held."""
        for key in list(self._pins):
            with self._changing_pins:
                if (version := self._pins.get(key)) is not None:
                    newer = self._bucket.writer.swap(key, encode({}), version)
                    if newer is not None:
                        self._pins[key] = newer

    # Names

    def _point(
        self, key: NameKey, manifest_id: str, accepts: Callable[[str | None], bool]
    ) -> str | None:
        manifest = self._for_name(key, manifest_id)
        for tried in itertools.count(1):
            entry = self._bucket.name(key)
            cell = NameCell()
            if entry is not None and not (isinstance(entry.value, CorruptName) and accepts("")):
                cell = entry.whole()
                current = self._current(cell.record)
                if not accepts(current) or current == manifest_id:
                    return current
            elif entry is None and not accepts(None):
                return None
            self._about_to_change()
            # First said, then looked for: what is there afterwards no sweep removes.
            pending = self._write_name(key, entry, NameCell(cell.record, cell.copy, manifest_id))
            if pending is not None:
                found = self._bucket.keep_manifest(manifest_id)
                if found is None:
                    self._bucket.swap(pending, cell)
                    raise MissingManifest(f"manifest {manifest_id} was removed meanwhile")
                record = NameRecord(key, manifest_id, manifest.expires)
                if self._bucket.swap(pending, NameCell(record, copy_of(found.key))):
                    return manifest_id
            self._bucket.writer.pause(min(tried, 6))
        raise AssertionError

    def _write_name(
        self, key: NameKey, entry: Entry[NameCell] | None, cell: NameCell
    ) -> Entry[NameCell] | None:
        """The name's new version; None when another one has come between."""
        if entry is None:
            version = self._bucket.create(name_key(key), cell)
        else:
            version = self._bucket.swap(entry, cell)
        return None if version is None else Entry(name_key(key), version, cell)

    def resolve(self, key: NameKey) -> str | None:
        entry = self._bucket.name(key)
        return None if entry is None else self._current(entry.whole().record)

    def delete_name(self, key: NameKey) -> bool:
        entry = self._bucket.name(key)
        if entry is None:
            return False
        there = True
        if not isinstance(entry.value, CorruptName):
            record = entry.whole().record
            if record is None:
                return False
            there = self._current(record) is not None
        self._about_to_change()
        # Without a condition: one that is set meanwhile is deleted as well, as by a later call.
        self._objects.delete([entry.key])
        return there

    def names(
        self, run: str | None = None, *, on_damage: OnDamage | None = None
    ) -> Iterator[tuple[NameKey, str]]:
        for entry in self._bucket.names(run):
            with damage_to(on_damage):
                record = entry.whole().record
                if record is not None and (current := self._current(record)) is not None:
                    yield record.key, current

    # Looking after it

    def sweep(self) -> SweepReport:
        self._about_to_change()
        return self._sweeper.sweep()

    def verify(
        self, manifest_id: str | None = None, *, progress: Progress | None = None
    ) -> VerifyReport:
        audit = Audit(
            lambda path: self._objects.open(path.removeprefix(self._bucket.path(""))), progress
        )
        if manifest_id is not None:
            audit.total = size_of(self.read_manifest(manifest_id))
            self._verify_manifests(audit, self._bucket.manifests_of(manifest_id))
            return audit.report()
        if progress is not None:
            audit.total = sum(found.size for found in self._objects.list("blobs"))
        for name in self._bucket.names():
            with audit.noting():
                self._verify_name(audit, name)
        self._verify_manifests(audit, self._bucket.manifests(self._objects.list("manifests")))
        for found in self._objects.list("blobs"):
            path = self._bucket.path(found.key)
            if not audit.has_read(path):
                blob = Blob(check_id(content_of(found.key), path), found.size)
                with audit.noting():
                    audit.check_blob(path, blob, "a blob", lambda: False)
        return audit.report()

    def _verify_name(self, audit: Audit, entry: Entry[NameCell]) -> None:
        record = entry.whole().record
        if record is None:
            return

        def read(manifest_id: str) -> Manifest | None:
            try:
                return self.read_manifest(manifest_id)
            except MissingManifest:
                return None

        def still() -> bool:
            found = self._bucket.name(record.key)
            return found is not None and found.whole().record == record

        audit.check_name(self._bucket.path(entry.key), record, read, still)

    def _verify_manifests(self, audit: Audit, entries: Iterable[Entry[ManifestCell]]) -> None:
        counted = set()
        for entry in entries:
            with audit.noting():
                cell = entry.whole()
                if cell.state in ("staged", "dead"):
                    continue
                if (manifest_id := content_of(entry.key)) not in counted:
                    counted.add(manifest_id)
                    audit.manifests += 1
                self._verify_blobs(audit, entry.key, cell)

    def _verify_blobs(self, audit: Audit, key: str, cell: ManifestCell) -> None:
        def still() -> bool:
            return self._bucket.is_alive(key)

        for name, blob in cell.manifest.files.items():
            path = self._bucket.path("blobs", blob.hash, cell.copies[blob.hash])
            with audit.noting():
                audit.check_blob(path, blob, f"{name} of {cell.manifest.label}", still)
