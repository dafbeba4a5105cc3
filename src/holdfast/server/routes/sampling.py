"""Samplers and sampling."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from holdfast.protocol.futures import FutureHandle
from holdfast.protocol.paths import CheckpointPath
from holdfast.protocol.sampling import (
    CreateSamplingSessionRequest,
    CreateSamplingSessionResponse,
    GetSamplerResponse,
    SampleRequest,
)
from holdfast.runs.errors import RunError
from holdfast.runs.samplers import Sampler
from holdfast.server.context import OwnerDep, RunsDep
from holdfast.server.translate import sample_body
from holdfast.store import NameKey

router = APIRouter()


@router.post("/create_sampling_session")
async def create_sampling_session(
    body: CreateSamplingSessionRequest, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    session = await runs.sessions.live(body.session_id, owner)
    number = body.sampling_session_seq_id
    if body.model_path is not None:
        path = CheckpointPath.parse(body.model_path)
        key = NameKey(path.run_id, path.kind, path.name)
        sampler = await runs.samplers.create_from_path(
            session.id, owner, number, key, body.base_model
        )
    elif body.base_model is not None:
        sampler = await runs.samplers.create_from_base(session.id, owner, number, body.base_model)
    else:
        raise RunError(
            "nothing_to_sample",
            "create_sampling_session needs base_model or model_path, and has neither",
        )
    return CreateSamplingSessionResponse(sampling_session_id=sampler.id).to_json()


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    sampler = await runs.samplers.get(sampler_id, owner)
    return GetSamplerResponse(
        sampler_id=sampler.id, base_model=sampler.base_model, model_path=sampler.model_path
    ).to_json()


@router.post("/asample")
async def asample(body: SampleRequest, owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    sampler = await _sampler(body, owner, runs)
    if body.seq_id is None:
        raise RunError("invalid_message", "seq_id is missing")
    runs.sessions.seen(sampler.session_id)
    asked = body.model_dump_json().encode()
    request_id = runs.samplers.submit(sampler, body.seq_id, asked, sample_body(body))
    return FutureHandle(
        request_id=request_id,
        sample_sequence_ids=[f"{request_id}:{i}" for i in range(body.num_samples)],
    ).to_json()


async def _sampler(body: SampleRequest, owner: str, runs: RunsDep) -> Sampler:
    if body.sampling_session_id is None:
        raise RunError(
            "invalid_message",
            "sampling_session_id is missing; create_sampling_session gives one",
        )
    return await runs.samplers.get(body.sampling_session_id, owner)
