"""Submitting an operation: a definite refusal settles its number before it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from holdfast.protocol import tinker_public_pb2 as pb
from holdfast.protocol.errors import HoldfastError
from holdfast.runs.errors import RunError, Unavailable
from holdfast.runs.journal import Failure
from holdfast.runs.service import Runs

IN_A_THREAD = 256 << 10
"""Bytes of a body from which on it is read in a thread, so that other requests are answered."""


async def submit(
    runs: Runs,
    owner: str,
    model_id: str,
    seq_id: int,
    kind: str,
    body: Callable[[], bytes],
    *,
    size: int = 0,
) -> dict[str, Any]:
    """Journal an operation and answer its request id.

    `body` makes the journaled bytes; what it refuses is refused for good, so the number is settled
    and the run does not wait for it.
    """
    run = await runs.live(model_id, owner)
    try:
        encoded = await asyncio.to_thread(body) if size > IN_A_THREAD else body()
    except (RunError, HoldfastError) as error:
        if not isinstance(error, Unavailable):
            await run.refuse(seq_id, kind, Failure(error.code, error.message))
        raise
    request_id = await run.submit(seq_id, kind, encoded)
    return {"request_id": request_id, "model_id": model_id}  # a FutureHandle


async def refuse_unread(
    runs: Runs, owner: str, kind: str, address: tuple[str, int] | None, error: HoldfastError
) -> None:
    """A submission that could not be read is about to be refused.

    Where its model and number can be told, the number is settled; otherwise the owner's runs are
    told to wait less long for missing numbers. Raises Unavailable when it may not be refused now.
    """
    if address is None:
        await runs.refused_without_number(owner)
        return
    model_id, seq_id = address
    try:
        run = await runs.live(model_id, owner)
    except Unavailable:
        raise
    except RunError:
        return
    await run.refuse(seq_id, kind, Failure(error.code, error.message))


def address_in_json(body: Any) -> tuple[str, int] | None:
    """Model and number of a JSON body that is not of the right form otherwise."""
    if not isinstance(body, dict):
        return None
    model_id, seq_id = body.get("model_id"), body.get("seq_id")
    if isinstance(model_id, str) and type(seq_id) is int and 1 <= seq_id < 1 << 63:
        return model_id, seq_id
    return None


def address_in_protobuf(body: bytes) -> tuple[str, int] | None:
    """Model and number of a protobuf body whose tensors do not hold together."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except (DecodeError, RecursionError):
        return None
    if message.model_id and message.seq_id >= 1:
        return message.model_id, message.seq_id
    return None
