"""Sessions: opened, kept alive, finished, listed."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from holdfast.protocol.rest import GetSessionResponse, ListSessionsResponse
from holdfast.protocol.sessions import (
    CreateSessionRequest,
    CreateSessionResponse,
    FinishSessionRequest,
    SessionHeartbeatRequest,
    SessionHeartbeatResponse,
)
from holdfast.runs.errors import RunError
from holdfast.server.context import FamilyDep, OwnerDep, RunsDep

router = APIRouter()


@router.post("/create_session")
async def create_session(
    body: CreateSessionRequest, request: Request, owner: OwnerDep, runs: RunsDep, family: FamilyDep
) -> dict[str, Any]:
    session = await runs.sessions.create(
        owner,
        client=family,
        idempotency_key=request.headers.get("x-idempotency-key"),
        sdk_version=body.sdk_version,
        tags=body.tags,
        user_metadata=body.user_metadata,
        project_id=body.project_id,
        display_name=body.display_name,
    )
    return CreateSessionResponse(session_id=session.id).to_json()


@router.post("/session_heartbeat")
async def heartbeat(
    body: SessionHeartbeatRequest, owner: OwnerDep, runs: RunsDep
) -> SessionHeartbeatResponse:
    try:
        await runs.sessions.live(body.session_id, owner)
    except RunError as error:
        if error.code == "session_ended":
            # 410 alone tells a client that beating on is of no use.
            raise RunError(error.code, error.message, reason="gone") from None
        raise
    return SessionHeartbeatResponse()


@router.post("/sessions/{session_id}/finish", status_code=204)
async def finish(
    session_id: str, owner: OwnerDep, runs: RunsDep, body: FinishSessionRequest | None = None
) -> Response:
    await runs.sessions.get(session_id, owner)
    end = body or FinishSessionRequest()
    await runs.end_session(session_id, end.reason.type, end.detail)
    return Response(status_code=204)


@router.get("/sessions")
async def list_sessions(
    owner: OwnerDep,
    runs: RunsDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> ListSessionsResponse:
    return ListSessionsResponse(
        sessions=await runs.sessions.list_ids(owner, offset=offset, limit=limit)
    )


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    session = await runs.sessions.get(session_id, owner)
    run_ids, sampler_ids = await runs.sessions.members(session_id)
    return GetSessionResponse(
        training_run_ids=run_ids,
        sampler_ids=sampler_ids,
        user_metadata=None if session.user_metadata is None else dict(session.user_metadata),
        display_name=session.display_name,
    ).to_json()
