"""The result of a sampling operation, in protobuf and in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.message import DecodeError

from holdfast.protocol import tinker_public_pb2 as pb
from holdfast.protocol.errors import InvalidMessageError
from holdfast.protocol.tensors import Tensor, finite

StopReason = Literal["stop", "length"]
FILLER_LOGPROB = -99999.0

_TO_WIRE: dict[StopReason, pb.StopReason] = {
    "stop": pb.STOP_REASON_STOP,
    "length": pb.STOP_REASON_LENGTH,
}
_FROM_WIRE: dict[int, StopReason] = {int(number): reason for reason, number in _TO_WIRE.items()}


@dataclass(frozen=True, slots=True)
class TopK:
    """Per position the k likeliest tokens; filler is token 0 at -99999."""

    tokens: Tensor
    """int32 [L, k]"""
    logprobs: Tensor
    """float32 [L, k]"""

    def rows(self) -> list[list[tuple[int, float]] | None]:
        """Per position the (token, logprob) pairs without filler; None where there are none."""
        k = self.tokens.shape[1]
        pairs = list(zip(self.tokens.values(), self.logprobs.values(), strict=True))
        rows: list[list[tuple[int, float]] | None] = []
        for start in range(0, len(pairs), k or 1):
            row = [pair for pair in pairs[start : start + k] if pair[1] > FILLER_LOGPROB]
            rows.append(row or None)
        return rows


@dataclass(frozen=True, slots=True)
class SampledSequence:
    tokens: Tensor
    """int32 [L], the stop token included when one ended it."""
    stop_reason: StopReason
    logprobs: Tensor | None = None
    """float32 [L]"""
    topk: TopK | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    sequences: Sequence[SampledSequence]
    prompt_logprobs: Tensor | None = None
    """float32 [N], NaN where there is none (always the first)."""
    topk_prompt_logprobs: TopK | None = None
    target_prompt_logprobs: Tensor | None = None
    """float32, in the shape and layout of the request's tensor."""
    prompt_alt_tokens: Tensor | None = None
    """int64 or int32 [N - 1, k], together with prompt_alt_logprobs."""
    prompt_alt_logprobs: Tensor | None = None
    """float32 [N - 1, k]"""
    prompt_cache_hit_tokens: int = 0

    def to_protobuf(self) -> bytes:
        """A SampleResponse."""
        message = pb.SampleResponse(prompt_cache_hit_tokens=self.prompt_cache_hit_tokens)
        for sequence in self.sequences:
            item = message.sequences.add()
            item.stop_reason = _TO_WIRE[sequence.stop_reason]
            item.tokens = _vector(sequence.tokens, "int32", "tokens")
            if sequence.logprobs is not None:
                item.logprobs = _vector(sequence.logprobs, "float32", "logprobs")
            if sequence.topk is not None:
                _write_topk(sequence.topk, item.topk_sampled_logprobs)
        if self.prompt_logprobs is not None:
            message.prompt_logprobs = _vector(self.prompt_logprobs, "float32", "prompt_logprobs")
        if self.topk_prompt_logprobs is not None:
            _write_topk(self.topk_prompt_logprobs, message.topk_prompt_logprobs)
        if self.target_prompt_logprobs is not None:
            self.target_prompt_logprobs.write_protobuf(message.target_prompt_logprobs)
        if self.prompt_alt_tokens is not None and self.prompt_alt_logprobs is not None:
            self.prompt_alt_tokens.write_protobuf(message.prompt_alt_tokens.tokens)
            self.prompt_alt_logprobs.write_protobuf(message.prompt_alt_tokens.logprobs)
        return message.SerializeToString(deterministic=True)

    @classmethod
    def from_protobuf(cls, data: bytes) -> SampleResult:
        """Read a SampleResponse. Raises InvalidMessageError or InvalidTensorError."""
        message = pb.SampleResponse()
        try:
            message.ParseFromString(data)
        except (DecodeError, RecursionError) as error:
            raise InvalidMessageError(
                f"the body is not a SampleResponse message: {error}"
            ) from None
        alternatives = message.HasField("prompt_alt_tokens")
        return cls(
            sequences=[_read_sequence(item) for item in message.sequences],
            prompt_logprobs=(
                _read_vector(message.prompt_logprobs, "float32")
                if message.HasField("prompt_logprobs")
                else None
            ),
            topk_prompt_logprobs=(
                _read_topk(message.topk_prompt_logprobs)
                if message.HasField("topk_prompt_logprobs")
                else None
            ),
            target_prompt_logprobs=(
                Tensor.from_protobuf(message.target_prompt_logprobs)
                if message.HasField("target_prompt_logprobs")
                else None
            ),
            prompt_alt_tokens=(
                Tensor.from_protobuf(message.prompt_alt_tokens.tokens) if alternatives else None
            ),
            prompt_alt_logprobs=(
                Tensor.from_protobuf(message.prompt_alt_tokens.logprobs) if alternatives else None
            ),
            prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON twin, with `type`, by which some clients know a result."""
        body: dict[str, Any] = {"type": "sample", "sequences": []}
        for sequence in self.sequences:
            item: dict[str, Any] = {
                "tokens": sequence.tokens.values(),
                "stop_reason": sequence.stop_reason,
            }
            if sequence.logprobs is not None:
                item["logprobs"] = finite(sequence.logprobs.values())
            if sequence.topk is not None:
                item["topk_logprobs"] = sequence.topk.rows()
            body["sequences"].append(item)
        if self.prompt_logprobs is not None:
            body["prompt_logprobs"] = finite(self.prompt_logprobs.values())
        if self.topk_prompt_logprobs is not None:
            body["topk_prompt_logprobs"] = self.topk_prompt_logprobs.rows()
        if self.target_prompt_logprobs is not None:
            body["target_prompt_logprobs"] = self.target_prompt_logprobs.to_result_json()
        if self.prompt_alt_tokens is not None and self.prompt_alt_logprobs is not None:
            body["prompt_alt_tokens"] = {
                "tokens": self.prompt_alt_tokens.to_json(),
                "logprobs": self.prompt_alt_logprobs.to_result_json(),
            }
        return body

    @classmethod
    def from_json(cls, body: object) -> SampleResult:
        """Read the JSON twin: its sequences, prompt_logprobs and topk_prompt_logprobs."""
        listed = body.get("sequences") if isinstance(body, Mapping) else None
        if not isinstance(body, Mapping) or not isinstance(listed, list):
            raise InvalidMessageError("a sample result has a list of sequences")
        prompt = body.get("prompt_logprobs")
        topk = body.get("topk_prompt_logprobs")
        return cls(
            sequences=[_sequence_from_json(item) for item in listed],
            prompt_logprobs=None if prompt is None else _logprobs_from_json(prompt),
            topk_prompt_logprobs=None if topk is None else _topk_from_json(topk),
        )


def _vector(tensor: Tensor, dtype: str, name: str) -> bytes:
    if tensor.dtype != dtype or len(tensor.shape) != 1 or tensor.csr is not None:
        raise InvalidMessageError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}: {dtype} of one dimension is expected"
        )
    return tensor.data


def _read_vector(data: bytes, dtype: Literal["int32", "float32"]) -> Tensor:
    return Tensor(dtype, (len(data) // 4,), data)


def _read_sequence(item: pb.SampledSequence) -> SampledSequence:
    if item.stop_reason not in _FROM_WIRE:
        raise InvalidMessageError(f"stop_reason {item.stop_reason}: 0 stop, 1 length")
    return SampledSequence(
        tokens=_read_vector(item.tokens, "int32"),
        stop_reason=_FROM_WIRE[item.stop_reason],
        logprobs=_read_vector(item.logprobs, "float32") if item.HasField("logprobs") else None,
        topk=(
            _read_topk(item.topk_sampled_logprobs)
            if item.HasField("topk_sampled_logprobs")
            else None
        ),
    )


def _write_topk(topk: TopK, message: pb.TopkLogprobs) -> None:
    if topk.tokens.shape != topk.logprobs.shape or len(topk.tokens.shape) != 2:
        raise InvalidMessageError(
            f"top-k tokens {list(topk.tokens.shape)} and logprobs {list(topk.logprobs.shape)}:"
            " both are [length, k]"
        )
    message.length, message.k = topk.tokens.shape
    message.token_ids = topk.tokens.data
    message.logprobs = topk.logprobs.data


def _read_topk(message: pb.TopkLogprobs) -> TopK:
    shape = (message.length, message.k)
    return TopK(
        Tensor("int32", shape, message.token_ids), Tensor("float32", shape, message.logprobs)
    )


def _sequence_from_json(item: object) -> SampledSequence:
    if not isinstance(item, Mapping) or not isinstance(item.get("tokens"), list):
        raise InvalidMessageError("a sampled sequence has a list of tokens")
    reason = item.get("stop_reason", "stop")
    for known in _TO_WIRE:
        if reason == known:
            break
    else:
        raise InvalidMessageError(f"stop_reason {reason!r:.80}: stop or length")
    logprobs = item.get("logprobs")
    topk = item.get("topk_logprobs")
    return SampledSequence(
        tokens=Tensor.of(item["tokens"], "int32"),
        stop_reason=known,
        logprobs=None if logprobs is None else _logprobs_from_json(logprobs),
        topk=None if topk is None else _topk_from_json(topk),
    )


def _logprobs_from_json(values: object) -> Tensor:
    if not isinstance(values, list):
        raise InvalidMessageError(f"logprobs: a list is expected, not {values!r:.80}")
    return Tensor.of([math.nan if v is None else v for v in values], "float32")


def _topk_from_json(rows: object) -> TopK:
    if not isinstance(rows, list):
        raise InvalidMessageError(f"top-k: a list is expected, not {rows!r:.80}")
    pairs: list[list[Any]] = [row or [] for row in rows]
    if not all(isinstance(row, list) for row in pairs) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for row in pairs for pair in row
    ):
        raise InvalidMessageError("top-k: lists of [token, logprob] pairs are expected")
    k = max((len(row) for row in pairs), default=0)
    filled = [row + [(0, FILLER_LOGPROB)] * (k - len(row)) for row in pairs]
    shape = (len(rows), k)
    return TopK(
        Tensor.of([pair[0] for row in filled for pair in row], "int32", shape),
        Tensor.of([pair[1] for row in filled for pair in row], "float32", shape),
    )
