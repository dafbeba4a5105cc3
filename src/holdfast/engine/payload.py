"""The bytes of batches and results, as journaled and as sent to a worker.

Each is one safetensors document: tensors by name, everything else as one JSON text in the
document's metadata. Equal content gives equal bytes, so a body's hash identifies it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

Array = npt.NDArray[Any]


class Stored(NamedTuple):
    """A tensor as a document has it."""

    code: str
    """Of its type, in safetensors: F32, I64, …"""
    shape: tuple[int, ...]
    data: bytes
    """Little-endian, in row-major order."""


class PayloadError(ValueError):
    """Bytes that are not a document of the expected format."""


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence to train on."""

    tokens: Array
    """int32 [N], the model's input."""
    inputs: Mapping[str, Array]
    """Loss function inputs, e.g. target_tokens int64 [N] or [N, K] and weights float32 alike."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The body of a forward or forward_backward."""

    data: Sequence[Datum]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str] = field(default_factory=dict)

    def encode(self) -> bytes:
        rows = [
            (_stored("tokens", d.tokens), {n: _stored(n, value) for n, value in d.inputs.items()})
            for d in self.data
        ]
        return encode_batch(rows, self.loss_fn, self.loss_fn_config)

    @classmethod
    def decode(cls, data: bytes) -> Batch:
        """Raises PayloadError."""
        meta, tensors = _decode("holdfast.batch.1", data)
        with _well_formed("holdfast.batch.1"):
            rows = _by_index(meta["count"], tensors)
            return cls(
                data=[
                    Datum(
                        row.pop("tokens"),
                        {_without("inputs.", name): value for name, value in row.items()},
                    )
                    for row in rows
                ],
                loss_fn=meta["loss_fn"],
                loss_fn_config=dict(meta["loss_fn_config"]),
            )


def encode_batch(
    data: Sequence[tuple[Stored, Mapping[str, Stored]]],
    loss_fn: str,
    loss_fn_config: Mapping[str, float | str],
) -> bytes:
    """The bytes of a `Batch`, from each datum's tokens and inputs as they are stored."""
    tensors: dict[str, Stored] = {}
    for i, (tokens, inputs) in enumerate(data):
        tensors[f"{i}.tokens"] = tokens
        for name, value in inputs.items():
            tensors[f"{i}.inputs.{name}"] = value
    if loss_fn_config or len(loss_fn) > _LONGEST_REMEMBERED:
        meta = _batch_meta(len(data), loss_fn, loss_fn_config)
    else:
        meta = _plain_batch_meta(len(data), loss_fn)
    return _encode(meta, tensors)


_LONGEST_REMEMBERED = 64
"""Characters of a loss function's name; more than any has."""


def _batch_meta(count: int, loss_fn: str, config: Mapping[str, float | str]) -> str:
    meta = {"count": count, "loss_fn": loss_fn, "loss_fn_config": dict(config)}
    return _meta("holdfast.batch.1", meta)


@lru_cache(maxsize=256)
def _plain_batch_meta(count: int, loss_fn: str) -> str:
    """A loop's batches are alike in this."""
    return _batch_meta(count, loss_fn, {})


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """The result of a forward or forward_backward."""

    outputs: Sequence[Mapping[str, Array]]
    """Per datum; every loss gives `logprobs`, float32, in the shape of its target_tokens."""
    metrics: Mapping[str, float]
    """Names end in their reduction over chunks, `loss:sum`; the same names for every batch."""

    def encode(self) -> bytes:
        tensors = {
            f"{i}.{name}": value
            for i, output in enumerate(self.outputs)
            for name, value in output.items()
        }
        meta = {"count": len(self.outputs), "metrics": dict(self.metrics)}
        return _encode_arrays("holdfast.forward.1", meta, tensors)

    @classmethod
    def decode(cls, data: bytes) -> ForwardOutput:
        """Raises PayloadError."""
        meta, tensors = _decode("holdfast.forward.1", data)
        with _well_formed("holdfast.forward.1"):
            return cls(_by_index(meta["count"], tensors), dict(meta["metrics"]))


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """The body of a sampling operation; each field means what it means on the wire."""

    prompt: Array
    """int32 [N]"""
    num_samples: int = 1
    max_tokens: int | None = None
    """None: up to the model's context."""
    seed: int | None = None
    """The server draws one when the client gave none, so that a body fixes its result."""
    stop: Sequence[str] | Sequence[int] | None = None
    """None: the model's end-of-sequence token; empty: no stop at all."""
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    target_prompt_tokens: Array | None = None
    """int64 [N-1, K], -1 where nothing is asked; row i scores position i + 1."""

    def encode(self) -> bytes:
        tensors: dict[str, Array] = {"prompt": self.prompt}
        if self.target_prompt_tokens is not None:
            tensors["target_prompt_tokens"] = self.target_prompt_tokens
        meta = {name: getattr(self, name) for name in self.__slots__ if name not in _SAMPLE_TENSORS}
        meta["stop"] = None if self.stop is None else list(self.stop)
        return _encode_arrays("holdfast.sample_request.1", meta, tensors)

    @classmethod
    def decode(cls, data: bytes) -> SampleRequest:
        """Raises PayloadError."""
        meta, tensors = _decode("holdfast.sample_request.1", data)
        with _well_formed("holdfast.sample_request.1"):
            return cls(
                prompt=tensors["prompt"],
                target_prompt_tokens=tensors.get("target_prompt_tokens"),
                **meta,
            )


_SAMPLE_TENSORS = ("prompt", "target_prompt_tokens")


@dataclass(frozen=True, slots=True)
class TopK:
    """Per position the k likeliest tokens; filler is token 0 with log-probability -99999."""

    tokens: Array
    """int32 [L, k]"""
    logprobs: Array
    """float32 [L, k]"""


@dataclass(frozen=True, slots=True)
class SampledSequence:
    tokens: Array
    """int32 [L], the stop token included when one ended it."""
    logprobs: Array
    """float32 [L], under temperature 1, the model's own distribution."""
    stop_reason: str
    """"stop" or "length"."""
    topk: TopK | None = None


@dataclass(frozen=True, slots=True)
class SampleOutput:
    sequences: Sequence[SampledSequence]
    prompt_logprobs: Array | None = None
    """float32 [N], NaN where there is none (always the first)."""
    topk_prompt: TopK | None = None
    target_prompt_logprobs: Array | None = None
    """float32 [N-1, K], NaN where nothing was asked."""
    prompt_alt: TopK | None = None
    """Alternatives sampled at the request's temperature, per prompt position."""

    def encode(self) -> bytes:
        tensors: dict[str, Array] = {}
        for i, sequence in enumerate(self.sequences):
            tensors[f"{i}.tokens"] = sequence.tokens
            tensors[f"{i}.logprobs"] = sequence.logprobs
            _put_topk(tensors, f"{i}.topk", sequence.topk)
        if self.prompt_logprobs is not None:
            tensors["prompt_logprobs"] = self.prompt_logprobs
        if self.target_prompt_logprobs is not None:
            tensors["target_prompt_logprobs"] = self.target_prompt_logprobs
        _put_topk(tensors, "topk_prompt", self.topk_prompt)
        _put_topk(tensors, "prompt_alt", self.prompt_alt)
        meta = {"stop_reasons": [s.stop_reason for s in self.sequences]}
        return _encode_arrays("holdfast.sample.1", meta, tensors)

    @classmethod
    def decode(cls, data: bytes) -> SampleOutput:
        """Raises PayloadError."""
        meta, tensors = _decode("holdfast.sample.1", data)
        with _well_formed("holdfast.sample.1"):
            return cls(
                sequences=[
                    SampledSequence(
                        tensors[f"{i}.tokens"],
                        tensors[f"{i}.logprobs"],
                        reason,
                        _get_topk(tensors, f"{i}.topk"),
                    )
                    for i, reason in enumerate(meta["stop_reasons"])
                ],
                prompt_logprobs=tensors.get("prompt_logprobs"),
                target_prompt_logprobs=tensors.get("target_prompt_logprobs"),
                topk_prompt=_get_topk(tensors, "topk_prompt"),
                prompt_alt=_get_topk(tensors, "prompt_alt"),
            )


def _by_index(count: int, tensors: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Tensors named `index.name` as one mapping per index."""
    rows: list[dict[str, Array]] = [{} for _ in range(count)]
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not (index.isdecimal() and int(index) < count and name):
            raise ValueError(f"the tensor {key!r} belongs to none of {count} entries")
        rows[int(index)][name] = value
    return rows


def _without(prefix: str, name: str) -> str:
    if not name.startswith(prefix):
        raise ValueError(f"the tensor name {name!r} does not begin with {prefix!r}")
    return name.removeprefix(prefix)


def _put_topk(tensors: dict[str, Array], key: str, value: TopK | None) -> None:
    if value is not None:
        tensors[f"{key}.tokens"] = value.tokens
        tensors[f"{key}.logprobs"] = value.logprobs


def _get_topk(tensors: Mapping[str, Array], key: str) -> TopK | None:
    if f"{key}.tokens" not in tensors:
        return None
    return TopK(tensors[f"{key}.tokens"], tensors[f"{key}.logprobs"])


@contextmanager
def _well_formed(kind: str) -> Iterator[None]:
    """Turn what goes wrong with a document's structure into PayloadError."""
    try:
        yield
    except KeyError as error:
        raise PayloadError(f"not a {kind} document: {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise PayloadError(f"not a {kind} document: {error}") from error


_CODES: dict[Any, str] = {
    np.dtype(name).newbyteorder("<"): code
    for name, code in (
        ("uint64", "U64"),
        ("int64", "I64"),
        ("float64", "F64"),
        ("float32", "F32"),
        ("uint32", "U32"),
        ("int32", "I32"),
        ("float16", "F16"),
        ("uint16", "U16"),
        ("int16", "I16"),
        ("int8", "I8"),
        ("uint8", "U8"),
        ("bool", "BOOL"),
    )
}
"""The codes of safetensors, in the order in which it writes tensors: so that each is aligned."""
_RANKS = {code: rank for rank, code in enumerate(_CODES.values())}


def _stored(name: str, value: Array) -> Stored:
    """Raises ValueError for an array of another type."""
    code = _CODES.get(value.dtype)
    if code is None:
        value = value.astype(value.dtype.newbyteorder("<"))
        code = _CODES.get(value.dtype)
        if code is None:
            raise ValueError(f"{name!r} is an array of {value.dtype}: numbers are expected")
    return Stored(code, value.shape, value.tobytes())


_meta_text = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def _encode_arrays(kind: str, meta: Mapping[str, Any], tensors: Mapping[str, Array]) -> bytes:
    stored = {name: _stored(name, value) for name, value in tensors.items()}
    return _encode(_meta(kind, meta), stored)


def _meta(kind: str, meta: Mapping[str, Any]) -> str:
    """The beginning of a document's header: what is no tensor."""
    # One metadata entry only: safetensors keeps no order among several.
    text = _meta_text({"format": kind, **meta})
    return f'{{"__metadata__":{{"holdfast":{encode_basestring(text)}}}'


def _encode(meta: str, tensors: Mapping[str, Stored]) -> bytes:
    """The bytes that safetensors would write, which takes its time to learn where they are."""
    header = [meta]
    content: list[bytes] = []
    end = 0
    for _, name in sorted((_RANKS[value.code], name) for name, value in tensors.items()):
        code, shape, data = tensors[name]
        start, end = end, end + len(data)
        header.append(
            f'{encode_basestring(name)}:{{"dtype":"{code}","shape":[{",".join(map(str, shape))}],'
            f'"data_offsets":[{start},{end}]}}'
        )
        content.append(data)
    head = (",".join(header) + "}").encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *content])


def _decode(kind: str, data: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    try:
        header_size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_size])
        meta = dict(json.loads(header["__metadata__"]["holdfast"]))
        tensors = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PayloadError(f"not a {kind} document: {error}") from error
    found = meta.pop("format", None)
    if found != kind:
        raise PayloadError(f"a document of format {found!r} where {kind!r} is expected")
    return meta, tensors
