"""Checkpoint archives: an address that is good for a while, and the bytes behind it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from holdfast.protocol.checkpoints import ArchiveUrlResponse
from holdfast.protocol.errors import PermissionDeniedError
from holdfast.server.archive import Archive, parse_range
from holdfast.server.context import OwnerDep, RunsDep
from holdfast.server.failures import refusal
from holdfast.server.routes.checkpoints import ONE, Segment, named

router = APIRouter()

GOOD_FOR = 3600
"""Seconds for which an address can be fetched, by whoever has it."""

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
    url = request.url_for("archive_content", manifest_id=manifest_id).include_query_params(
        expires=expires, token=_token(manifest_id, expires)
    )
    return ArchiveUrlResponse(url=str(url), expires=datetime.fromtimestamp(expires, UTC)).to_json()


@router.get("/archives/{manifest_id}", name="archive_content")
async def content(
    manifest_id: str,
    runs: RunsDep,
    expires: Annotated[int, Query()],
    token: Annotated[str, Query()],
    range_: Annotated[str | None, Header(alias="range")] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> Response:
    """The archive, or a range of it. Its ETag is the manifest's id, its digest is of the whole."""
    if not hmac.compare_digest(token, _token(manifest_id, expires)) or expires < time.time():
        raise PermissionDeniedError(
            "this address of an archive is not good any more; ask for the archive again"
        )
    found = await _open(runs, manifest_id)
    etag = f'"{found.etag}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "repr-digest": await asyncio.to_thread(found.digest),
    }
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
    return StreamingResponse(
        _stream(found, found.read(start, end)),
        status_code=206 if part else 200,
        headers=headers,
        media_type="application/x-tar",
    )


async def _open(runs: RunsDep, manifest_id: str) -> Archive:
    return Archive(runs.checkpoints.store, await runs.checkpoints.manifest(manifest_id))


async def _stream(archive: Archive, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    # A blob that turns out to be damaged breaks the body off: its length is then wrong, which
    # every client notices.
    while True:
        try:
            chunk = await asyncio.to_thread(next, chunks, None)
        except Exception as error:
            _log.error("an archive broke off", manifest=archive.etag, error=str(error))
            raise
        if chunk is None:
            return
        yield chunk


def _token(manifest_id: str, expires: int) -> str:
    text = f"{manifest_id} {expires}".encode()
    return hmac.new(_SECRET, text, hashlib.sha256).hexdigest()
