"""What is known before there is a session: health, capabilities, client configuration."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from holdfast.protocol.sessions import (
    ClientConfigResponse,
    ClientDynamicConfigResponse,
    GetServerCapabilitiesResponse,
    HealthResponse,
    SupportedModel,
    TelemetryResponse,
)
from holdfast.server.context import OwnerDep, RunsDep

router = APIRouter()


@router.get("/healthz")
async def healthz(runs: RunsDep) -> HealthResponse:
    """Whether requests are taken: 503 from the beginning of a stop on, for load balancers."""
    runs.stopping.check()
    return HealthResponse()


@router.get("/get_server_capabilities")
async def capabilities(_owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    models = []
    for name in runs.engines.models:
        host = runs.engines[name]
        length = host.info.max_sequence_length if host.info else None
        models.append(
            SupportedModel(
                model_name=name, max_context_length=length, trainable=True, sampleable=True
            )
        )
    return GetServerCapabilitiesResponse(supported_models=models).to_json()


@router.post("/client/config")
async def client_config(_owner: OwnerDep) -> dict[str, Any]:
    # In-order chunks remove most of the disorder that a run would have to wait out.
    config = ClientConfigResponse(parallel_fwdbwd_chunks=False, create_by_load=True)
    return config.to_json()


@router.post("/client/dynamic_config")
async def client_dynamic_config(_owner: OwnerDep) -> dict[str, Any]:
    return ClientDynamicConfigResponse(sample_cancel_enabled=True).to_json()


@router.post("/telemetry")
async def telemetry(request: Request) -> TelemetryResponse:
    # Its events may hold the caller's key, so they are read and forgotten.
    async for _ in request.stream():
        pass
    return TelemetryResponse()
