"""The durable checkpoint store: blobs, manifests, names, verification, garbage collection."""

from __future__ import annotations

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
    NotAStore,
    ReadOnly,
    Refused,
    StoreError,
    Unavailable,
    UnsupportedFormat,
)
from holdfast.store.local import LocalStore
from holdfast.store.model import Blob, Incomplete, LoraConfig, Manifest, NameKey

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
    "NotAStore",
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
    "import_archive",
    "open_store",
    "put_file",
]


def open_store(location: str | Path) -> Store:
    """Open the store at a path, creating it when nothing is there."""
    return LocalStore(location)
