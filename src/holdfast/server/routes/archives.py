"""Downloads of checkpoints: addresses that are good for a while, and the bytes behind them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Generator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Send

from holdfast.protocol.checkpoints import ArchiveUrlResponse, ExternalWeightsUrlsResponse
from holdfast.protocol.errors import PermissionDeniedError
from holdfast.runs.errors import RunError, not_found
from holdfast.server.archive import Download, Reading, parse_range
from holdfast.server.context import ContextDep, OwnerDep, RunsDep
from holdfast.server.failures import refusal
from holdfast.server.routes.checkpoints import ONE, Segment, named
from holdfast.store import StoreError

router = APIRouter()

GOOD_FOR = 3600
"""Seconds for which an address can be fetched, by whoever has it."""

DIGEST_TAKES = 30.0
"""Seconds for which a digest is waited for: the answer cannot begin before, and clients break off
one of which nothing comes for a minute."""

_SECRET = secrets.token_bytes(32)
"""Of this process: an address does not outlive the server."""

_log = structlog.get_logger("holdfast.server")


@router.get(ONE + "/archive")
async def archive(
    run_id: str, segment: Segment, name: str, request: Request, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    """Where to fetch the archive; the address needs no key."""
    key = named(run_id, segment, name)
    manifest_id, _ = await runs.checkpoints.resolve(key, [owner])
    expires = int(time.time()) + GOOD_FOR
    return ArchiveUrlResponse(
        url=_address(request, manifest_id, None, expires), expires=_as_time(expires)
    ).to_json()


@router.get(ONE + "/external_weights_urls")
async def external_weights_urls(
    run_id: str, segment: Segment, name: str, request: Request, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    """Where to fetch each file; the addresses need no key."""
    key = named(run_id, segment, name)
    if key.kind != "external_weights":
        raise RunError(
            "not_external_weights",
            f"'tinker://{key}' is not a checkpoint of external weights, which alone have an "
            "address per file; fetch its archive",
        )
    manifest_id, manifest = await runs.checkpoints.resolve(key, [owner])
    expires = int(time.time()) + GOOD_FOR
    urls = {file: _address(request, manifest_id, file, expires) for file in manifest.files}
    return ExternalWeightsUrlsResponse(urls=urls, expires=_as_time(expires)).to_json()


Expires = Annotated[int, Query()]
Token = Annotated[str, Query()]
Range = Annotated[str | None, Header(alias="range")]
IfRange = Annotated[str | None, Header()]


@router.get("/archives/{manifest_id}", name="archive_content")
async def archive_content(
    manifest_id: str,
    runs: RunsDep,
    context: ContextDep,
    expires: Expires,
    token: Token,
    range_: Range = None,
    if_range: IfRange = None,
) -> Response:
    """The archive, or a range of it. Its digest is of the whole, and left out if it takes long."""
    _check_token(token, manifest_id, None, expires)
    return await _answer(
        await _download(runs, manifest_id, None), context.reading, range_, if_range
    )


@router.get("/archives/{manifest_id}/{file}", name="file_content")
async def file_content(
    manifest_id: str,
    file: str,
    runs: RunsDep,
    context: ContextDep,
    expires: Expires,
    token: Token,
    range_: Range = None,
    if_range: IfRange = None,
) -> Response:
    """One file, or a range of it. Its digest is of the whole, and left out if it takes long."""
    _check_token(token, manifest_id, file, expires)
    return await _answer(
        await _download(runs, manifest_id, file), context.reading, range_, if_range
    )


async def _download(runs: RunsDep, manifest_id: str, file: str | None) -> Download:
    manifest = await runs.checkpoints.manifest(manifest_id)
    try:
        return Download(runs.checkpoints.store, manifest, file)
    except KeyError:
        raise not_found("file", str(file)) from None


async def _answer(
    found: Download, reading: Reading, range_: str | None, if_range: str | None
) -> Response:
    etag = f'"{found.etag}"'
    headers = {"accept-ranges": "bytes", "etag": etag}
    with suppress(TimeoutError):  # it is computed to its end, for who asks later
        async with asyncio.timeout(DIGEST_TAKES):
            headers["repr-digest"] = await reading.digest(found)
    try:
        part = parse_range(range_ if if_range in (None, etag) else None, found.size)
    except ValueError as error:
        answer = refusal(416, str(error), "range_not_satisfiable")
        answer.headers["content-range"] = f"bytes */{found.size}"
        return answer
    start, end = part or (0, found.size)
    headers["content-length"] = str(end - start)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{found.size}"
    return _Breakable(
        _stream(found, found.read(start, end), reading),
        status_code=206 if part else 200,
        headers=headers,
        media_type=found.media_type,
    )


class _Breakable(StreamingResponse):
    """A body that a StoreError breaks off: too short, which every client notices.

    The answer has begun, so that there is no other way to tell it. The server closes the
    connection of an answer that is not brought to its end.
    """

    async def stream_response(self, send: Send) -> None:
        with suppress(StoreError):
            await super().stream_response(send)


async def _stream(
    download: Download, chunks: Generator[bytes], reading: Reading
) -> AsyncIterator[bytes]:
    try:
        while (chunk := await reading.next(chunks)) is not None:
            yield chunk
    except StoreError as error:
        _log.error("a download broke off", manifest=download.manifest.id, error=str(error))
        raise
    finally:
        # Lets go of the pin; a thread that still reads for a client that has gone does so itself.
        with suppress(ValueError):
            chunks.close()


def _address(request: Request, manifest_id: str, file: str | None, expires: int) -> str:
    url = (
        request.url_for("archive_content", manifest_id=manifest_id)
        if file is None
        else request.url_for("file_content", manifest_id=manifest_id, file=file)
    )
    token = _token(manifest_id, file, expires)
    return str(url.include_query_params(expires=expires, token=token))


def _check_token(token: str, manifest_id: str, file: str | None, expires: int) -> None:
    good = hmac.compare_digest(token.encode(), _token(manifest_id, file, expires).encode())
    if not good or expires < time.time():
        raise PermissionDeniedError(
            "this address of an archive is not good any more; ask for the archive again"
        )


def _token(manifest_id: str, file: str | None, expires: int) -> str:
    text = f"{manifest_id} {file or ''} {expires}".encode()
    return hmac.new(_SECRET, text, hashlib.sha256).hexdigest()


def _as_time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
