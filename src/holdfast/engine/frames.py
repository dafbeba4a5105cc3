"""The frames between a worker process and its parent: a JSON header and bytes. No torch here.

A frame is the header's length (4 bytes, little-endian), the payload's length (8 bytes), the
header, the payload. Parent to worker: `{"id", "call", "args"}`. Worker to parent: `{"id",
"result"}` or `{"id", "error"}`, for a capture a second one with `"stage": "written"`, and
`{"progress": true}` from time to time while it computes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

from holdfast.engine.interface import (
    BaseModelInfo,
    EngineError,
    Incomplete,
    LoraConfig,
    RunConfig,
    StateInfo,
)
from holdfast.store.model import Blob

READY_ID = 0
"""The answer under this id says that the base model is loaded, or why not."""

_LENGTHS = struct.Struct("<IQ")

Frame = tuple[dict[str, Any], bytes]


def encode(header: Mapping[str, Any], payload_size: int) -> bytes:
    """What precedes a payload."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), payload_size) + text


def read(stream: BinaryIO) -> Frame | None:
    """The next frame of a blocking stream, or None at its end (also inside a frame)."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header_size, payload_size = _LENGTHS.unpack(lengths)
    text, payload = stream.read(header_size), stream.read(payload_size)
    if len(text) < header_size or len(payload) < payload_size:
        return None
    return json.loads(text), payload


async def read_async(stream: asyncio.StreamReader) -> Frame | None:
    """As `read`, from an asyncio stream."""
    try:
        header_size, payload_size = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
        text = await stream.readexactly(header_size)
        return json.loads(text), await stream.readexactly(payload_size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def error_json(error: EngineError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "category": error.category}


def config_from(data: Mapping[str, Any]) -> RunConfig:
    return RunConfig(data["base_model"], LoraConfig(**data["lora"]), data["optimizer"])


def state_from(data: Mapping[str, Any]) -> StateInfo:
    mark = data["incomplete"]
    return StateInfo(
        config_from(data["config"]),
        data["step"],
        data["pending_forward_backwards"],
        None if mark is None else Incomplete(**mark),
    )


def blobs_json(files: Mapping[str, Blob]) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(blob) for name, blob in files.items()}


def blobs_from(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Blob]:
    return {name: Blob(**blob) for name, blob in data.items()}


def info_from(data: Mapping[str, Any]) -> BaseModelInfo:
    return BaseModelInfo(**data)
