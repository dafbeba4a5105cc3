"""A data directory: its catalog and its store, and the lock of whoever has it to itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from holdfast.catalog import CannotOpen, Catalog, CatalogUnavailable, without_secrets
from holdfast.runs.segments import LARGE, Segments
from holdfast.store import Store, StoreError, check_url, open_store

CATALOG = "catalog.db"
CATALOG_URL = "catalog-url"
"""Holds the address of the catalog, without a password, when it is not in the directory."""
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
        return segments_of(self.path, self.catalog)


def segments_of(path: Path, catalog: Catalog) -> Segments:
    """Where a catalog's journal keeps what is large.

    One that is elsewhere keeps all of it itself: another machine may be the next to go on with it.
    """
    return Segments(path / SEGMENTS, above=LARGE if catalog.is_local else None)


@contextmanager
def existing(path: Path, url: str | None, catalog_url: str | None = None) -> Iterator[DataDir]:
    """Open the data directory of a server, which may be running, to change it. Raises CannotUse.

    With the address of a store or a catalog it may be a new one: what of the catalog is not there
    is rebuilt from the store.
    """
    with _open(path, location(path, url)) as store:
        if url is not None or catalog_url is not None:
            with _using(path):
                path.mkdir(parents=True, exist_ok=True)
        with closing(open_catalog(path, catalog_url)) as catalog:
            remember(path, url, catalog)
            yield DataDir(path, catalog, store)


@contextmanager
def looked_at(path: Path, url: str | None, catalog_url: str | None = None) -> Iterator[DataDir]:
    """`existing`, to read only: what is not there is not made. A missing catalog is an empty one.

    Raises CannotUse.
    """
    with _open(path, location(path, url)) as store, TemporaryDirectory() as empty:
        address = _catalog_location(path, catalog_url)
        is_missing = address is None and not (path / CATALOG).exists()
        directory = Path(empty) if is_missing else path
        with closing(_open_catalog(directory, address, create=False)) as catalog:
            yield DataDir(path, catalog, store)


def open_catalog(path: Path, url: str | None) -> Catalog:
    """Open the catalog at an address, or that of a data directory. Raises CannotUse."""
    return _open_catalog(path, _catalog_location(path, url), create=True)


def _open_catalog(path: Path, address: str | None, *, create: bool) -> Catalog:
    try:
        if address is None:
            return Catalog.open_file(path / CATALOG)
        return Catalog.open(address, create=create)
    except (CatalogUnavailable, CannotOpen) as error:
        hint = ""
        is_noted = address is not None and address == _noted(path, CATALOG_URL)
        if is_noted and "password" in str(error):
            hint = (
                f"; {path / CATALOG_URL} names it without a password, which belongs in --catalog, "
                "PGPASSWORD or a password file"
            )
        raise CannotUse(f"{error}{hint}") from error


def _catalog_location(path: Path, url: str | None) -> str | None:
    """The address of a data directory's catalog; None when that is a file in it."""
    noted = _noted(path, CATALOG_URL)
    if url is None:
        return noted
    try:
        address = without_secrets(url)
    except CannotOpen as error:
        raise CannotUse(str(error)) from error
    if (path / CATALOG).exists():
        raise CannotUse(
            f"the catalog of {path} is its {CATALOG}, not {address}: "
            "leave --catalog out, or name another --data-dir"
        )
    if noted not in (None, address):
        raise CannotUse(
            f"the catalog of {path} is {noted}, not {address}: leave --catalog out, name another "
            f"--data-dir or, if it is the database that has moved, remove {path / CATALOG_URL}"
        )
    return url


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
    recorded = _noted(path, STORE_URL)
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


def remember(path: Path, url: str | None, catalog: Catalog) -> None:
    """Note durably which store, given by its address, and catalog a data directory is used with.

    The catalog's address is noted without a password.
    """
    if url is not None:
        _note(path, STORE_URL, check_url(url))
    if not catalog.is_local:
        _note(path, CATALOG_URL, catalog.address)


def _noted(path: Path, name: str) -> str | None:
    with _using(path):
        return (path / name).read_text().strip() if (path / name).exists() else None


def _note(path: Path, name: str, text: str) -> None:
    """Write a text into a file of the directory, durably, unless that is there."""
    with _using(path):
        if (path / name).exists():
            return
        temporary = path / f"{name}.new"
        with temporary.open("w") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path / name)
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
        raise _cannot_use(path, error.strerror or str(error)) from error


def _cannot_use(path: Path, why: str) -> CannotUse:
    return CannotUse(
        f"cannot use the data directory {path}: {why}; "
        "name one that this user can write to with --data-dir"
    )


def _check_writable(path: Path) -> None:
    """Raises CannotUse where what is in it cannot be changed: it may be another user's.

    A server would find that out operation by operation.
    """
    store = path / STORE
    for part in (path / CATALOG, path / SEGMENTS, store, store / "tmp"):
        if part.exists() and not os.access(part, os.W_OK):
            raise _cannot_use(path, f"{part} cannot be changed")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the data directory's lock, making the directory if need be. Raises CannotUse."""
    with _using(path):
        path.mkdir(parents=True, exist_ok=True)
        _check_writable(path)
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
