"""The object port over obstore: S3 and compatible storages, Google Cloud Storage, Azure.

The only module that imports obstore, which is an extra.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from holdfast.store.errors import InvalidValue, IOFailed, NoAccess, NotAStore
from holdfast.store.files import ReadFile
from holdfast.store.objects import Got, Listed, Version

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutResult, UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_PART = 8 << 20
"""Bytes of a request that sends or fetches a part of a large object."""

_AHEAD = 4
"""Parts that are fetched or sent at a time."""

_MOST_PARTS = 9_000
"""Of one object; storages allow 10,000."""

_AT_ONCE = 16
"""Requests for small objects at a time."""

_DELETED_AT_ONCE = 1000
"""Objects that one request deletes."""

_TRIES = 3
"""How often a request is made that is not repeated below, and does no harm twice."""

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_METADATA = "169.254.169.254"
"""Where a cloud's machines get their credentials; asked when the environment has none."""

_TIMEOUT = timedelta(seconds=60)
_CLIENT: ClientConfig = {"connect_timeout": "5s", "timeout": _TIMEOUT}
_RETRY: RetryConfig = {
    "max_retries": 4,
    "retry_timeout": _TIMEOUT,
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=5),
        "base": 2,
    },
}


def connect(url: str) -> RemoteObjects:
    """The objects below `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `az://CONTAINER/PREFIX`.

    Credentials, region and endpoint come from the environment, as obstore reads it: for S3 from
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL. Nothing is sent yet.
    Raises InvalidValue.
    """
    try:
        store = from_url(
            url, client_options={**_CLIENT, "allow_http": _plain_http()}, retry_config=_RETRY
        )
    except (BaseError, ValueError) as error:
        raise InvalidValue(f"the store {url} cannot be used: {_reason(error)}") from error
    return RemoteObjects(url, store)


def _plain_http() -> bool:
    """Whether the endpoint that the environment names is not encrypted, as on one's own machine."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
    return any(os.environ.get(name, "").startswith("http://") for name in names)


class RemoteObjects:
    """Objects in a real storage."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url = url
        self._store = store
        self._pool = ThreadPoolExecutor(_AT_ONCE, "objects")

    def close(self) -> None:
        self._pool.shutdown()

    def create(self, key: str, data: bytes) -> Version | None:
        with _errors(f"writing {self.url}/{key}"):
            try:
                return _version(obstore.put(self._store, key, data, mode="create"))
            except AlreadyExistsError:
                return None

    def swap(self, key: str, data: bytes, version: Version) -> Version | None:
        mode: UpdateVersion = {"e_tag": version.etag}
        if version.generation is not None:
            mode["version"] = version.generation
        with _errors(f"writing {self.url}/{key}"):
            try:
                return _version(obstore.put(self._store, key, data, mode=mode))
            except (PreconditionError, FileNotFoundError) as error:
                _check_bucket(error)
                return None

    def upload(self, key: str, pieces: Iterable[memoryview], size: int) -> None:
        try:
            with _errors(f"writing {self.url}/{key}"):
                self._send(key, pieces, size)
        except (IOFailed, FileNotFoundError) as error:
            # The end of a multipart upload that is repeated, its response lost, finds no upload.
            if self.size(key) != size:
                raise IOFailed(f"writing {self.url}/{key}: {_reason(error)}") from error

    def _send(self, key: str, pieces: Iterable[memoryview], size: int) -> None:
        if size <= _PART:
            obstore.put(self._store, key, b"".join(pieces), use_multipart=False)
            return
        obstore.put(
            self._store,
            key,
            iter(pieces),
            use_multipart=True,
            chunk_size=max(_PART, size // _MOST_PARTS),
            max_concurrency=_AHEAD,
        )

    def get(self, keys: Sequence[str]) -> list[Got | None]:
        if len(keys) == 1:
            return [self._get(keys[0])]
        return list(self._pool.map(self._get, keys))

    def _get(self, key: str) -> Got | None:
        with _errors(f"reading {self.url}/{key}"):
            try:
                found = obstore.get(self._store, key)
                return Got(bytes(found.bytes()), _version(found.meta))
            except FileNotFoundError as error:
                _check_bucket(error)
                return None

    @contextmanager
    def open(self, key: str) -> Iterator[ReadFile | None]:
        size = self.size(key)
        if size is None:
            yield None
            return
        file = _RemoteFile(self, key, size)
        try:
            yield file
        finally:
            file.close()

    def read_later(self, key: str, start: int, stop: int) -> Future[memoryview]:
        """A part of an object, fetched meanwhile."""
        return self._pool.submit(self._read, key, start, stop)

    def _read(self, key: str, start: int, stop: int) -> memoryview:
        with _errors(f"reading {self.url}/{key}"):
            return memoryview(obstore.get_range(self._store, key, start=start, end=stop))

    def size(self, key: str) -> int | None:
        with _errors(f"looking for {self.url}/{key}"):
            try:
                return obstore.head(self._store, key)["size"]
            except FileNotFoundError:
                return None

    def list(self, prefix: str, limit: int | None = None) -> list[Listed]:
        found: list[Listed] = []
        with _errors(f"listing {self.url}/{prefix}"):
            for chunk in obstore.list(self._store, prefix or None, chunk_size=1000):
                found += map(_listed, chunk)
                if limit is not None and len(found) >= limit:
                    break
        return found[:limit]

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            self._delete(keys[start : start + _DELETED_AT_ONCE])

    def _delete(self, keys: Sequence[str]) -> None:
        for tried in range(1, _TRIES + 1):
            try:
                with _errors(f"deleting {self.url}/{keys[0]}"):
                    obstore.delete(self._store, list(keys))
                return
            except FileNotFoundError:  # then what came after it may have been left
                if len(keys) == 1:
                    return
                for key in keys:
                    self._delete([key])
                return
            except IOFailed:
                if tried == _TRIES:
                    raise


class _RemoteFile:
    """A large object, read in parts, of which the next ones are fetched meanwhile."""

    def __init__(self, objects: RemoteObjects, key: str, size: int) -> None:
        self._objects = objects
        self._key = key
        self._position = 0
        self._parts: dict[int, Future[memoryview]] = {}
        self.size = size

    def readinto(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer) and self._position < self.size:
            part = self._part(self._position // _PART)
            piece = part[self._position % _PART :][: len(buffer) - done]
            if not piece:  # it has become shorter
                break
            buffer[done : done + len(piece)] = piece
            done += len(piece)
            self._position += len(piece)
        return done

    def _part(self, number: int) -> memoryview:
        last = (self.size - 1) // _PART
        wanted = range(number, min(number + _AHEAD, last + 1))
        for old in self._parts.keys() - set(wanted):
            self._parts.pop(old).cancel()
        for new in wanted:
            if new not in self._parts:
                stop = min((new + 1) * _PART, self.size)
                self._parts[new] = self._objects.read_later(self._key, new * _PART, stop)
        return self._parts[number].result()

    def seek(self, position: int) -> None:
        self._position = position

    def close(self) -> None:
        for part in self._parts.values():
            part.cancel()


def _version(found: PutResult | ObjectMeta) -> Version:
    etag = found["e_tag"]
    assert etag is not None, "the storage gives no ETag"
    return Version(etag, found["version"])


def _listed(found: ObjectMeta) -> Listed:
    modified = found["last_modified"].timestamp()
    return Listed(found["path"], found["size"], modified, found["e_tag"] or "")


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    """Errors of the store's tree, but for FileNotFoundError."""
    try:
        yield
    except FileNotFoundError as error:
        _check_bucket(error)
        raise
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise NoAccess(
            f"{doing}: the storage refuses the credentials ({_reason(error)})"
        ) from error
    except BaseError as error:
        _check_bucket(error)
        if _METADATA in str(error):
            raise NoAccess(
                f"{doing}: the environment has no credentials (for S3 AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, for Google GOOGLE_APPLICATION_CREDENTIALS, for Azure "
                "AZURE_STORAGE_ACCOUNT_KEY)"
            ) from error
        raise IOFailed(f"{doing}: {_reason(error)}") from error


def _check_bucket(error: Exception) -> None:
    """NotAStore when it is the bucket that is not there."""
    if any(sign in str(error) for sign in _NO_BUCKET):
        raise NotAStore(f"there is no such bucket: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line of what obstore says in many."""
    text = str(error).partition("\n\nDebug source")[0]
    said = re.search(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", text, re.DOTALL)
    if said is not None:
        text = ": ".join(part for part in said.groups() if part)
    return " ".join(text.split())[:400]
