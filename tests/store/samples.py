"""Manifests for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from holdfast.store import Blob, LoraConfig, Manifest, NameKey

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"

PLAIN = Manifest(
    kind="training",
    run="3f0c:train:0",
    name="final",
    seq=7,
    step=3,
    base_model="tiny",
    base_revision="r1",
    lora=LoraConfig(
        rank=8, alpha=32.0, seed=1, train_attn=True, train_mlp=True, train_unembed=False
    ),
    optimizer="adamw",
    owner="local",
    created=1.7e9,
    files={},
)


def manifest_of(files: Mapping[str, Blob], **changes: Any) -> Manifest:
    """A valid manifest over these files."""
    return dataclasses.replace(PLAIN, files=files, **changes)


def key_of(manifest: Manifest) -> NameKey:
    """The name of a manifest that has one."""
    assert manifest.key is not None
    return manifest.key
