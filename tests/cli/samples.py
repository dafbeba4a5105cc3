"""Small base models, adapters and checkpoints, made without torch, and a way to call commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from safetensors.numpy import save

from holdfast.cli.main import main
from holdfast.store import LoraConfig, Manifest, Store
from tests.store.samples import CONFIG, OPTIMIZER, PLAIN, WEIGHTS

HIDDEN, INNER, VOCABULARY, RANK = 8, 12, 16, 2

LAYERS = {
    "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.o_proj": (HIDDEN, HIDDEN),
    "model.layers.0.mlp.up_proj": (INNER, HIDDEN),
    "model.layers.0.mlp.down_proj": (HIDDEN, INNER),
}
"""Outputs and inputs."""

HEAD = {"lm_head": (VOCABULARY, HIDDEN)}


def holdfast(*args: object, **options: Any) -> Result:
    """Call the command, which must not end in a traceback."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], **options)
    clean = result.exception is None or isinstance(result.exception, SystemExit)
    assert clean, (args, result.output, result.exception)
    return result


def fails(*args: object, status: int = 1) -> str:
    """The last line of a command that must fail, on standard error."""
    result = holdfast(*args)
    assert result.exit_code == status, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: "), result.stderr
    assert "Traceback" not in result.output
    return lines[-1]


def write_base(directory: Path, *, scale: float = 1.0) -> Path:
    """A base model's directory, with a tied head and shapes as in LAYERS."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {
        f"{name}.weight": np.full(shape, scale, np.float32) for name, shape in LAYERS.items()
    }
    weights["model.embed_tokens.weight"] = np.full((VOCABULARY, HIDDEN), scale, np.float32)
    weights["model.layers.0.input_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    (directory / "model.safetensors").write_bytes(save(weights))
    return directory


def adapter_weights(
    layers: Mapping[str, tuple[int, int]] = LAYERS, rank: int = RANK
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Tensors of a LoRA adapter, by PEFT's names."""
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = np.full((rank, inputs), 0.5, np.float32)
        tensors[f"{stem}.lora_B.weight"] = np.full((outputs, rank), 0.25, np.float32)
    return tensors


def adapter_config(**changes: Any) -> bytes:
    """A configuration as PEFT writes it, shortened."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "bias": "none", "use_dora": False}
    return json.dumps({**config, **changes}).encode()


def adapter_files(layers: Mapping[str, tuple[int, int]] = LAYERS) -> dict[str, bytes]:
    return {WEIGHTS: save(adapter_weights(layers)), CONFIG: adapter_config()}


def optimizer_file(**changes: Any) -> bytes:
    said = {"format": "holdfast.optimizer.1", "optimizer": "adamw", "step": 3, **changes}
    return save({"exp_avg.x": np.zeros(3, np.float32)}, metadata={"holdfast": json.dumps(said)})


def write_directory(directory: Path, files: Mapping[str, bytes]) -> Path:
    directory.mkdir(parents=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def add_checkpoint(
    store: Store, files: Mapping[str, bytes] | None = None, **changes: Any
) -> Manifest:
    """A whole training checkpoint in the store, under its name if it has one."""
    if files is None:
        files = {**adapter_files(), OPTIMIZER: optimizer_file()}
    blobs = {name: store.put_blob([data]) for name, data in files.items()}
    lora = LoraConfig(RANK, 1, 32.0, train_attn=True, train_mlp=True, train_unembed=False)
    manifest = dataclasses.replace(PLAIN, files=blobs, lora=lora, **changes)
    manifest_id = store.publish(manifest)
    if manifest.key is not None:
        store.set_name(manifest.key, manifest_id)
    return manifest
