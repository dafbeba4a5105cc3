"""Futures: one long poll, whatever it waits for."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from holdfast.protocol.errors import (
    failed_future_body,
    python_failed_future_body,
    try_again_body,
)
from holdfast.protocol.futures import CancelFutureRequest, RetrieveFutureRequest
from holdfast.runs import bodies
from holdfast.runs.errors import RunError
from holdfast.runs.journal import Failure, Outcome
from holdfast.runs.service import ELIXIR
from holdfast.server.context import ContextDep, FamilyDep, OwnerDep, RunsDep
from holdfast.server.results import json_result, protobuf_result

router = APIRouter()

_PROTOBUF = "application/x-protobuf"
_log = structlog.get_logger("holdfast.server")


@router.post("/retrieve_future")
async def retrieve_future(
    body: RetrieveFutureRequest,
    request: Request,
    owner: OwnerDep,
    context: ContextDep,
    family: FamilyDep,
) -> Response:
    """Wait for a future for a while; "try again" when it is not there by then.

    The wait ends with the outcome, without polling anything here. It never answers 5xx: clients
    come back from that at once, and without end.
    """
    hold = context.settings.poll_hold
    reason: str | None
    try:
        outcome, reason = await context.runs.outcome(body.request_id, owner, hold)
    except RunError:
        raise
    except Exception:
        _log.exception("a poll could not be answered", request=body.request_id)
        await asyncio.sleep(1)
        outcome, reason = None, "the server cannot read its catalog at the moment"
    if outcome is None:
        return JSONResponse(try_again_body(body.request_id, reason=reason, retry_after_ms=0))
    answer = render(outcome, body.request_id, request.headers.get("accept", ""), family)
    context.runs.delivered(body.request_id)
    return answer


@router.post("/cancel_future")
async def cancel_future(
    body: CancelFutureRequest, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    """A client no longer waits for a sample. Training operations keep their place."""
    await runs.cancel_sample(body.request_id, owner)
    return {}


def render(outcome: Outcome, request_id: str, accept: str, family: str) -> Response:
    """An outcome in the encoding that was asked for; a failed future if there is no such form."""
    failure = outcome.failure
    if failure is None:
        try:
            return _result(outcome, request_id, accept)
        except Exception:
            _log.exception("a result could not be answered", request=request_id)
            failure = Failure(
                "internal_error",
                f"request {request_id} was done, but the server met a defect when it wrote the "
                "result for this client; its log has the details",
                "server",
            )
    return JSONResponse(_failed(failure, family))


def _result(outcome: Outcome, request_id: str, accept: str) -> Response:
    if _PROTOBUF in accept and outcome.kind in (bodies.FORWARD, bodies.FORWARD_BACKWARD, "sample"):
        return Response(protobuf_result(outcome), media_type=_PROTOBUF)
    return JSONResponse(json_result(outcome, request_id))


def _failed(failure: Failure, family: str) -> dict[str, Any]:
    if family == "python":
        return python_failed_future_body(
            failure.message, category=failure.category, code=failure.code
        )
    # The Elixir client polls a failure of any other category for ever; the code tells the truth.
    category = "user" if family == ELIXIR else failure.category
    return failed_future_body(failure.message, category=category, code=failure.code)
