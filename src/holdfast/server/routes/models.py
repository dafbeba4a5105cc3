"""Models: created, described, unloaded."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from holdfast.protocol.futures import FutureHandle
from holdfast.protocol.training import (
    CreateModelRequest,
    GetInfoRequest,
    GetInfoResponse,
    ModelData,
    OptimizerConfig,
    UnloadModelRequest,
    UnloadModelResponse,
)
from holdfast.runs.errors import RunError
from holdfast.server.context import ContextDep, OwnerDep, RunsDep, idempotency_key

router = APIRouter()

OPTIMIZERS = ("adamw",)


def check_optimizer(config: OptimizerConfig) -> str:
    """The optimizer's type. Raises RunError for one that is not offered here."""
    if config.type not in OPTIMIZERS:
        raise RunError(
            "unknown_optimizer",
            f"optimizer type {config.type!r} is not offered here; there is "
            + ", ".join(repr(name) for name in OPTIMIZERS),
        )
    return config.type


@router.post("/create_model")
async def create_model(
    body: CreateModelRequest, request: Request, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    session = await runs.sessions.live(body.session_id, owner)
    lora = body.lora_config
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise RunError(
            "nothing_to_train",
            "train_attn, train_mlp and train_unembed are all false; at least one must be true",
        )
    run = await runs.create(
        session,
        body.model_seq_id,
        base_model=body.base_model,
        lora=lora.model_dump(),
        optimizer=check_optimizer(body.optimizer_config),
        user_metadata=body.user_metadata,
        idempotency_key=idempotency_key(request),
    )
    return FutureHandle(request_id=run.key.request_id(0), model_id=run.key.id).to_json()


@router.post("/get_info")
async def get_info(body: GetInfoRequest, owner: OwnerDep, context: ContextDep) -> dict[str, Any]:
    runs = context.runs
    config = await runs.config(body.model_id, owner, context.settings.poll_hold)
    info = runs.engines[config.base_model].info
    return GetInfoResponse(
        model_id=body.model_id,
        model_data=ModelData(
            arch=info.architecture if info else None,
            model_name=config.base_model,
            tokenizer_id=info.tokenizer_id if info else None,
        ),
        optimizer_config=OptimizerConfig(type=config.optimizer),
        is_lora=True,
        lora_rank=config.lora.rank,
        model_name=config.base_model,
        train_attn=config.lora.train_attn,
        train_mlp=config.lora.train_mlp,
        train_unembed=config.lora.train_unembed,
    ).to_json()


@router.post("/unload_model")
async def unload_model(body: UnloadModelRequest, owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    await runs.unload(body.model_id, owner)
    return UnloadModelResponse(model_id=body.model_id).to_json()
