"""Large batches: split into several requests, and their results put together again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from holdfast.protocol.batches import BatchResult
from holdfast.protocol.data import Audio, Datum, EncodedText, Image

_BYTES_PER_CHUNK = 16


def split(data: Sequence[Datum], *, max_datums: int, max_bytes: int) -> list[Sequence[Datum]]:
    """Consecutive parts of at most so many datums and bytes; a large datum is a part by itself."""
    parts: list[Sequence[Datum]] = []
    start = size = 0
    for i, datum in enumerate(data):
        weight = _size(datum)
        if i > start and (i - start >= max_datums or size + weight > max_bytes):
            parts.append(data[start:i])
            start, size = i, 0
        size += weight
    parts.append(data[start:])
    return parts


def _size(datum: Datum) -> int:
    size = 0
    for chunk in datum.model_input:
        if isinstance(chunk, EncodedText):
            size += len(chunk.tokens)
        elif isinstance(chunk, Image):
            size += len(chunk.data)
        elif isinstance(chunk, Audio):
            size += len(chunk.dmel)
        size += _BYTES_PER_CHUNK
    for name, tensor in datum.loss_fn_inputs.items():
        size += len(name) + len(tensor.data) + _BYTES_PER_CHUNK
        if tensor.csr is not None:
            size += len(tensor.csr.crow_indices) + len(tensor.csr.col_indices)
    return size


def combine(results: Sequence[BatchResult]) -> BatchResult:
    """One result of a batch's parts, in data order.

    Metrics that every part has are put together by the ending of their name: `:sum`, `:mean`
    (weighted by datums), `:min`, `:max`, `:slack` (largest minus weighted mean), `:unique`
    (numbered), `:hash2` and `:hash_unordered` (sum modulo 2**64). Others have no meaning for the
    whole and are left out.
    """
    if len(results) == 1:
        return results[0]
    outputs = [output for result in results for output in result.outputs]
    weights = [len(result.outputs) for result in results]
    metrics: dict[str, float] = {}
    for name in results[0].metrics:
        if all(name in result.metrics for result in results):
            values = [result.metrics[name] for result in results]
            metrics.update(_reduced(name, values, weights))
    return BatchResult(outputs, metrics, results[0].output_type)


def _reduced(name: str, values: Sequence[float], weights: Sequence[int]) -> Mapping[str, float]:
    kind = name.rpartition(":")[2]
    if kind == "sum":
        return {name: math.fsum(values) if all(map(math.isfinite, values)) else sum(values)}
    if kind == "min":
        return {name: min(values)}
    if kind == "max":
        return {name: max(values)}
    if kind == "mean":
        return {name: _mean(values, weights)}
    if kind == "slack":
        return {name: max(values) - _mean(values, weights)}
    if kind == "unique":
        return {name if i == 0 else f"{name}_{i}": value for i, value in enumerate(values)}
    if kind in ("hash2", "hash_unordered"):
        return {name: float(sum(int(value) for value in values) % 2**64)}
    return {}


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    if total == 0:
        return sum(values) / len(values)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total
