"""A run's training state: its copy in host memory, its files, and the way back from them.

`adapter_model.safetensors` and `adapter_config.json` are a PEFT adapter that holds nothing but
lora_A and lora_B. `optimizer.safetensors` holds moments, step counts, accumulated gradients and
the incomplete mark. Equal states give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors import SafetensorError, deserialize
from torch import Tensor

from holdfast.engine.interface import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OPTIMIZER_STATE,
    BaseModelInfo,
    EngineError,
    Incomplete,
    RunConfig,
    StateInfo,
)
from holdfast.engine.optimizer import AdamState
from holdfast.engine.slots import Layout

Parts = list[bytes | memoryview]

_ADAPTER_FORMAT = "holdfast.adapter.1"
_OPTIMIZER_FORMAT = "holdfast.optimizer.1"


class TrainingState:
    """Everything of a run that its next steps depend on, apart from any PEFT slot."""

    def __init__(
        self,
        config: RunConfig,
        modules: tuple[str, ...],
        target_modules: list[str],
        layout: Layout,
        weights: Tensor,
    ) -> None:
        self.config = config
        self.modules = modules
        """The adapted modules."""
        self.target_modules = target_modules
        """What PEFT's configuration calls them."""
        self.layout = layout
        self.weights = weights
        """float32 [layout.size]"""
        self.adam = AdamState(layout)
        self.step = 0
        self.grads: Tensor | None = None
        """Accumulated gradients, laid out like the weights."""
        self.present = [False] * len(layout.names)
        """Which parameters have a gradient."""
        self.pending = 0
        """forward_backwards accumulated."""
        self.pending_tokens = 0
        self.incomplete: Incomplete | None = None

    @property
    def info(self) -> StateInfo:
        return StateInfo(self.config, self.step, self.pending, self.incomplete)

    def clear_gradients(self) -> Tensor | None:
        """Forget gradients and mark; gives the buffer that held them."""
        buffer, self.grads = self.grads, None
        self.present = [False] * len(self.layout.names)
        self.pending = 0
        self.pending_tokens = 0
        self.incomplete = None
        return buffer


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A state copied out of the way of training, as the bytes of its files."""

    info: StateInfo
    files: Mapping[str, Parts]
    size: int


def copy_to_host(state: TrainingState, base: BaseModelInfo, *, optimizer: bool) -> HostCopy:
    """Copy a run's state to host memory, in the form of its files."""
    files: dict[str, Parts] = {
        ADAPTER_WEIGHTS: _adapter_file(state, base),
        ADAPTER_CONFIG: [_adapter_config(state, base)],
    }
    if optimizer:
        files[OPTIMIZER_STATE] = _optimizer_file(state, base)
    size = sum(len(part) for parts in files.values() for part in parts)
    return HostCopy(state.info, files, size)


def _adapter_file(state: TrainingState, base: BaseModelInfo) -> Parts:
    meta = {"format": _ADAPTER_FORMAT, **_identity(state.config, base)}
    return _safetensors(meta, _named(state.layout, "", _host(state.weights)))


def _optimizer_file(state: TrainingState, base: BaseModelInfo) -> Parts:
    layout, adam = state.layout, state.adam
    mark = state.incomplete
    meta = {
        "format": _OPTIMIZER_FORMAT,
        **_identity(state.config, base),
        "optimizer": state.config.optimizer,
        "step": state.step,
        "steps": dict(zip(layout.names, adam.steps, strict=True)),
        "pending_forward_backwards": state.pending,
        "pending_tokens": state.pending_tokens,
        "incomplete": None if mark is None else {"seq": mark.seq, "message": mark.message},
    }
    tensors: dict[str, Tensor] = {}
    stepped = [count > 0 for count in adam.steps]
    for prefix, flat, there in (
        ("exp_avg.", adam.exp_avg, stepped),
        ("exp_avg_sq.", adam.exp_avg_sq, stepped),
        ("grad.", state.grads, state.present),
    ):
        if flat is not None:
            tensors |= _named(layout, prefix, _host(flat), there)
    return _safetensors(meta, tensors)


def _identity(config: RunConfig, base: BaseModelInfo) -> dict[str, Any]:
    lora = config.lora
    return {
        "base_model": base.name,
        "base_revision": base.revision,
        "rank": lora.rank,
        "alpha": lora.alpha,
        "train_attn": lora.train_attn,
        "train_mlp": lora.train_mlp,
        "train_unembed": lora.train_unembed,
    }


def _host(flat: Tensor) -> Tensor:
    copy = torch.empty(flat.shape, dtype=flat.dtype)
    return copy.copy_(flat)


def _named(
    layout: Layout, prefix: str, flat: Tensor, there: Iterable[bool] | None = None
) -> dict[str, Tensor]:
    views = layout.views(flat)
    chosen = there if there is not None else [True] * len(views)
    return {
        prefix + name: view
        for name, view, wanted in zip(layout.names, views, chosen, strict=True)
        if wanted
    }


def _safetensors(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Parts:
    """A safetensors file of fp32 tensors in parts, so that they need not be copied together."""
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "holdfast": text}}
    parts: Parts = []
    end = 0
    for name in sorted(tensors):
        assert tensors[name].dtype == torch.float32
        part = tensors[name].numpy().reshape(-1).view(np.uint8).data
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + len(part)]}
        end += len(part)
        parts.append(part)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return [len(encoded).to_bytes(8, "little") + encoded, *parts]


def _adapter_config(state: TrainingState, base: BaseModelInfo) -> bytes:
    lora = state.config.lora
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        target_modules=state.target_modules,
        base_model_name_or_path=base.name,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    fields = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    return json.dumps(fields, sort_keys=True, indent=2).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checkpoint's adapter, read: its weights by name and what its files say of it."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]
    """Empty for an adapter that another program wrote."""

    def fill(self, layout: Layout) -> Tensor:
        """A flat buffer of the weights. Raises EngineError naming a tensor that does not fit."""
        return _fill(ADAPTER_WEIGHTS, layout, "", self.tensors)


def read_adapter(files: Mapping[str, bytes]) -> Adapter:
    """Read an adapter's files. Raises EngineError (user) naming the file and what is wrong."""
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if name not in files:
            raise EngineError("missing_file", f"The checkpoint has no {name}.")
    try:
        config = json.loads(files[ADAPTER_CONFIG])
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(
            ADAPTER_CONFIG, f"not the configuration of a LoRA adapter ({error})"
        ) from error
    for key in (
        "use_dora",
        "use_rslora",
        "lora_bias",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
    ):
        if config.get(key):
            raise EngineError(
                "unsupported_adapter", f"The adapter's {key} is {config[key]!r}; it must be unset."
            )
    tensors, meta = _read(ADAPTER_WEIGHTS, files[ADAPTER_WEIGHTS])
    if meta and meta.get("format") != _ADAPTER_FORMAT:
        raise _unknown_format(ADAPTER_WEIGHTS, meta.get("format"), _ADAPTER_FORMAT)
    modules = set()
    for name in tensors:
        module = name.removeprefix("base_model.model.")
        stem = module.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        if module == name or stem == module:
            raise _damaged(ADAPTER_WEIGHTS, f"the tensor {name!r} is no part of a LoRA adapter")
        modules.add(stem)
    if not modules:
        raise _damaged(ADAPTER_WEIGHTS, "it holds no tensors")
    return Adapter(rank, alpha, tuple(sorted(modules)), tensors, meta)


def check_base(meta: Mapping[str, Any], base: BaseModelInfo) -> None:
    """Refuse a checkpoint of another base model, naming both values."""
    for key, code, noun, mine in (
        ("base_model", "base_model_mismatch", "base model", base.name),
        ("base_revision", "base_revision_mismatch", "base model's revision", base.revision),
    ):
        if key in meta and meta[key] != mine:
            raise EngineError(
                code, f"The checkpoint's {noun} is {meta[key]!r}; {mine!r} is what is served here."
            )


def check_identity(meta: Mapping[str, Any], config: RunConfig, base: BaseModelInfo) -> None:
    """Refuse a checkpoint of another base model or LoRA configuration, naming both values."""
    check_base(meta, base)
    codes = {"rank": "rank_mismatch", "alpha": "alpha_mismatch"}
    mine = _identity(config, base)
    for key in ("rank", "alpha", "train_attn", "train_mlp", "train_unembed"):
        if key in meta and meta[key] != mine[key]:
            raise EngineError(
                codes.get(key, "train_flags_mismatch"),
                f"The checkpoint's {key} is {meta[key]!r}, this run's is {mine[key]!r}.",
            )


def restore_optimizer(state: TrainingState, data: bytes, base: BaseModelInfo) -> None:
    """Set moments, step counts, gradients and mark of a state that nobody uses yet."""
    tensors, meta = _read(OPTIMIZER_STATE, data)
    if meta.get("format") != _OPTIMIZER_FORMAT:
        raise _unknown_format(OPTIMIZER_STATE, meta.get("format"), _OPTIMIZER_FORMAT)
    check_identity(meta, state.config, base)
    layout = state.layout
    try:
        if meta["optimizer"] != state.config.optimizer:
            raise EngineError(
                "optimizer_mismatch",
                f"The checkpoint's optimizer is {meta['optimizer']!r}, the run's is "
                f"{state.config.optimizer!r}.",
            )
        if meta["steps"].keys() != set(layout.names):
            raise _damaged(
                OPTIMIZER_STATE, "its step counts are not those of the adapter's tensors"
            )
        steps = [_count(meta["steps"][name]) for name in layout.names]
        state.step = _count(meta["step"])
        state.pending = _count(meta["pending_forward_backwards"])
        state.pending_tokens = _count(meta["pending_tokens"])
        mark = meta["incomplete"]
        state.incomplete = (
            None if mark is None else Incomplete(int(mark["seq"]), str(mark["message"]))
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(OPTIMIZER_STATE, f"its metadata are incomplete ({error})") from error
    groups: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}, "grad": {}}
    for name, tensor in tensors.items():
        kind, _, parameter = name.partition(".")
        if kind not in groups:
            raise _damaged(OPTIMIZER_STATE, f"the tensor {name!r} is unknown")
        groups[kind][parameter] = tensor

    def filled(kind: str, there: list[bool]) -> Tensor:
        flat = _fill(OPTIMIZER_STATE, layout, f"{kind}.", groups[kind], there)
        return flat.to(state.weights.device)

    stepped = [count > 0 for count in steps]
    present = [name in groups["grad"] for name in layout.names]
    state.adam.steps = steps
    if any(stepped):
        state.adam.exp_avg = filled("exp_avg", stepped)
        state.adam.exp_avg_sq = filled("exp_avg_sq", stepped)
    elif groups["exp_avg"] or groups["exp_avg_sq"]:
        raise _damaged(OPTIMIZER_STATE, "it holds moments of parameters that took no step")
    if groups["grad"]:
        state.grads = filled("grad", present)
        state.present = present


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _fill(
    file: str,
    layout: Layout,
    prefix: str,
    tensors: Mapping[str, Tensor],
    there: Iterable[bool] | None = None,
) -> Tensor:
    """Copy named tensors into a flat buffer; exactly those that are `there` must be present."""
    flat = torch.zeros(layout.size)
    chosen = list(there) if there is not None else [True] * len(layout.names)
    wanted = {name for name, yes in zip(layout.names, chosen, strict=True) if yes}
    if missing := sorted(wanted - tensors.keys()):
        raise _damaged(file, f"the tensor {prefix + missing[0]!r} is missing")
    if unknown := sorted(tensors.keys() - wanted):
        raise _damaged(file, f"the tensor {prefix + unknown[0]!r} does not belong to this run")
    for name, view in zip(layout.names, layout.views(flat), strict=True):
        if name in wanted:
            tensor = tensors[name]
            if tensor.shape != view.shape:
                raise _damaged(
                    file,
                    f"the tensor {prefix + name!r} has shape {list(tensor.shape)}, "
                    f"not {list(view.shape)}",
                )
            view.copy_(tensor)
    return flat


def _read(file: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (views of `data`) and our metadata of a safetensors file, strictly checked."""
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        text = header.get("__metadata__", {}).get("holdfast")
        meta = json.loads(text) if text is not None else {}
    except (SafetensorError, ValueError, AttributeError, TypeError) as error:
        raise _damaged(file, f"it is no safetensors file ({error})") from error
    if not isinstance(meta, dict):
        raise _damaged(file, "its metadata are no object")
    tensors = {}
    for name, entry in entries:
        if meta and entry["dtype"] != "F32":
            raise _damaged(file, f"the tensor {name!r} is {entry['dtype']}, not F32")
        tensors[name] = _tensor(file, name, entry)
    return tensors, meta


def _tensor(file: str, name: str, entry: Mapping[str, Any]) -> Tensor:
    raw = entry["data"]
    if entry["dtype"] == "F32":
        values = np.frombuffer(raw, dtype="<f4").astype(np.float32)
    elif entry["dtype"] == "F16":
        values = np.frombuffer(raw, dtype="<f2").astype(np.float32)
    elif entry["dtype"] == "BF16":
        values = (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        raise _damaged(file, f"the tensor {name!r} is {entry['dtype']}; F32 is expected")
    return torch.from_numpy(values).reshape(entry["shape"])


def _damaged(file: str, what: str) -> EngineError:
    return EngineError("damaged_checkpoint", f"{file} does not fit: {what}.")


def _unknown_format(file: str, found: object, wanted: str) -> EngineError:
    return EngineError(
        "unknown_format", f"{file} is of format {found!r}; this release reads {wanted!r}."
    )
