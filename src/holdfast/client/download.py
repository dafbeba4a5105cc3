"""Fetching a checkpoint's archive, going on where a broken download stopped."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx2

from holdfast.client.http import Answer, Patience, Server, connection_error, is_transient
from holdfast.protocol.checkpoints import ArchiveUrlResponse
from holdfast.protocol.errors import InvalidAnswerError, ServerFaultError

log = logging.getLogger("holdfast.client")

Progress = Callable[[int, int | None], object]

_STUCK_LIMIT = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


async def download_archive(
    server: Server, address: str, directory: Path, progress: Progress | None
) -> Path:
    """Fetch and unpack an archive; returns the directory.

    While it is under way the bytes are in a hidden file in the directory. The checkpoint's files
    appear only when the archive is whole. Raises the server's error, and InvalidAnswerError for
    an archive that cannot be unpacked safely; a directory that was made and is empty goes then.
    """
    with _made(directory):
        await _download(server, address, directory, progress)
    return directory


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):  # what is in it is gone on with by a later call
                directory.rmdir()
        raise


async def _download(
    server: Server, address: str, directory: Path, progress: Progress | None
) -> None:
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    part = directory / f".{key}.part"
    patience = Patience(server.retry)
    stuck = 0
    while True:
        answer: Answer | None = None
        have = _size(part)
        try:
            # Asked for anew each time: addresses may be good for a short while only.
            url = await _locate(server, address)
            answer = await _fetch(server, url, part, progress)
            if answer is None:
                break
            if not is_transient(answer) and answer.status != 416:
                raise answer.error()
            failure = answer.error()
        except httpx2.TransportError as error:
            failure = connection_error(error, address)
            failure.__cause__ = error
        if _size(part) > have:
            patience.reset()
            stuck = 0
        elif isinstance(failure.__cause__, httpx2.RemoteProtocolError | httpx2.ReadError):
            stuck += 1
            if stuck >= _STUCK_LIMIT:
                raise ServerFaultError(
                    f"the archive breaks off at byte {have} each time: the checkpoint may be"
                    " damaged at the server",
                    code="archive_broken",
                )
        delay = patience.delay(answer)
        if delay is None:
            raise failure
        log.debug("download of %s: %s; again in %.2f s", address, failure.message, delay)
        await asyncio.sleep(delay)
    await asyncio.to_thread(_unpack, part, directory)


async def _locate(server: Server, address: str) -> str:
    answer = await server.call("GET", address, accept=_REDIRECTS)
    if answer.status in _REDIRECTS:
        location = answer.headers.get("location")
        if not location:
            raise InvalidAnswerError("a redirect without a Location", status=answer.status)
        return urljoin(server.url(address), location)
    return urljoin(server.url(address), answer.read(ArchiveUrlResponse).url)


async def _fetch(server: Server, url: str, part: Path, progress: Progress | None) -> Answer | None:
    """Add to the part file what is missing of it; None when it is whole, else a refusal."""
    headers = {"accept": "*/*", "accept-encoding": "identity"}
    have, etag = _begun(part)
    if etag:
        headers["range"] = f"bytes={have}-"
        headers["if-range"] = etag
    if _origin(url) == _origin(server.base_url):
        headers = {**server.headers, **headers}
    async with server.runtime.lane("submit").stream("GET", url, headers=headers) as response:
        if response.status_code not in (200, 206):
            content = await response.aread()
            if response.status_code == 416:
                _note(part, "")  # what is there does not fit what the server has now
            return Answer(response.status_code, response.headers, content)
        if response.status_code == 200:
            have = 0
            # A weak tag does not promise equal bytes.
            etag = response.headers.get("etag", "")
            _note(part, "" if etag.startswith("W/") else etag)
        length = response.headers.get("content-length")
        total = have + int(length) if length is not None and length.isdigit() else None
        with part.open("ab" if have else "wb") as file:
            async for block in response.aiter_bytes():
                file.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, total)
        digest = response.headers.get("repr-digest")
    if digest is not None and not await asyncio.to_thread(_agrees, part, digest):
        _discard(part)
        raise InvalidAnswerError("the archive's bytes are not those of its digest: fetch it again")
    return None


def _agrees(part: Path, field: str) -> bool:
    """Whether the file has the sha-256 of a Repr-Digest field (RFC 9530), if it names one."""
    found = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", field)
    if found is None:
        return True
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return base64.b64encode(digest).decode() == found[1]


def _begun(part: Path) -> tuple[int, str]:
    """How much is there, and the tag of what it is a part of; (0, "") to begin anew."""
    tag = part.with_suffix(".etag")
    etag = tag.read_text() if tag.exists() else ""
    return (_size(part), etag) if etag and _size(part) else (0, "")


def _note(part: Path, etag: str) -> None:
    tag = part.with_suffix(".etag")
    if etag:
        tag.write_text(etag)
    else:
        tag.unlink(missing_ok=True)


def _unpack(part: Path, directory: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=".unpack-", dir=directory))
    try:
        with tarfile.open(part, "r:*") as archive:
            archive.extractall(scratch, filter="data")
        for path in sorted(scratch.iterdir()):
            target = directory / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    except (tarfile.TarError, EOFError) as error:
        _discard(part)
        raise InvalidAnswerError(f"the archive cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _discard(part)


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part, "")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
