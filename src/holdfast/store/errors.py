"""The store's errors, grouped by what a caller does about them.

StoreError
├── Refused              the request cannot work as it is: change it
│   ├── InvalidValue         a name, an id or a manifest's field is not of the right form
│   ├── NameTaken            the name is there and `replace` was not asked for
│   ├── InvalidFile          a file brought in from outside is not of its format
│   ├── NotAStore            the directory is something else
│   └── UnsupportedFormat    written by a newer Holdfast
├── Missing              what was asked for is not there: it was deleted, or never was
│   ├── MissingName
│   ├── MissingManifest
│   └── MissingBlob
├── Corrupt              bytes on disk are not those that were written: use another checkpoint
│   ├── CorruptName
│   ├── CorruptManifest
│   └── CorruptBlob
└── Unavailable          the storage failed, nothing is wrong with the request: try again later
    ├── DiskFull             with new files, once there is room
    ├── ReadOnly             once the file system is writable
    ├── NoAccess             once the object storage accepts the credentials
    └── IOFailed             with new files; the device needs looking at
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class StoreError(Exception):
    """Anything the store refuses or fails to do. `code` is stable, the message is for people."""

    code = "store_error"


class Refused(StoreError, ValueError):
    """The request cannot work as it is."""

    code = "refused"


class InvalidValue(Refused):
    """A name, an id or a manifest's field that is not of the right form."""

    code = "invalid_value"


class NameTaken(Refused):
    """The name exists and points to `existing`, another manifest's id."""

    code = "name_taken"

    def __init__(self, message: str, existing: str) -> None:
        super().__init__(message)
        self.existing = existing


class InvalidFile(Refused):
    """A file from outside, an archive or tensors, that is not what its format asks for."""

    code = "invalid_file"


class NotAStore(Refused):
    """A location that holds something else than a store."""

    code = "not_a_store"


class UnsupportedFormat(Refused):
    """Data in a format that a newer Holdfast wrote."""

    code = "unsupported_format"


class Missing(StoreError):
    """What was asked for is not in the store."""

    code = "missing"


class MissingName(Missing):
    code = "missing_name"


class MissingManifest(Missing):
    code = "missing_manifest"


class MissingBlob(Missing):
    code = "missing_blob"


class Corrupt(StoreError):
    """Stored bytes that are not those that were written. `path` is the file."""

    code = "corrupt"

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class CorruptName(Corrupt):
    code = "corrupt_name"


class CorruptManifest(Corrupt):
    code = "corrupt_manifest"


class CorruptBlob(Corrupt):
    code = "corrupt_blob"


class Unavailable(StoreError):
    """The storage failed; the same request may succeed later."""

    code = "storage_unavailable"


class DiskFull(Unavailable):
    code = "disk_full"


class ReadOnly(Unavailable):
    code = "read_only"


class NoAccess(Unavailable):
    code = "no_access"


class IOFailed(Unavailable):
    code = "io_failed"


def is_unavailable(code: str) -> bool:
    """Whether that is the `code` of an `Unavailable`, of which another process tells."""
    kinds: list[type[Unavailable]] = [Unavailable, *Unavailable.__subclasses__()]
    return code in {kind.code for kind in kinds}


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an OSError into the error of this tree; `doing` says what was attempted, on what."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _DISK_FULL:
            raise DiskFull(f"{doing}: no room left on the disk ({reason})") from error
        if error.errno in _READ_ONLY:
            raise ReadOnly(f"{doing}: the store cannot be written ({reason})") from error
        raise IOFailed(f"{doing}: {reason}") from error
