"""The store on a local disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from holdfast.store.audit import verify_all, verify_manifest
from holdfast.store.base import (
    OnDamage,
    Progress,
    Store,
    SweepReport,
    VerifyReport,
    check_there,
    damage_to,
)
from holdfast.store.copies import Copy
from holdfast.store.disk import Disk
from holdfast.store.errors import (
    CorruptName,
    MissingBlob,
    MissingManifest,
    ReadOnly,
    storage_errors,
)
from holdfast.store.files import Files, LocalFiles, ReadFile, WriteFile
from holdfast.store.model import Blob, Manifest, NameKey, check_id, content_hash
from holdfast.store.records import NameRecord, file_name, run_prefix
from holdfast.store.sweep import Sweeper
from holdfast.store.transfer import Watched, check_size, watched, write_hashed


class LocalStore(Store):
    """A store in a directory, created when it is not there.

    `files`, `wall` (seconds since 1970) and `monotonic` (seconds) are replaced by tests.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        files: Files | None = None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(wall)
        self._disk = Disk(str(Path(root).resolve()), files or LocalFiles())
        self._files = self._disk.files
        self._sweeper = Sweeper(self._disk, wall, monotonic)

    def close(self) -> None:
        """Nothing is held between calls."""

    # Blobs

    def put_blob(self, parts: Iterable[bytes | memoryview]) -> Blob:
        with self._disk.temporary("writing a blob") as (file, temporary):
            blob = write_hashed(file, watched(parts, self._moved))
            file.sync()
            with self._disk.changing():
                mark = self._disk.mark_fresh(blob.hash)
                try:
                    self._files.rename(temporary, self._blob_path(blob))
                except OSError:
                    self._disk.unlink(mark)
                    raise
            self._disk.sync_dir("blobs")
        return blob

    def _copies(self, blob: Blob, what: str) -> list[Copy]:
        return [lambda: self._open_blob(blob, what)]

    @contextmanager
    def _open_blob(self, blob: Blob, what: str) -> Iterator[tuple[ReadFile, str]]:
        """A blob's file, of the right size, and its path."""
        path = self._blob_path(blob)
        with storage_errors(f"reading {what} from {path}"), self._disk.open(path) as file:
            if file is None:
                raise MissingBlob(f"{what} is missing: there is no {path}")
            check_size(file.size, blob, what, path)
            yield Watched(file, self._moved), path

    def has_blob(self, blob: Blob) -> bool:
        path = self._blob_path(blob)
        with self._disk.doing(f"looking for blob {blob.hash}"):
            status = self._files.stat(path)
        return status is not None and status.is_file and status.size == blob.size

    # Manifests

    def publish(self, manifest: Manifest) -> str:
        data = manifest.to_bytes()
        manifest_id = content_hash(data)
        directory = "unnamed" if manifest.name is None else "manifests"
        with self._disk.temporary(f"publishing manifest {manifest_id}") as (file, temporary):
            file.write(data)
            file.sync()
            with self._disk.changing():
                self._check_blobs(manifest)
                self._about_to_change()
                if manifest.name is not None:
                    self._disk.mark_fresh(manifest_id)
                self._files.rename(temporary, self._disk.path(directory, manifest_id))
            self._disk.sync_dir(directory)
            self._disk.clear_fresh(blob.hash for blob in manifest.files.values())
        return manifest_id

    def read_manifest(self, manifest_id: str) -> Manifest:
        check_id(manifest_id)
        for directory in ("unnamed", "manifests"):  # the way discarding moves them
            manifest = self._disk.read_manifest(directory, manifest_id)
            if manifest is not None:
                return manifest
        raise MissingManifest(f"there is no manifest {manifest_id} in {self._disk.root}")

    def unnamed(
        self, run: str | None = None, *, on_damage: OnDamage | None = None
    ) -> Iterator[tuple[str, Manifest]]:
        for entry in self._disk.list("unnamed"):
            manifest = None
            with damage_to(on_damage):
                manifest = self._disk.read_manifest("unnamed", entry)
            if manifest is not None and run in (None, manifest.run):
                yield entry, manifest

    def discard(self, manifest_id: str) -> bool:
        check_id(manifest_id)
        with self._disk.doing(f"discarding manifest {manifest_id}"):
            self._about_to_change()
            # Not unlinked: it may be pinned, and the blobs of a pinned manifest must stay.
            return self._disk.remove_durably("unnamed", manifest_id, to="manifests")

    @contextmanager
    def pin(self, manifest_id: str) -> Iterator[Manifest]:
        check_id(manifest_id)
        path = self._disk.path("pins", f"{manifest_id}.{uuid4().hex}")
        with self._disk.doing(f"pinning manifest {manifest_id}"), self._disk.changing():
            manifest = self.read_manifest(manifest_id)
            lock = self._create_pin(path)
        try:
            yield manifest
        finally:
            if lock is not None:
                with suppress(OSError):  # a sweep removes a pin that nobody holds
                    lock.close()
                    self._disk.unlink(path)

    def _create_pin(self, path: str) -> WriteFile | None:
        """None where nothing can be written: whoever only reads there needs no pin to begin.

        Nothing is swept from a disk that is read-only for all. Where another process can write, a
        read that it breaks off raises MissingBlob.
        """
        try:
            with storage_errors(f"pinning in {path}"):
                return self._files.create(path)
        except ReadOnly:
            return None

    # Names

    def _point(
        self, key: NameKey, manifest_id: str, accepts: Callable[[str | None], bool]
    ) -> str | None:
        manifest = self._for_name(key, manifest_id)
        entry = file_name(key)
        with self._disk.temporary(f"setting the name {key}") as (file, temporary):
            file.write(NameRecord(key, manifest_id, manifest.expires).encode())
            file.sync()
            with self._disk.changing(), self._disk.naming():
                try:
                    current = self._current(self._disk.read_record(entry))
                except CorruptName:
                    if not accepts(""):
                        raise
                else:
                    if not accepts(current):
                        return current
                if self._files.stat(self._disk.path("manifests", manifest_id)) is None:
                    raise MissingManifest(f"manifest {manifest_id} was removed meanwhile")
                self._about_to_change()
                # Also when it points there already: whoever did that may not have synced it.
                self._files.rename(temporary, self._disk.path("names", entry))
            self._disk.sync_dir("names")
            self._disk.clear_fresh([manifest_id])
        return manifest_id

    def resolve(self, key: NameKey) -> str | None:
        return self._current(self._disk.read_record(file_name(key)))

    def delete_name(self, key: NameKey) -> bool:
        entry = file_name(key)
        with (
            self._disk.doing(f"deleting the name {key}"),
            self._disk.changing(),
            self._disk.naming(),
        ):
            self._about_to_change()
            try:
                there = self._current(self._disk.read_record(entry)) is not None
            except CorruptName:
                there = True
            return self._disk.remove_durably("names", entry) and there

    def names(
        self, run: str | None = None, *, on_damage: OnDamage | None = None
    ) -> Iterator[tuple[NameKey, str]]:
        prefix = "" if run is None else run_prefix(run)
        for entry in self._disk.list("names"):
            if entry.startswith(prefix):
                record = None
                with damage_to(on_damage):
                    record = self._disk.read_record(entry)
                if record is not None and (current := self._current(record)) is not None:
                    yield record.key, current

    # Looking after it

    def sweep(self) -> SweepReport:
        with self._disk.doing("sweeping"):
            self._about_to_change()
            return self._sweeper.sweep()

    def verify(
        self, manifest_id: str | None = None, *, progress: Progress | None = None
    ) -> VerifyReport:
        if manifest_id is None:
            return verify_all(self._disk, progress)
        return verify_manifest(self._disk, self.read_manifest(manifest_id), progress)

    def _blob_path(self, blob: Blob) -> str:
        return self._disk.path("blobs", check_id(blob.hash, "blob hash"))

    def _check_blobs(self, manifest: Manifest) -> None:
        for name, blob in manifest.files.items():
            path = self._blob_path(blob)
            status = self._files.stat(path)
            size = status.size if status is not None and status.is_file else None
            check_there(size, blob, name, path)
