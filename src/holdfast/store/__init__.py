"""The durable checkpoint store: blobs, manifests, names, verification, garbage collection."""

from __future__ import annotations

import re
from pathlib import Path

from holdfast.store.archive import Archive, Imported, import_archive, put_file
from holdfast.store.base import Size, Store, SweepReport, Usage, VerifyReport
from holdfast.store.errors import (
    Corrupt,
    CorruptBlob,
    CorruptManifest,
    CorruptName,
    DiskFull,
    InvalidFile,
    InvalidValue,
    IOFailed,
    Missing,
    MissingBlob,
    MissingManifest,
    MissingName,
    NameTaken,
    NoAccess,
    NotAStore,
    ReadOnly,
    Refused,
    StoreError,
    Unavailable,
    UnsupportedFormat,
    is_unavailable,
)
from holdfast.store.local import LocalStore
from holdfast.store.model import Blob, Incomplete, LoraConfig, Manifest, NameKey
from holdfast.store.object_store import ObjectStore

__all__ = [
    "Archive",
    "Blob",
    "Corrupt",
    "CorruptBlob",
    "CorruptManifest",
    "CorruptName",
    "DiskFull",
    "IOFailed",
    "Imported",
    "Incomplete",
    "InvalidFile",
    "InvalidValue",
    "LocalStore",
    "LoraConfig",
    "Manifest",
    "Missing",
    "MissingBlob",
    "MissingManifest",
    "MissingName",
    "NameKey",
    "NameTaken",
    "NoAccess",
    "NotAStore",
    "ObjectStore",
    "ReadOnly",
    "Refused",
    "Size",
    "Store",
    "StoreError",
    "SweepReport",
    "Unavailable",
    "UnsupportedFormat",
    "Usage",
    "VerifyReport",
    "check_url",
    "import_archive",
    "is_unavailable",
    "open_store",
    "put_file",
]


_URL = re.compile(r"(?P<scheme>\w+)://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*/?")
_SCHEMES = ("s3", "gs", "az")


def open_store(location: str | Path, *, create: bool = True) -> Store:
    """Open the store at a path or an address.

    An address is s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX. Raises an error
    of the store that says what to change; NotAStore when nothing is there and not to `create`.
    """
    if isinstance(location, Path) or "://" not in location:
        if not create and not Path(location).is_dir():
            raise NotAStore(f"there is no store {location}")
        return LocalStore(location)
    url = check_url(location)
    try:
        from holdfast.store.remote import connect
    except ModuleNotFoundError as error:
        raise InvalidValue(
            f"{url} needs a package more: pip install 'holdfast[object-store]' "
            f"(there is no module {error.name})"
        ) from error
    objects = connect(url)
    try:
        return ObjectStore(objects, create=create)
    except BaseException:
        objects.close()
        raise


def check_url(text: str) -> str:
    """The address of a store in an object storage, in its one form; InvalidValue for others."""
    match = _URL.fullmatch(text)
    if match is None or match["scheme"] not in _SCHEMES:
        raise InvalidValue(
            f"{text!r} is not the address of a store: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or "
            "az://CONTAINER/PREFIX"
        )
    return text.rstrip("/")
