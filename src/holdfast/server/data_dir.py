"""A data directory: its catalog and its store, and the lock of whoever has it to itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from holdfast.catalog import Catalog, CatalogUnavailable, NewerCatalog
from holdfast.store import Store, StoreError, open_store

CATALOG = "catalog.db"
STORE = "store"


class CannotUse(Exception):
    """A data directory cannot be used; the message says what to change."""


@dataclass(frozen=True, slots=True)
class DataDir:
    """What is in a data directory, opened."""

    path: Path
    catalog: Catalog
    store: Store


@contextmanager
def existing(path: Path) -> Iterator[DataDir]:
    """Open the data directory of a server, which may be running. Raises CannotUse."""
    store = existing_store(path)
    try:
        catalog = Catalog.open_file(path / CATALOG)
    except (CatalogUnavailable, NewerCatalog) as error:
        store.close()
        raise CannotUse(str(error)) from error
    try:
        yield DataDir(path, catalog, store)
    finally:
        catalog.close()
        store.close()


def existing_store(path: Path) -> Store:
    """Open the store of a server's data directory. Raises CannotUse when there is none."""
    if not (path / STORE).is_dir():
        what = f"there is no store in {path}" if path.is_dir() else f"there is no directory {path}"
        raise CannotUse(f"{what}; name the one that `holdfast serve` uses with --data-dir")
    try:
        return open_store(path / STORE)
    except StoreError as error:
        raise CannotUse(str(error)) from error


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the data directory's lock, making the directory if need be. Raises CannotUse."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotUse(f"cannot use the data directory {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CannotUse(
                f"another server uses the data directory {path}"
                f" (process {_read(handle)}); stop it, or name another --data-dir"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


def _read(handle: int) -> str:
    return os.pread(handle, 32, 0).decode(errors="replace") or "unknown"
