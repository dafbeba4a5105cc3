"""Bodies of client configuration, sessions, telemetry and capabilities."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from holdfast.protocol.bodies import Body, Id, Metadata

SessionEnd = Literal["success", "errored", "interrupted"]


class ClientConfigRequest(Body):
    sdk_version: str | None = None


class ClientConfigResponse(Body):
    """Switches that a client reads once. Absent ones have these values."""

    pjwt_auth_enabled: bool = False
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: int = Field(default=1024, ge=1)
    fwdbwd_max_chunk_bytes_count: int = Field(default=5_000_000, ge=1)
    custom_loss_server_side: bool = False
    sample_use_retrieve_futures: bool = False
    sample_join_sampling_session: bool = False
    sample_max_concurrent_requests: int = Field(default=2000, ge=1)
    create_by_load: bool = False
    """This server creates a model by its load_weights alone (not a switch of other clients)."""


class ClientDynamicConfigResponse(Body):
    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = False
    sample_cancel_max_batch_size: int = 64


class AuthTokenResponse(Body):
    jwt: str


class CreateSessionRequest(Body):
    tags: list[str] = Field(default_factory=list)
    user_metadata: Metadata | None = None
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None
    type: Literal["create_session"] = "create_session"


class CreateSessionResponse(Body):
    session_id: Id
    type: Literal["create_session"] = "create_session"
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None


class SessionHeartbeatRequest(Body):
    session_id: Id
    type: Literal["session_heartbeat"] = "session_heartbeat"


class SessionHeartbeatResponse(Body):
    type: Literal["session_heartbeat"] = "session_heartbeat"


class FinishReason(Body):
    type: SessionEnd


class FinishSessionRequest(Body):
    reason: FinishReason = FinishReason(type="success")
    detail: str | None = None


class TelemetryRequest(Body):
    """Events of a client. They may carry an API key in their text: never log them."""

    events: list[dict[str, Any]] = Field(default_factory=list)
    platform: str | None = None
    sdk_version: str | None = None
    session_id: str | None = None
    process_uuid: str | None = None


class TelemetryResponse(Body):
    status: Literal["accepted"] = "accepted"


class HealthResponse(Body):
    status: Literal["ok"] = "ok"


class SupportedModel(Body):
    model_config = ConfigDict(extra="allow")

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


class GetServerCapabilitiesResponse(Body):
    supported_models: list[SupportedModel]
