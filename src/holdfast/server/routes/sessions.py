"""Sessions: opened, kept alive, finished, listed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from holdfast.protocol.rest import (
    AssignProjectRequest,
    GetSessionResponse,
    ListSessionsResponse,
    SearchCursor,
    SearchStatus,
    SessionSearchRequest,
    SessionSearchResponse,
    SessionSummary,
)
from holdfast.protocol.sessions import (
    CreateSessionRequest,
    CreateSessionResponse,
    FinishSessionRequest,
    SessionHeartbeatRequest,
    SessionHeartbeatResponse,
)
from holdfast.runs.errors import RunError
from holdfast.runs.search import DEFAULT_PROJECT, Found, search
from holdfast.runs.search import Query as Search
from holdfast.runs.sessions import Session
from holdfast.server.context import FamilyDep, OwnerDep, RunsDep, idempotency_key

router = APIRouter()

_FINISHED = ("success", "errored", "interrupted")
_DETAILS = {"expired": "its client gave no sign of life for too long"}


@router.post("/create_session")
async def create_session(
    body: CreateSessionRequest, request: Request, owner: OwnerDep, runs: RunsDep, family: FamilyDep
) -> dict[str, Any]:
    session = await runs.sessions.create(
        owner,
        client=family,
        idempotency_key=idempotency_key(request),
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


@router.post("/sessions/search")
async def search_sessions(
    body: SessionSearchRequest, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    """Everybody sees their own sessions alone, whatever owners are asked for."""
    if body.owner.type == "user" and owner not in (body.owner.owner_urns or []):
        return SessionSearchResponse(sessions=[]).to_json()
    cursor = body.cursor
    query = Search(
        owner=owner,
        session_id=body.session_id,
        display_name=body.display_name,
        project_ids=body.project_ids,
        user_metadata=body.user_metadata,
        end_reasons=None if body.statuses is None else _end_reasons(body.statuses),
        after=None
        if cursor is None
        else (cursor.last_created_at.timestamp(), cursor.last_session_id),
        limit=body.limit,
    )
    found, more = await runs.catalog.read(lambda c: search(c, query))
    last = found[-1].session if found else None
    return SessionSearchResponse(
        sessions=[_summary(item) for item in found],
        next_cursor=SearchCursor(
            last_created_at=datetime.fromtimestamp(last.created, UTC), last_session_id=last.id
        )
        if more and last is not None
        else None,
    ).to_json()


@router.put("/sessions/{session_id}/project", status_code=204)
async def assign_project(
    session_id: str, body: AssignProjectRequest, owner: OwnerDep, runs: RunsDep
) -> Response:
    await runs.sessions.get(session_id, owner)
    await runs.sessions.set_project(session_id, body.project_id)
    return Response(status_code=204)


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


def _summary(found: Found) -> SessionSummary:
    session = found.session
    return SessionSummary(
        session_id=session.id,
        created_at=datetime.fromtimestamp(session.created, UTC),
        owner=session.owner,
        project_id=session.project_id or DEFAULT_PROJECT,
        status=_status(session),
        checkpoints_count=found.checkpoints,
        display_name=session.display_name,
        user_metadata=None if session.user_metadata is None else dict(session.user_metadata),
        checkpoint_storage_bytes=found.size,
    )


def _status(session: Session) -> dict[str, Any]:
    if session.ended is None:
        return {"type": "active"}
    if session.end_reason in _FINISHED:
        status: dict[str, Any] = {
            "type": "client_finished",
            "reason": {"type": session.end_reason},
        }
    else:
        status = {"type": "cancelled"}
    detail = session.end_detail or _DETAILS.get(session.end_reason or "")
    return status if detail is None else {**status, "detail": detail}


def _end_reasons(statuses: list[SearchStatus]) -> list[str | None]:
    """The ends that a session of any of these states can have had."""
    found: list[str | None] = []
    for status in statuses:
        match status.type:
            case "active":
                found.append(None)
            case "client_finished":
                found += status.reasons or _FINISHED
            case "cancelled":
                found += _DETAILS
            case "failed":  # runs fail here, sessions do not
                pass
    return found
