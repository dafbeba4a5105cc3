"""Bodies of runs and sessions as they are listed and searched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from holdfast.protocol.bodies import Body, Metadata, Text, Time
from holdfast.protocol.checkpoints import Checkpoint, Cursor


class RunSnapshot(Body):
    position: int
    time: Time


class RunStatus(Body):
    """Where a run stands. Other servers send none, and other clients read none."""

    state: str
    """live, idle, evicted (from the worker's memory), recovering; ended, lost, stored, corrupted"""
    position: int | None = None
    """The highest number of an operation whose effect is complete."""
    pending: int = 0
    """Operations that have no outcome yet."""
    snapshot: RunSnapshot | None = None
    """The newest automatic recovery point."""
    recoveries: int = 0
    replayed: int = 0
    """Operations that were executed again, in all recoveries."""
    divergences: int = 0
    """Those of them that gave another result, under other numerics."""
    diverged_at: int | None = None
    note: str | None = None
    """What the run waits for, or why it ended."""


class TrainingRun(Body):
    training_run_id: Text
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: Time
    corrupted: bool = False
    lora_rank: int | None = None
    last_checkpoint: Checkpoint | None = None
    """The newest training checkpoint."""
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: Metadata | None = None
    status: RunStatus | None = None


class TrainingRunsResponse(Body):
    training_runs: list[TrainingRun]
    cursor: Cursor


class ListSessionsResponse(Body):
    sessions: list[str]


class GetSessionResponse(Body):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: Metadata | None = None
    display_name: str | None = None


class SearchOwner(Body):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] | None = None


class SearchStatus(Body):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = None


class SearchCursor(Body):
    last_created_at: Time
    last_session_id: str


class SessionSearchRequest(Body):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: Metadata = Field(default_factory=dict)
    display_name: str | None = None
    owner: SearchOwner = SearchOwner()
    statuses: list[SearchStatus] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None


class SessionSummary(Body):
    session_id: str
    created_at: Time
    owner: str
    project_id: str
    checkpoints_count: int
    status: dict[str, Any] | None = None
    """`{"type": "active"}`, or cancelled, client_finished or failed with their reasons."""
    display_name: str | None = None
    user_metadata: Metadata | None = None
    checkpoint_storage_bytes: int | None = None


class SessionSearchResponse(Body):
    sessions: list[SessionSummary]
    next_cursor: SearchCursor | None = None


class AssignProjectRequest(Body):
    project_id: str


class TraceExportResponse(Body):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None
