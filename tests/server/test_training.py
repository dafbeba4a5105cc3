"""How submissions of batches are read: large ones beside what the server does otherwise."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
from starlette.requests import Request
from starlette.types import Message

from holdfast.protocol.batches import BatchRequest
from holdfast.protocol.errors import InvalidMessageError
from holdfast.runs.errors import RunError
from holdfast.runs.journal import Failure
from holdfast.runs.service import Runs
from holdfast.server.routes.training import forward_backward
from holdfast.server.submit import IN_A_THREAD

DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    "loss_fn_inputs": {"target_tokens": {"data": [2, 3, 4], "dtype": "int64"}},
}
LARGE = 4 * IN_A_THREAD // len(json.dumps(DATUM))
"""Data of a batch that is a large body, in protobuf too."""


class NoRuns:
    """Knows one model, takes nothing, and notes what it is told to refuse."""

    def __init__(self) -> None:
        self.refused: list[tuple[int, str]] = []

    async def live(self, model_id: str, owner: str) -> NoRuns:
        if model_id != "known":
            raise RunError("model_not_found", "there is none", reason="not_found")
        return self

    async def refuse(self, seq: int, kind: str, failure: Failure) -> None:
        self.refused.append((seq, failure.message))

    async def refused_without_number(self, owner: str) -> None:
        self.refused.append((-1, ""))


def batch(*data: Any, model: str = "unknown") -> dict[str, Any]:
    wrapped = {"data": list(data), "loss_fn": "cross_entropy"}
    return {"model_id": model, "seq_id": 7, "forward_backward_input": wrapped}


async def submit(body: bytes, content_type: str = "application/json") -> tuple[NoRuns, Exception]:
    """What is refused, and how it is answered."""
    runs = NoRuns()

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "headers": [(b"content-type", content_type.encode())]}
    with pytest.raises((RunError, InvalidMessageError)) as caught:
        await forward_backward(Request(scope, receive), "local", cast(Runs, runs), "python")
    return runs, caught.value


@pytest.fixture
def read_in(monkeypatch: pytest.MonkeyPatch) -> set[threading.Thread]:
    """The threads in which batches are read."""
    found: set[threading.Thread] = set()

    def noting(honest: Callable[..., BatchRequest]) -> Callable[..., BatchRequest]:
        def read(*args: Any, **others: Any) -> BatchRequest:
            found.add(threading.current_thread())
            return honest(*args, **others)

        return read

    for name in ("from_json", "from_protobuf"):
        monkeypatch.setattr(BatchRequest, name, noting(getattr(BatchRequest, name)))
    return found


@pytest.mark.anyio
@pytest.mark.parametrize("protobuf", [False, True])
@pytest.mark.parametrize("data", [1, LARGE])
async def test_a_large_batch_is_read_beside_the_loop(
    read_in: set[threading.Thread], protobuf: bool, data: int
) -> None:
    body = batch(*[DATUM] * data)
    if protobuf:
        message = BatchRequest.from_json(body, forward_only=False).to_protobuf()
        read_in.clear()
        _, error = await submit(message, "application/x-protobuf")
    else:
        _, error = await submit(json.dumps(body).encode())
    assert isinstance(error, RunError) and error.code == "model_not_found"  # it was read
    (thread,) = read_in
    assert (thread is threading.current_thread()) is (data == 1)


@pytest.mark.anyio
@pytest.mark.parametrize("data", [1, LARGE])
async def test_what_is_wrong_in_a_batch_is_named_and_settles_its_number(data: int) -> None:
    wrong = {**DATUM, "model_input": {"chunks": [{"type": "unheard of"}]}}
    runs, error = await submit(json.dumps(batch(*[DATUM] * data, wrong, model="known")).encode())
    assert str(error).startswith(f"datum {data}: ") and "unheard of" in str(error)
    assert runs.refused == [(7, str(error))]
