"""Checkpoints: saved and loaded by a run, described, listed, changed, deleted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from holdfast.engine.interface import OPTIMIZER_STATE
from holdfast.protocol.checkpoints import (
    Checkpoint,
    CheckpointFile,
    CheckpointInfo,
    CheckpointsListResponse,
    CopyWeightsRequest,
    CopyWeightsResponse,
    Cursor,
    DeleteCheckpointsRequest,
    DeleteCheckpointsResponse,
    LoadWeightsRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
    SetTtlRequest,
    WeightsInfoRequest,
    WeightsInfoResponse,
)
from holdfast.protocol.errors import InvalidPathError
from holdfast.protocol.futures import FutureHandle
from holdfast.protocol.paths import CheckpointPath, check_user_name
from holdfast.protocol.training import OptimizerConfig
from holdfast.runs import bodies
from holdfast.runs.checkpoints import check_ttl
from holdfast.runs.copies import Destination
from holdfast.runs.errors import RunError
from holdfast.runs.index import Checkpoint as Row
from holdfast.server.context import Context, ContextDep, OwnerDep, RunsDep, idempotency_key
from holdfast.server.routes.models import check_optimizer
from holdfast.server.submit import submit
from holdfast.store import Manifest, NameKey

router = APIRouter()

_AnySaveRequest = SaveWeightsRequest | SaveWeightsForSamplerRequest | SaveWeightsExternalRequest
_AnySave = bodies.Save | bodies.SaveSampler | bodies.SaveExternal

Segment = Annotated[str, Path(pattern="^(weights|sampler_weights|external_weights)$")]
ONE = "/training_runs/{run_id}/checkpoints/{segment}/{name}"


async def _submit_save(
    runs: RunsDep, owner: str, asked: _AnySaveRequest, save: _AnySave
) -> dict[str, Any]:
    """Submit a save. Its lifetime and its name are checked where a refusal settles the number."""

    def encoded() -> bytes:
        check_ttl(save.ttl_seconds)
        if save.name is not None:
            check_user_name(save.name)
        if isinstance(asked, SaveWeightsExternalRequest) and asked.age_encryption_recipients:
            raise RunError(
                "encryption_not_supported",
                "age_encryption_recipients is set; this server does not encrypt checkpoints. Save "
                "without it, and encrypt the files that you download",
            )
        return save.encode()

    return await submit(runs, owner, asked.model_id, asked.seq_id, save.kind, encoded)


@router.post("/save_weights")
async def save_weights(body: SaveWeightsRequest, owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    save = bodies.Save(
        name=body.path,
        ttl_seconds=body.ttl_seconds,
        overwrite=body.overwrite,
        user_metadata=body.user_metadata,
    )
    return await _submit_save(runs, owner, body, save)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(
    body: SaveWeightsForSamplerRequest, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    save = bodies.SaveSampler(
        name=body.path,
        sampling_session_seq_id=body.sampling_session_seq_id,
        ttl_seconds=body.ttl_seconds,
        user_metadata=body.user_metadata,
    )
    return await _submit_save(runs, owner, body, save)


@router.post("/save_weights_external")
async def save_weights_external(
    body: SaveWeightsExternalRequest, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    save = bodies.SaveExternal(name=body.path, ttl_seconds=body.ttl_seconds)
    return await _submit_save(runs, owner, body, save)


@router.post("/load_weights")
async def load_weights(
    body: LoadWeightsRequest, request: Request, owner: OwnerDep, context: ContextDep
) -> dict[str, Any]:
    """Load into a living model, or create one from the checkpoint."""
    runs = context.runs
    if not body.creates:
        assert body.model_id is not None and body.seq_id is not None

        def encoded() -> bytes:
            key = _key(body.path)
            return bodies.Load(
                run=key.run,
                segment=key.kind,
                name=key.name,
                optimizer=body.optimizer,
                readers=_readers(context, owner, body.weights_access_token),
            ).encode()

        return await submit(runs, owner, body.model_id, body.seq_id, bodies.LOAD_WEIGHTS, encoded)
    assert body.session_id is not None and body.model_seq_id is not None
    session = await runs.sessions.live(body.session_id, owner)
    key = _key(body.path)
    creation = bodies.CreateFromState(
        run=key.run,
        segment=key.kind,
        name=key.name,
        optimizer=body.optimizer,
        readers=_readers(context, owner, body.weights_access_token),
        base_model=body.base_model,
        optimizer_type=None
        if body.optimizer_config is None
        else check_optimizer(body.optimizer_config),
    )
    run = await runs.create_from_state(
        session,
        body.model_seq_id,
        creation,
        user_metadata=body.user_metadata,
        idempotency_key=idempotency_key(request),
    )
    return FutureHandle(request_id=run.key.request_id(0), model_id=run.key.id).to_json()


@router.post("/copy_weights")
async def copy_weights(
    body: CopyWeightsRequest, request: Request, owner: OwnerDep, context: ContextDep
) -> dict[str, Any]:
    """Copy a checkpoint into a run of its own; no bytes are moved."""
    runs = context.runs
    destination = None
    if body.session_id is not None and body.model_seq_id is not None:
        session = await runs.sessions.live(body.session_id, owner)
        destination = Destination(session, body.model_seq_id)
    token = request.headers.get("x-tinker-weights-access-token")
    copied = await runs.copies.copy(
        _key(body.source_path),
        owner,
        _readers(context, owner, token),
        destination=destination,
        project_id=body.destination_project_id,
        ttl_seconds=body.ttl_seconds,
        idempotency_key=idempotency_key(request),
    )
    return CopyWeightsResponse(tinker_path=f"tinker://{copied}").to_json()


@router.post("/weights_info")
async def weights_info(body: WeightsInfoRequest, owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    _, manifest = await runs.checkpoints.resolve(_key(body.tinker_path), [owner])
    metadata = manifest.user_metadata
    return WeightsInfoResponse(
        base_model=manifest.base_model,
        is_lora=True,
        lora_rank=manifest.lora.rank,
        train_attn=manifest.lora.train_attn,
        train_mlp=manifest.lora.train_mlp,
        train_unembed=manifest.lora.train_unembed,
        optimizer_config=OptimizerConfig(type=manifest.optimizer or "adamw"),
        step=manifest.step,
        pending_forward_backwards=manifest.pending_forward_backwards,
        has_optimizer=OPTIMIZER_STATE in manifest.files,
        user_metadata=None if metadata is None else dict(metadata),
    ).to_json()


@router.get("/checkpoints")
async def list_all(
    owner: OwnerDep,
    runs: RunsDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> dict[str, Any]:
    rows, total = await runs.checkpoints.page(owner, offset=offset, limit=limit)
    return CheckpointsListResponse(
        checkpoints=[as_wire(row) for row in rows],
        cursor=Cursor(offset=offset, limit=limit, total_count=total),
    ).to_json()


@router.get("/training_runs/{run_id}/checkpoints")
async def list_of_run(run_id: str, owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    rows, _ = await runs.checkpoints.page(owner, run_id=run_id)
    if not rows:
        await runs.record(run_id, owner)
    return CheckpointsListResponse(checkpoints=[as_wire(row) for row in rows]).to_json()


@router.post("/checkpoints/delete")
async def delete_many(
    body: DeleteCheckpointsRequest, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    """Delete each; what cannot be deleted does not keep the others."""
    deleted: list[str] = []
    failed: dict[str, str] = {}
    for path in dict.fromkeys(body.tinker_paths):
        try:
            await runs.checkpoints.delete(_key(path), owner)
            deleted.append(path)
        except (RunError, InvalidPathError) as error:
            failed[path] = error.message
    return DeleteCheckpointsResponse(deleted=deleted, failed=failed).to_json()


@router.get(ONE)
async def info(
    run_id: str, segment: Segment, name: str, owner: OwnerDep, runs: RunsDep
) -> dict[str, Any]:
    key = named(run_id, segment, name)
    manifest_id, manifest = await runs.checkpoints.resolve(key, [owner])
    return _info(key, manifest_id, manifest, await runs.checkpoints.own_size(key)).to_json()


@router.delete(ONE, status_code=204)
async def delete(
    run_id: str, segment: Segment, name: str, owner: OwnerDep, runs: RunsDep
) -> Response:
    await runs.checkpoints.delete(named(run_id, segment, name), owner)
    return Response(status_code=204)


@router.post(ONE + "/publish", status_code=204)
async def publish(
    run_id: str, segment: Segment, name: str, owner: OwnerDep, runs: RunsDep
) -> Response:
    """Idempotent: clients repeat a 409 for minutes."""
    await runs.checkpoints.set_public(named(run_id, segment, name), owner, True)
    return Response(status_code=204)


@router.delete(ONE + "/publish", status_code=204)
async def unpublish(
    run_id: str, segment: Segment, name: str, owner: OwnerDep, runs: RunsDep
) -> Response:
    await runs.checkpoints.set_public(named(run_id, segment, name), owner, False)
    return Response(status_code=204)


@router.put(ONE + "/ttl", status_code=204)
async def set_ttl(
    run_id: str, segment: Segment, name: str, body: SetTtlRequest, owner: OwnerDep, runs: RunsDep
) -> Response:
    await runs.checkpoints.set_ttl(named(run_id, segment, name), owner, body.ttl_seconds)
    return Response(status_code=204)


def as_wire(row: Row) -> Checkpoint:
    """An index row as it is listed."""
    path = CheckpointPath.of(row.run_id, row.kind, row.name)
    return Checkpoint(
        checkpoint_id=path.checkpoint_id,
        checkpoint_type=path.checkpoint_type,
        time=as_time(row.created),
        tinker_path=str(path),
        size_bytes=row.size,
        public=row.public,
        user_metadata=None if row.user_metadata is None else dict(row.user_metadata),
        expires_at=None if row.expires is None else as_time(row.expires),
        step=row.step,
        own_bytes=row.own_size,
    )


def _info(key: NameKey, manifest_id: str, manifest: Manifest, own: int) -> CheckpointInfo:
    path = CheckpointPath.of(key.run, key.kind, key.name)
    metadata, lora, mark = manifest.user_metadata, manifest.lora, manifest.incomplete
    return CheckpointInfo(
        checkpoint_id=path.checkpoint_id,
        checkpoint_type=path.checkpoint_type,
        time=as_time(manifest.created),
        tinker_path=str(path),
        size_bytes=manifest.size,
        public=manifest.public,
        user_metadata=None if metadata is None else dict(metadata),
        expires_at=None if manifest.expires is None else as_time(manifest.expires),
        step=manifest.step,
        own_bytes=own,
        manifest=manifest_id,
        owner=manifest.owner,
        base_model=manifest.base_model,
        base_revision=manifest.base_revision,
        lora_rank=lora.rank,
        lora_alpha=lora.alpha,
        train_attn=lora.train_attn,
        train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
        optimizer=manifest.optimizer,
        pending_forward_backwards=manifest.pending_forward_backwards,
        incomplete=None if mark is None else mark.message,
        parent=manifest.parent,
        files={
            file: CheckpointFile(size=blob.size, hash=blob.hash)
            for file, blob in sorted(manifest.files.items())
        },
    )


def as_time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _key(text: str) -> NameKey:
    path = CheckpointPath.parse(text)
    return NameKey(path.run_id, path.kind, path.name)


def named(run_id: str, segment: str, name: str) -> NameKey:
    """The key of a checkpoint that is addressed by the parts of a path."""
    path = CheckpointPath.of(run_id, segment, name)
    return NameKey(path.run_id, path.kind, path.name)


def _readers(context: Context, owner: str, token: str | None) -> list[str]:
    """On whose behalf a checkpoint is read. The token itself goes no further."""
    return [owner] if token is None else [owner, context.keys.owner(token)]
