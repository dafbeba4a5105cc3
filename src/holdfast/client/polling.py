"""Waiting for a future's result: one long poll after another until there is one."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx2

from holdfast.client.http import (
    JSON_TYPE,
    PROTOBUF_TYPE,
    Answer,
    Patience,
    Server,
    connection_error,
    is_transient,
)
from holdfast.client.runtime import Lane
from holdfast.protocol.errors import HoldfastError, InvalidAnswerError, error_from_body

log = logging.getLogger("holdfast.client")

T = TypeVar("T")

_POLL_SECONDS = 60.0
_HELD = 1.0
_UNREADABLE_LIMIT = 5
_PAUSE_LOG_SECONDS = 60.0


async def poll(
    server: Server,
    request_id: str,
    request_type: str,
    read: Callable[[Answer], T],
    *,
    protobuf: bool,
    lane: Lane,
) -> T:
    """The future's result, as `read` finds it in the answer that holds it.

    A server that answers at once while the future is pending is not asked without pause: the
    waits grow to a few seconds. An answer that cannot be read is asked for a few times.
    Raises the future's error; ResultLostError when the server no longer knows it; the connection's
    error when RetryConfig says that it is enough.
    """
    headers = {
        "content-type": JSON_TYPE,
        "accept": PROTOBUF_TYPE if protobuf else JSON_TYPE,
        "x-tinker-request-type": request_type,
    }
    content = json.dumps({"request_id": request_id, "allow_metadata_only": False}).encode()
    patience = Patience(server.retry)
    iteration = 0
    quick = 0
    unreadable = 0
    last_log = time.monotonic()
    while True:
        answer: Answer | None = None
        failure: HoldfastError
        started = time.monotonic()
        try:
            answer = await server.once(
                "POST",
                "retrieve_future",
                content=content,
                headers={**headers, "x-tinker-request-iteration": str(iteration)},
                lane=lane,
                timeout=_POLL_SECONDS,
            )
            iteration += 1
            body: Any = None
            if answer.status < 300:
                if answer.is_protobuf:
                    return read(answer)
                body = answer.json()
                if not _is_pending(body):
                    if isinstance(body, Mapping) and is_failure(body):
                        raise error_from_body(body, request_id=request_id)
                    return read(answer)
            elif answer.status == 408:
                body = _readable(answer)
            elif not is_transient(answer):
                raise answer.error(request_id)
            if answer.status < 300 or answer.status == 408:
                patience.reset()
                unreadable = 0
                quick = quick + 1 if time.monotonic() - started < _HELD else 0
                last_log = _log_pause(body, request_id, last_log)
                await asyncio.sleep(_pause(body, quick))
                continue
            failure = answer.error(request_id)
        except InvalidAnswerError as error:
            # A body cut short on its way: the result stays retrievable.
            unreadable += 1
            if unreadable >= _UNREADABLE_LIMIT:
                raise
            failure = error
        except httpx2.TransportError as error:
            failure = connection_error(error, f"retrieve_future of {request_id}")
        delay = patience.delay(answer)
        if delay is None:
            failure.request_id = request_id
            failure.message += "; the operation was accepted and may still finish"
            failure.args = (failure.message,)
            raise failure
        log.debug("polling %s: %s; again in %.2f s", request_id, failure.message, delay)
        await asyncio.sleep(delay)


def is_failure(body: Mapping[str, Any]) -> bool:
    """Whether a JSON answer says that the future failed, in either family's form."""
    return "error" in body or body.get("status") == "failed"


def _is_pending(body: object) -> bool:
    if not isinstance(body, Mapping):
        raise InvalidAnswerError(f"a future's answer is an object, not {body!r:.80}")
    return body.get("type") == "try_again" or body.get("status") in (
        "pending",
        "complete_metadata",
    )


def _readable(answer: Answer) -> object:
    try:
        return answer.json()
    except InvalidAnswerError:
        return None


def _pause(body: object, quick: int) -> float:
    wanted = body.get("retry_after_ms") if isinstance(body, Mapping) else None
    if isinstance(wanted, int | float) and 0 <= wanted <= 60_000:
        return max(float(wanted) / 1000, 0.0 if quick < 3 else 0.02)
    return 0.0 if quick == 0 else float(min(0.01 * 2 ** min(quick, 10), 2.0))


def _log_pause(body: object, request_id: str, last: float) -> float:
    state = body.get("queue_state") if isinstance(body, Mapping) else None
    now = time.monotonic()
    if state in (None, "active") or now - last < _PAUSE_LOG_SECONDS:
        return last
    assert isinstance(body, Mapping)
    log.warning("%s waits: %s %s", request_id, state, body.get("queue_state_reason") or "")
    return now
