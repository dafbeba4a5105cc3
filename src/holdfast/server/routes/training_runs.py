"""Training runs, listed."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from holdfast.protocol.checkpoints import Cursor
from holdfast.protocol.rest import RunSnapshot, RunStatus, TrainingRun, TrainingRunsResponse
from holdfast.runs.service import RunRecord
from holdfast.runs.service import RunStatus as Status
from holdfast.server.context import OwnerDep, RunsDep
from holdfast.server.routes.checkpoints import as_time, as_wire

router = APIRouter()


@router.get("/training_runs")
async def list_runs(
    owner: OwnerDep,
    runs: RunsDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> dict[str, Any]:
    records, total = await runs.page(owner, offset=offset, limit=limit)
    return TrainingRunsResponse(
        training_runs=await _as_wire(runs, records),
        cursor=Cursor(offset=offset, limit=limit, total_count=total),
    ).to_json()


@router.get("/training_runs/{run_id}")
async def get_run(run_id: str, owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    (run,) = await _as_wire(runs, [await runs.record(run_id, owner)])
    return run.to_json()


async def _as_wire(runs: RunsDep, records: list[RunRecord]) -> list[TrainingRun]:
    ids = [record.key.id for record in records]
    training = await runs.checkpoints.newest(ids, "weights")
    sampling = await runs.checkpoints.newest(ids, "sampler_weights")
    statuses = await runs.statuses(records)
    found = []
    for record in records:
        last, last_sampler = training.get(record.key.id), sampling.get(record.key.id)
        found.append(
            TrainingRun(
                training_run_id=record.key.id,
                base_model="" if record.config is None else record.config.base_model,
                model_owner=record.owner,
                is_lora=True,
                lora_rank=None if record.config is None else record.config.lora.rank,
                last_request_time=as_time(record.last_request),
                corrupted=record.corrupted,
                last_checkpoint=None if last is None else as_wire(last),
                last_sampler_checkpoint=None if last_sampler is None else as_wire(last_sampler),
                user_metadata=record.user_metadata,
                status=_status(record, statuses[record.key]),
            )
        )
    return found


def _status(record: RunRecord, status: Status) -> RunStatus:
    snapshot = status.snapshot
    return RunStatus(
        state=status.state,
        position=status.position,
        pending=status.pending,
        snapshot=None
        if snapshot is None
        else RunSnapshot(position=snapshot[0], time=as_time(snapshot[1])),
        recoveries=record.recoveries,
        replayed=record.replayed,
        divergences=record.divergences,
        diverged_at=record.diverged_at,
        note=status.note,
    )
