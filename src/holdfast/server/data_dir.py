"""A data directory: its catalog and its store, and the lock of whoever has it to itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from holdfast.catalog import Catalog, CatalogUnavailable, NewerCatalog
from holdfast.runs.segments import Segments
from holdfast.store import Store, StoreError, check_url, open_store

CATALOG = "catalog.db"
STORE = "store"
STORE_URL = "store-url"
"""Holds the address of the store when it is not in the directory."""
SEGMENTS = "segments"


class CannotUse(Exception):
    """A data directory cannot be used; the message says what to change."""


@dataclass(frozen=True, slots=True)
class DataDir:
    """What is in a data directory, opened."""

    path: Path
    catalog: Catalog
    store: Store

    @property
    def segments(self) -> Segments:
        """Of the catalog's journal."""
        return Segments(self.path / SEGMENTS)


@contextmanager
def existing(path: Path, url: str | None) -> Iterator[DataDir]:
    """Open the data directory of a server, which may be running, to change it. Raises CannotUse.

    With the address of a store it may be a new one: its catalog is rebuilt from the store.
    """
    with _open(path, location(path, url)) as store:
        if url is not None:
            with _using(path):
                path.mkdir(parents=True, exist_ok=True)
        with _catalog(path / CATALOG) as catalog:
            remember(path, url)
            yield DataDir(path, catalog, store)


@contextmanager
def looked_at(path: Path, url: str | None) -> Iterator[DataDir]:
    """`existing`, to read only: what is not there is not made. A missing catalog is an empty one.

    Raises CannotUse.
    """
    with _open(path, location(path, url)) as store, TemporaryDirectory() as empty:
        file = path / CATALOG
        with _catalog(file if file.exists() else Path(empty) / CATALOG) as catalog:
            yield DataDir(path, catalog, store)


@contextmanager
def _catalog(file: Path) -> Iterator[Catalog]:
    try:
        catalog = Catalog.open_file(file)
    except (CatalogUnavailable, NewerCatalog) as error:
        raise CannotUse(str(error)) from error
    try:
        yield catalog
    finally:
        catalog.close()


def existing_store(path: Path, url: str | None) -> Store:
    """Open the store at an address, or that of a server's data directory. Raises CannotUse."""
    return _open(path, location(path, None) if url is None else url)


def _open(path: Path, where: str | Path) -> Store:
    if isinstance(where, Path) and not where.is_dir():
        what = f"there is no store in {path}" if path.is_dir() else f"there is no directory {path}"
        raise CannotUse(
            f"{what}; name the one that `holdfast serve` uses with --data-dir, or its --store"
        )
    try:
        return open_store(where, create=False)
    except StoreError as error:
        raise CannotUse(str(error)) from error


def location(path: Path, url: str | None) -> str | Path:
    """Where the checkpoints of a data directory are. Raises CannotUse.

    Its catalog tells of what is in one store, so that it stays with the first one it was used with.
    """
    with _using(path):
        recorded = (path / STORE_URL).read_text().strip() if (path / STORE_URL).exists() else None
    if url is None:
        return recorded or path / STORE
    try:
        url = check_url(url)
    except StoreError as error:
        raise CannotUse(str(error)) from error
    used = recorded or (path / STORE if (path / STORE).is_dir() else None)
    if used is not None and str(used) != url:
        raise CannotUse(
            f"the checkpoints of {path} are in {used}, not in {url}: "
            "leave --store out, or name another --data-dir"
        )
    return url


def remember(path: Path, url: str | None) -> None:
    """Note durably which store, given by its address, a data directory is used with."""
    if url is None or (path / STORE_URL).exists():
        return
    with _using(path):
        temporary = path / f"{STORE_URL}.new"
        with temporary.open("w") as file:
            file.write(f"{check_url(url)}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path / STORE_URL)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _using(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotUse(f"cannot use the data directory {path}: {error.strerror}") from error


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the data directory's lock, making the directory if need be. Raises CannotUse."""
    with _using(path):
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
