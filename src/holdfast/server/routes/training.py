"""Training operations: forward, forward_backward, optim_step."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from holdfast.protocol.batches import BatchRequest, read_large_json
from holdfast.protocol.bodies import read_json
from holdfast.protocol.errors import HoldfastError, InvalidMessageError
from holdfast.protocol.training import AdamParams, OptimStepRequest
from holdfast.runs import bodies
from holdfast.runs.errors import RunError
from holdfast.runs.service import ELIXIR
from holdfast.server.context import FamilyDep, OwnerDep, RunsDep
from holdfast.server.submit import (
    IN_A_THREAD,
    address_in_json,
    address_in_protobuf,
    refuse_unread,
    submit,
)
from holdfast.server.translate import batch_body

router = APIRouter()


@router.post("/forward_backward")
async def forward_backward(
    request: Request, owner: OwnerDep, runs: RunsDep, family: FamilyDep
) -> dict[str, Any]:
    """A batch, in protobuf (which may also be a forward) or JSON."""
    return await _submit_batch(request, owner, runs, family, bodies.FORWARD_BACKWARD)


@router.post("/forward")
async def forward(
    request: Request, owner: OwnerDep, runs: RunsDep, family: FamilyDep
) -> dict[str, Any]:
    """A batch in JSON, as older clients send it."""
    return await _submit_batch(request, owner, runs, family, bodies.FORWARD)


async def _submit_batch(
    request: Request, owner: str, runs: RunsDep, family: str, kind: str
) -> dict[str, Any]:
    data = await request.body()
    read = partial(_read_batch, data, request.headers, forward_only=kind == bodies.FORWARD)
    try:
        batch = await asyncio.to_thread(read) if len(data) > IN_A_THREAD else read()
    except _Unread as unread:
        await refuse_unread(runs, owner, kind, unread.address, unread.error)
        raise unread.error from None
    if batch.forward_only:
        kind = bodies.FORWARD

    def body() -> bytes:
        # The Elixir client begins with an empty chunk when its first datum is a large one.
        if not batch.data and family != ELIXIR:
            raise RunError("empty_batch", "the batch has no data; send at least one datum")
        return batch_body(batch)

    return await submit(runs, owner, batch.model_id, batch.seq_id, kind, body, size=len(data))


class _Unread(Exception):
    """A body that is no batch, and whose it is as far as that can be told."""

    def __init__(self, error: HoldfastError, address: tuple[str, int] | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.address = address


def _read_batch(data: bytes, headers: Mapping[str, str], *, forward_only: bool) -> BatchRequest:
    """Raises _Unread. What is read in a thread lets others have their turn."""
    is_protobuf = "protobuf" in headers.get("content-type", "")
    parsed: Any = None
    try:
        if (encoding := headers.get("content-encoding", "identity")) != "identity":
            raise InvalidMessageError(
                f"content-encoding {encoding!r} is not taken here; send the body as it is"
            )
        if is_protobuf:
            return BatchRequest.from_protobuf(data)
        parsed = read_large_json(data) if len(data) > IN_A_THREAD else read_json(data)
        return BatchRequest.from_json(parsed, forward_only=forward_only)
    except HoldfastError as error:
        address = address_in_protobuf(data) if is_protobuf else address_in_json(parsed)
        raise _Unread(error, address) from None


@router.post("/optim_step")
async def optim_step(body: OptimStepRequest, owner: OwnerDep, runs: RunsDep) -> dict[str, Any]:
    def encoded() -> bytes:
        if body.optimizer_params is not None:
            raise RunError(
                "wrong_optimizer_params",
                f"optimizer_params of type {body.optimizer_params.type!r} for a model that is "
                "trained with adamw; send adam_params",
            )
        params = body.adam_params or AdamParams()
        return bodies.OptimStep(**{k: float(v) for k, v in params.model_dump().items()}).encode()

    return await submit(runs, owner, body.model_id, body.seq_id, bodies.OPTIM_STEP, encoded)
