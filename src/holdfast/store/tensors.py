"""The header of a safetensors file, read without trusting it.

Format: https://huggingface.co/docs/safetensors#format. Eight bytes with the header's length, little
endian; the header, a JSON object of name -> dtype, shape, data_offsets; then the tensors' bytes
without gaps. Stricter than the usual readers: two tensors of one name are refused as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.store.errors import Corrupt, InvalidFile
from holdfast.store.model import parse_json

MAX_HEADER = 100_000_000
"""Bytes, as in the format's own reader."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` to `stop` after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_size(start: bytes, size: int, what: str) -> int:
    """Length of the header, from a file's first eight bytes and its size; InvalidFile."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or size < 8:
        raise InvalidFile(f"{what} has {size} bytes, too few for a safetensors file")
    if length > min(MAX_HEADER, size - 8):
        raise InvalidFile(f"{what} claims a header of {length} bytes in a file of {size}")
    return length


def read_tensors(header: bytes, size: int, what: str) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes with this JSON header; InvalidFile, naming `what`.

    Together they cover the file's data exactly: no gaps, no overlaps, nothing after them.
    """
    try:
        document = parse_json(header.rstrip(b" "), f"the header of {what}", MAX_HEADER)
    except Corrupt as error:
        raise InvalidFile(str(error)) from error
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidFile(f"{what}: __metadata__ must map text to text")
    tensors = {name: _tensor(name, value, what) for name, value in document.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            kind = "overlaps" if tensor.start < end else "leaves a gap after"
            raise InvalidFile(f"{what}: tensor {name[:100]!r} {kind} the bytes before it")
        end = tensor.stop
    if 8 + len(header) + end != size:
        raise InvalidFile(f"{what}: its tensors end at {8 + len(header) + end} of {size} bytes")
    return tensors


def _tensor(name: str, value: Any, what: str) -> TensorInfo:
    where = f"{what}: tensor {name[:100]!r}"
    if not isinstance(value, Mapping) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InvalidFile(f"{where} must have a dtype, a shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise InvalidFile(f"{where} has the dtype {str(dtype)[:100]!r}, not one of {list(_BITS)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise InvalidFile(f"{where}: its shape must be a short list of counts")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidFile(f"{where}: its data_offsets must be a start and an end")
    expected = math.prod(shape) * _BITS[dtype] // 8
    if offsets[1] - offsets[0] != expected:
        raise InvalidFile(
            f"{where} of {dtype} in shape {shape} needs {expected} bytes, "
            f"its offsets give {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
