"""The durable checkpoint store: blobs, manifests, names, verification, garbage collection."""

from __future__ import annotations

from pathlib import Path

from holdfast.store.base import Store, SweepReport, VerifyReport
from holdfast.store.errors import (
    Corrupt,
    CorruptBlob,
    CorruptManifest,
    CorruptName,
    DiskFull,
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
from holdfast.store.model import Blob, Incomplete, Lora, Manifest, NameKey

__all__ = [
    "Blob",
    "Corrupt",
    "CorruptBlob",
    "CorruptManifest",
    "CorruptName",
    "DiskFull",
    "IOFailed",
    "Incomplete",
    "InvalidValue",
    "LocalStore",
    "Lora",
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
    "Store",
    "StoreError",
    "SweepReport",
    "Unavailable",
    "UnsupportedFormat",
    "VerifyReport",
    "open_store",
]


def open_store(location: str | Path) -> Store:
    """Open the store at a path, creating it when nothing is there."""
    return LocalStore(location)
