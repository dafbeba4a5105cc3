"""Reading everything to find what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.store.base import VerifyReport
from holdfast.store.disk import Disk
from holdfast.store.errors import (
    CorruptName,
    MissingBlob,
    MissingManifest,
    StoreError,
    storage_errors,
)
from holdfast.store.model import Blob, Manifest, check_id
from holdfast.store.transfer import check_size, verify_file


def verify_manifest(disk: Disk, manifest: Manifest) -> VerifyReport:
    """Read the blobs of one manifest."""
    audit = _Audit(disk)
    audit.manifests = 1
    manifest_id = manifest.id
    audit.check_blobs(manifest, still=lambda: audit.is_there(manifest_id))
    return audit.report()


def verify_all(disk: Disk) -> VerifyReport:
    """Read every name record, manifest and blob. What is removed meanwhile is not a problem."""
    audit = _Audit(disk)
    for entry in disk.list("names"):
        with audit.noting():
            audit.check_name(entry)
    for directory in ("manifests", "unnamed"):
        for entry in disk.list(directory):
            with audit.noting():
                audit.check_manifest(directory, entry)
    for entry in disk.list("blobs"):
        with audit.noting():
            audit.check_unreferenced(entry)
    return audit.report()


class _Audit:
    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._seen: dict[str, int] = {}
        self._problems: list[StoreError] = []
        self.manifests = 0

    def report(self) -> VerifyReport:
        return VerifyReport(
            self.manifests, len(self._seen), sum(self._seen.values()), tuple(self._problems)
        )

    @contextmanager
    def noting(self) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            self._problems.append(error)

    def check_name(self, entry: str) -> None:
        path = self._disk.path("names", entry)
        record = self._disk.read_record(entry)
        if record is None:
            return
        manifest = self._disk.read_manifest("manifests", record.manifest)
        if manifest is None:
            if self._disk.read_record(entry) == record:
                raise MissingManifest(f"{path} points to {record.manifest}, which is missing")
        elif manifest.key != record.key or manifest.expires != record.expires:
            raise CorruptName(f"{path} does not agree with the manifest it points to", path)

    def check_manifest(self, directory: str, entry: str) -> None:
        manifest = self._disk.read_manifest(directory, entry)
        if manifest is not None:
            self.manifests += 1
            self.check_blobs(manifest, still=lambda: self.is_there(entry))

    def check_blobs(self, manifest: Manifest, still: Callable[[], bool]) -> None:
        """A blob that is gone is a problem only while the manifest is `still` there."""
        for name, blob in manifest.files.items():
            if self._seen.get(blob.hash) != blob.size:
                with self.noting():
                    self._check_blob(blob, f"{name} of {manifest.label}", still)

    def check_unreferenced(self, entry: str) -> None:
        """A blob that no manifest has led to."""
        path = self._disk.path("blobs", entry)
        if entry not in self._seen and (status := self._disk.files.stat(path)) is not None:
            self._check_blob(Blob(check_id(entry, path), status.size), "a blob", lambda: False)

    def _check_blob(self, blob: Blob, what: str, still: Callable[[], bool]) -> None:
        path = self._disk.path("blobs", blob.hash)
        self._seen[blob.hash] = blob.size
        with storage_errors(f"reading {path}"), self._disk.open(path) as file:
            if file is not None:
                check_size(file, blob, what, path)
                verify_file(file, blob, what, path)
            elif still():
                raise MissingBlob(f"{what} is missing: there is no {path}")

    def is_there(self, manifest_id: str) -> bool:
        paths = (self._disk.path(directory, manifest_id) for directory in ("unnamed", "manifests"))
        return any(self._disk.files.stat(path) is not None for path in paths)
