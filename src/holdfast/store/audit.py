"""Reading everything to find what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from holdfast.store.base import Progress, VerifyReport
from holdfast.store.disk import Disk
from holdfast.store.errors import (
    CorruptManifest,
    CorruptName,
    MissingBlob,
    MissingManifest,
    StoreError,
    storage_errors,
)
from holdfast.store.files import ReadFile
from holdfast.store.model import Blob, Manifest, check_id
from holdfast.store.records import NameRecord
from holdfast.store.transfer import Watched, check_size, verify_file

Still = Callable[[], bool]
"""Whether what referred to something is still there: what is removed meanwhile is no problem."""


class Audit:
    """What was read, and what is wrong with it. `open` opens a blob's file, None: not there."""

    def __init__(
        self,
        open: Callable[[str], AbstractContextManager[ReadFile | None]],
        progress: Progress | None = None,
    ) -> None:
        self._open = open
        self._progress = progress
        self._done = 0
        self.total = 0
        """Bytes to be read, for the progress."""
        self._read: dict[str, Blob] = {}
        self._problems: list[StoreError] = []
        self._told: set[str] = set()
        self.manifests = 0

    def report(self) -> VerifyReport:
        sizes = {blob.hash: blob.size for blob in self._read.values()}
        return VerifyReport(self.manifests, len(sizes), sum(sizes.values()), tuple(self._problems))

    @contextmanager
    def noting(self) -> Iterator[None]:
        """An error in here is noted, once."""
        try:
            yield
        except StoreError as error:
            if str(error) not in self._told:
                self._problems.append(error)
            self._told.add(str(error))

    def check_name(
        self,
        path: str,
        record: NameRecord,
        read: Callable[[str], Manifest | None],
        still: Still,
    ) -> None:
        """Whether a name record agrees with the manifest it points to, as `read` by its id."""
        try:
            manifest = read(record.manifest)
        except CorruptManifest as error:
            self._told.add(str(error))  # it is met again among the manifests, without a name
            raise CorruptManifest(
                f"checkpoint {record.key}: {error}; put that file back from a copy, or delete "
                "the checkpoint",
                error.path,
            ) from error
        if manifest is None:
            if still():
                raise MissingManifest(
                    f"checkpoint {record.key}: {path} points to {record.manifest}, which is missing"
                )
        elif manifest.key != record.key or manifest.expires != record.expires:
            raise CorruptName(f"{path} does not agree with the manifest it points to", path)

    def check_blob(self, path: str, blob: Blob, what: str, still: Still) -> None:
        """Read a blob's file, once."""
        if self._read.get(path) == blob:
            return
        self._read[path] = blob
        with storage_errors(f"reading {path}"):
            there = self._read_file(path, blob, what)
        if not there and still():
            raise MissingBlob(f"{what} is missing: there is no {path}")

    def _read_file(self, path: str, blob: Blob, what: str) -> bool:
        """Whether it is there, until all of it has been read."""
        with suppress(FileNotFoundError), self._open(path) as file:
            if file is not None:
                check_size(file.size, blob, what, path)
                verify_file(Watched(file, self._advance), blob, what, path)
                return True
        return False

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            # What came meanwhile is read as well.
            self._progress(self._done, max(self._done, self.total))

    def has_read(self, path: str) -> bool:
        return path in self._read


def size_of(manifest: Manifest) -> int:
    """Bytes of its blobs, each counted once."""
    return sum(blob.size for blob in set(manifest.files.values()))


def verify_manifest(disk: Disk, manifest: Manifest, progress: Progress | None) -> VerifyReport:
    """Read the blobs of one manifest."""
    audit = Audit(disk.open, progress)
    audit.manifests = 1
    audit.total = size_of(manifest)
    _check_blobs(audit, disk, manifest, manifest.id)
    return audit.report()


def verify_all(disk: Disk, progress: Progress | None) -> VerifyReport:
    """Read every name record, manifest and blob. What is removed meanwhile is not a problem."""
    audit = Audit(disk.open, progress)
    if progress is not None:
        found = (disk.files.stat(disk.path("blobs", entry)) for entry in disk.list("blobs"))
        audit.total = sum(status.size for status in found if status is not None)
    for entry in disk.list("names"):
        with audit.noting():
            _check_name(audit, disk, entry)
    for directory in ("manifests", "unnamed"):
        for entry in disk.list(directory):
            with audit.noting():
                manifest = disk.read_manifest(directory, entry)
                if manifest is not None:
                    audit.manifests += 1
                    _check_blobs(audit, disk, manifest, entry)
    for entry in disk.list("blobs"):
        with audit.noting():
            _check_unreferenced(audit, disk, entry)
    return audit.report()


def _check_name(audit: Audit, disk: Disk, entry: str) -> None:
    record = disk.read_record(entry)
    if record is not None:
        audit.check_name(
            disk.path("names", entry),
            record,
            lambda manifest_id: disk.read_manifest("manifests", manifest_id),
            lambda: disk.read_record(entry) == record,
        )


def _check_blobs(audit: Audit, disk: Disk, manifest: Manifest, manifest_id: str) -> None:
    for name, blob in manifest.files.items():
        with audit.noting():
            audit.check_blob(
                disk.path("blobs", blob.hash),
                blob,
                f"{name} of {manifest.label}",
                lambda: _is_there(disk, manifest_id),
            )


def _check_unreferenced(audit: Audit, disk: Disk, entry: str) -> None:
    """A blob that no manifest has led to."""
    path = disk.path("blobs", entry)
    status = disk.files.stat(path)
    if status is not None and not audit.has_read(path):
        blob = Blob(check_id(entry, path), status.size)
        audit.check_blob(path, blob, "a blob", lambda: False)


def _is_there(disk: Disk, manifest_id: str) -> bool:
    paths = (disk.path(directory, manifest_id) for directory in ("unnamed", "manifests"))
    return any(disk.files.stat(path) is not None for path in paths)
