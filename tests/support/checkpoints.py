"""Stored checkpoints with something changed in them, for tests that have to see the difference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from holdfast.store import NameKey
from tests.support.server import ServerProcess, key_of

Tensors = dict[str, npt.NDArray[np.float32]]
Edit = Callable[[dict[str, Any], Tensors], None]
"""Changes the metadata and the tensors of a file in place."""


def edited_checkpoint(
    server: ServerProcess, path: str, name: str, edits: Mapping[str, Edit]
) -> str:
    """Store a copy of the checkpoint at `path`, its files edited; the path of the copy.

    `edits` are by file name. Everything else, the manifest's own fields included, stays.
    """
    key = key_of(path)
    copy = NameKey(key.run, key.kind, name)
    with server.store() as store:
        current = store.resolve(key)
        assert current is not None
        manifest = store.read_manifest(current)
        files = dict(manifest.files)
        for file, edit in edits.items():
            data = _edit(store.read_blob(files[file], what=file), edit)
            files[file] = store.put_blob([data])
        changed = store.publish(dataclasses.replace(manifest, name=name, files=files))
        store.set_name(copy, changed)
    return f"tinker://{copy}"


def _edit(data: bytes, edit: Edit) -> bytes:
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    described = json.loads(metadata["holdfast"])
    tensors = {name: value.copy() for name, value in load(data).items()}
    edit(described, tensors)
    metadata["holdfast"] = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return save(tensors, metadata=metadata)


def as_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rounded to the nearest bfloat16 (ties to even), as float32."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def without_optimizer(server: ServerProcess, path: str, name: str) -> str:
    """Store a copy of the training checkpoint at `path` that has no optimizer state; its path."""
    key = key_of(path)
    copy = NameKey(key.run, key.kind, name)
    manifest = server.manifest(path)
    files = {file: blob for file, blob in manifest.files.items() if "optimizer" not in file}
    with server.store() as store:
        changed = dataclasses.replace(manifest, name=name, files=files, optimizer=None)
        store.set_name(copy, store.publish(changed))
    return f"tinker://{copy}"
