"""LoRA slots: PEFT layers in the base model that a run's weights are bound into.

PEFT walks the whole module tree to add or switch an adapter. So it builds one slot per (rank,
adapted modules), a bounded number of them, and a run is one flat buffer whose parts become the
slot's parameters while the run computes.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from holdfast.engine.base import Base, quiet
from holdfast.engine.interface import EngineError, LoraConfig

MAX_SLOTS = 16
ALIGNMENT = 16
"""Elements (64 bytes of fp32): where each parameter of a flat buffer begins."""

_PREFIX = "base_model.model."
_ATTENTION = re.compile(r"attn|attention")
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


@dataclass(frozen=True)
class Layout:
    """Where each LoRA parameter lies in a flat fp32 buffer, in the order of PEFT's names."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        offsets = []
        end = 0
        for rows, columns in self.shapes:
            offsets.append(end)
            end += -(-rows * columns // ALIGNMENT) * ALIGNMENT
        return (*offsets, end)

    @property
    def size(self) -> int:
        """Elements of the buffer, the gaps between parameters included."""
        return self.offsets[-1]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters of a buffer, without a copy."""
        return [
            flat[offset : offset + rows * columns].view(rows, columns)
            for offset, (rows, columns) in zip(self.offsets, self.shapes, strict=False)
        ]


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules of a base model that LoRA can adapt, by their names."""

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    unembed: tuple[str, ...]
    others: tuple[str, ...] = ()
    """Linear layers that no run adapts."""

    def select(self, config: LoraConfig) -> tuple[str, ...]:
        """The modules that a run trains, sorted. Raises EngineError when there are none."""
        flags = {
            "train_attn": (config.train_attn, self.attn),
            "train_mlp": (config.train_mlp, self.mlp),
            "train_unembed": (config.train_unembed, self.unembed),
        }
        for flag, (wanted, modules) in flags.items():
            if wanted and not modules:
                raise EngineError(
                    "no_such_target",
                    f"{flag} is set, but this base model has no linear layer of that kind.",
                )
        chosen = sorted(m for wanted, modules in flags.values() if wanted for m in modules)
        if not chosen:
            raise EngineError(
                "nothing_to_train",
                "train_attn, train_mlp and train_unembed are all false; set at least one.",
            )
        return tuple(chosen)

    def short(self, modules: tuple[str, ...]) -> list[str]:
        """`target_modules` for PEFT: the modules' last names where these mean no others.

        Programs that serve adapters know layers by such names.
        """
        names = {module.rsplit(".", 1)[-1] for module in modules}
        meant = {
            module
            for module in (*self.attn, *self.mlp, *self.unembed, *self.others)
            if module.rsplit(".", 1)[-1] in names
        }
        return sorted(names) if meant == set(modules) else list(modules)


def find_targets(model: Any) -> Targets:
    """Sort the linear layers of the decoder layers into attention and MLP, and find the head."""
    head = model.get_output_embeddings()
    layers = _decoder_layers(model)
    attn: list[str] = []
    mlp: list[str] = []
    unembed: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if module is head:
            unembed.append(name)
        elif name.rsplit(".", 1)[-1] in _ROUTERS or not name.startswith(layers):
            others.append(name)
        elif _ATTENTION.search(name):
            attn.append(name)
        else:
            mlp.append(name)
    return Targets(tuple(attn), tuple(mlp), tuple(unembed), tuple(others))


def _decoder_layers(model: Any) -> tuple[str, ...]:
    """Prefixes of the decoder layers: the elements of the longest list of modules.

    Ties go to the shortest name, so that a list inside a layer is not taken for the layers.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        return ()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(m) for m in decoder.modules()} if decoder is not None else set()
    lists = [(n, m) for n, m in lists if id(m) in inside] or lists
    name, modules = max(lists, key=lambda item: (len(item[1]), -len(item[0])))
    return tuple(f"{name}.{index}." for index in range(len(modules)))


class Slot:
    """One set of PEFT layers of a rank, for some modules."""

    def __init__(self, adapter: str, rank: int, layers: Sequence[tuple[str, Any]]) -> None:
        self.adapter = adapter
        self.rank = rank
        self._layers = [layer for _, layer in layers]
        named: dict[str, nn.Parameter] = {}
        for name, layer in layers:
            named[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A[adapter].weight
            named[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B[adapter].weight
        ordered = sorted(named)
        self.parameters: list[nn.Parameter] = [named[name] for name in ordered]
        self.layout = Layout(
            tuple(ordered),
            tuple((named[name].shape[0], named[name].shape[1]) for name in ordered),
        )
        self._bound: Tensor | None = None
        self._alpha: float | None = None

    def bind(self, flat: Tensor, alpha: float) -> None:
        """Make the parts of a flat buffer the slot's parameters, and `alpha` its scale."""
        if self._alpha != alpha:
            for layer in self._layers:
                layer.lora_alpha[self.adapter] = alpha
                layer.scaling[self.adapter] = alpha / self.rank
            self._alpha = alpha
        if self._bound is not flat:
            for parameter, view in zip(self.parameters, self.layout.views(flat), strict=True):
                parameter.data = view
            self._bound = flat

    def unbind(self) -> None:
        """Let go of the bound buffer."""
        if self._bound is not None:
            empty = torch.empty(0, device=self._bound.device)
            for parameter in self.parameters:
                parameter.data = empty
            self._bound = None

    def initialise(self, seed: int) -> Tensor:
        """A new flat buffer with PEFT's own initialisation, drawn on the CPU from `seed` alone."""
        flat = torch.zeros(self.layout.size)
        self.bind(flat, self._alpha or 1.0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for layer in self._layers:
                layer.reset_lora_parameters(self.adapter, True)
        self.unbind()
        return flat


class Slots:
    """The slots of a base model, the least recently used given up when there are too many."""

    def __init__(self, base: Base) -> None:
        self._model = base.model
        self.targets = find_targets(base.model)
        self.max_rank = int(base.model.config.get_text_config().hidden_size)
        self._slots: OrderedDict[tuple[int, tuple[str, ...]], Slot] = OrderedDict()
        self._layers: list[Any] = []
        self._active: str | None = None
        self._made = 0

    def get(self, rank: int, modules: tuple[str, ...]) -> Slot:
        """The slot for a rank and some modules (sorted names), made if need be."""
        key = (rank, modules)
        slot = self._slots.get(key)
        if slot is None:
            if not 1 <= rank <= self.max_rank:
                raise EngineError(
                    "invalid_rank",
                    f"The rank is {rank}; for this base model it must be 1 to {self.max_rank}.",
                )
            if len(self._slots) >= MAX_SLOTS:
                self._remove(next(iter(self._slots)))
            slot = self._slots[key] = self._make(rank, modules)
        self._slots.move_to_end(key)
        return slot

    def activate(self, slot: Slot | None) -> None:
        """Let the model compute with a slot's weights, or as the bare base model."""
        adapter = None if slot is None else slot.adapter
        if adapter != self._active:
            for layer in self._layers:
                layer._active_adapter = [] if adapter is None else [adapter]
            self._active = adapter

    def release(self, flat: Tensor) -> None:
        """Unbind a buffer that is given up, so that its memory is free."""
        for slot in self._slots.values():
            if slot._bound is flat:
                slot.unbind()

    def _make(self, rank: int, modules: tuple[str, ...]) -> Slot:
        adapter = f"slot{self._made}"
        self._made += 1
        try:
            return self._inject(adapter, rank, modules)
        except BaseException:
            self._take_out(adapter)
            raise

    def _inject(self, adapter: str, rank: int, modules: tuple[str, ...]) -> Slot:
        pattern = "|".join(re.escape(module) for module in modules)
        config = PeftLoraConfig(r=rank, lora_alpha=rank, target_modules=f"(?:{pattern})")
        with quiet(), torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, self._model, adapter_name=adapter)
        self._model.eval()
        wanted = set(modules)
        self._layers = []
        mine = []
        for name, module in self._model.named_modules():
            if isinstance(module, LoraLayer):
                self._layers.append(module)
                if name in wanted:
                    mine.append((name, module))
        if len(mine) != len(wanted):
            missing = sorted(wanted - {name for name, _ in mine})
            raise EngineError("no_such_target", f"The base model has no layer {missing[0]!r}.")
        slot = Slot(adapter, rank, mine)
        _let_train(*self._slots.values(), slot)
        self._active = adapter
        for layer in self._layers:
            layer._active_adapter = [adapter]
        return slot

    def _take_out(self, adapter: str) -> None:
        """Remove what there is of an adapter that could not be made."""
        self._layers = [m for m in self._model.modules() if isinstance(m, LoraLayer)]
        self._active = adapter
        self.activate(None)
        for layer in self._layers:
            layer.delete_adapter(adapter)
        _let_train(*self._slots.values())

    def _remove(self, key: tuple[int, tuple[str, ...]]) -> None:
        slot = self._slots.pop(key)
        self.activate(None)
        for layer in slot._layers:
            layer.delete_adapter(slot.adapter)


def _let_train(*slots: Slot) -> None:
    """Where PEFT adds an adapter, it leaves gradients on for the active one alone."""
    for slot in slots:
        for parameter in slot.parameters:
            parameter.requires_grad_(True)
