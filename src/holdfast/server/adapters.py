"""Adapters from outside: whether their files are what they claim, without loading any of them.

Nothing here trusts a byte: a file is read only as far as its checked header says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.engine.interface import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from holdfast.engine.revision import revision
from holdfast.store import Blob, InvalidFile, Store, StoreError
from holdfast.store.model import parse_json
from holdfast.store.tensors import TensorInfo, header_size, read_tensors

_MAX_CONFIG = 1 << 20
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_LAYER = re.compile(r"(^|\.)\d+\.")
_ATTENTION = re.compile(r"attn|attention")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_HEADS = ("lm_head", "embed_out", "output")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_DTYPES = ("F32", "F16", "BF16")
_UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)

Read = Callable[[int, int], bytes]
"""Bytes of a file from a start to an end."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter's files say of it."""

    rank: int
    alpha: float
    modules: Mapping[str, tuple[int, int]]
    """Inputs and outputs of each adapted layer."""
    said: Mapping[str, Any]
    """What Holdfast wrote into the file; empty for an adapter of another program."""

    @property
    def attn(self) -> bool:
        return any(_ATTENTION.search(m) for m in self.modules if _is_in_layers(m))

    @property
    def mlp(self) -> bool:
        return any(not _ATTENTION.search(m) for m in self.modules if _is_in_layers(m))

    @property
    def unembed(self) -> bool:
        return any(not _is_in_layers(m) for m in self.modules)


def read_adapter(store: Store, files: Mapping[str, Blob]) -> Adapter:
    """Check the adapter among these files of the store. Raises InvalidFile, naming the file."""
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if name not in files:
            raise InvalidFile(f"there is no {name}{_hint(files)}")
    if files[ADAPTER_CONFIG].size > _MAX_CONFIG:
        raise InvalidFile(f"{ADAPTER_CONFIG} has {files[ADAPTER_CONFIG].size} bytes, too many")
    rank, alpha = _read_config(store.read_blob(files[ADAPTER_CONFIG], what=ADAPTER_CONFIG))
    tensors, said = tensors_of(store, files[ADAPTER_WEIGHTS], ADAPTER_WEIGHTS)
    return Adapter(rank, alpha, _modules(tensors, rank), said)


def tensors_of(
    store: Store, blob: Blob, name: str
) -> tuple[dict[str, TensorInfo], Mapping[str, Any]]:
    """The tensors of a safetensors file in the store, and what Holdfast wrote beside them."""

    def read(start: int, stop: int) -> bytes:
        return b"".join(store.stream_blob(blob, start, stop, what=name))

    return _read_header(read, blob.size, name)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model's directory: which version it is, and the shapes of its weights."""

    name: str
    revision: str
    weights: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, name: str, directory: Path) -> BaseModel:
        """Hash a directory as the engine does. Raises InvalidFile when it holds no model."""
        if not (directory / "config.json").is_file():
            raise InvalidFile(f"{directory} has no config.json: it is no model's directory")
        weights: dict[str, tuple[int, ...]] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with path.open("rb") as file:

                def read(start: int, stop: int) -> bytes:
                    file.seek(start)
                    return file.read(stop - start)

                tensors, _ = _read_header(read, path.stat().st_size, str(path))
            weights |= {tensor: info.shape for tensor, info in tensors.items()}
        if not weights:
            raise InvalidFile(f"{directory} has no weights in *.safetensors")
        return cls(name, revision(directory), weights)

    def check(self, adapter: Adapter) -> bool:
        """Raises InvalidFile unless every adapted layer is one of this model's.

        False when the adapter leaves out layers that training would have: it can be sampled
        from, but not trained.
        """
        found = set()
        for module, (inputs, outputs) in adapter.modules.items():
            name = self._weight_of(module)
            if name is None:
                raise InvalidFile(
                    f"{ADAPTER_WEIGHTS} adapts {module!r}, which base model {self.name!r} does "
                    "not have"
                )
            shape = self.weights[name]
            if shape not in ((outputs, inputs), (inputs, outputs)):
                raise InvalidFile(
                    f"{ADAPTER_WEIGHTS} adapts {module!r} as {outputs} x {inputs}; in base model "
                    f"{self.name!r} it is {' x '.join(map(str, shape))}"
                )
            found.add(name)
        return all(
            name in found
            for name, shape in self.weights.items()
            if len(shape) == 2 and _is_in_layers(name) and self._would_train(adapter, name)
        )

    def _would_train(self, adapter: Adapter, weight: str) -> bool:
        module = weight.removesuffix(".weight")
        if module == weight or module.rpartition(".")[2] in _ROUTERS:
            return False
        return adapter.attn if _ATTENTION.search(module) else adapter.mlp

    def _weight_of(self, module: str) -> str | None:
        """The weight of a layer; a file may leave out, or add, the first part of its name."""
        wanted = f"{module}.weight"
        candidates = [wanted, wanted.partition(".")[2]]
        if module.rpartition(".")[2] in _HEADS:  # may share the embedding's weight
            candidates += [
                n for n in self.weights if n.split(".")[-2:-1] in [[e] for e in _EMBEDDINGS]
            ]
        else:
            candidates += [n for n in self.weights if n.endswith("." + wanted)]
        return next((name for name in candidates if name in self.weights), None)


def _read_config(data: bytes) -> tuple[int, float]:
    try:
        config = parse_json(data, ADAPTER_CONFIG, _MAX_CONFIG)
    except StoreError as error:
        raise InvalidFile(str(error)) from error
    if config.get("peft_type", "LORA") != "LORA":
        raise InvalidFile(
            f"{ADAPTER_CONFIG}: peft_type is {str(config['peft_type'])[:40]!r}; only LORA is taken"
        )
    for key in _UNSUPPORTED:
        if config.get(key):
            raise InvalidFile(f"{ADAPTER_CONFIG}: {key} is set, which is not supported")
    if config.get("bias", "none") != "none":
        raise InvalidFile(f"{ADAPTER_CONFIG}: bias is {str(config['bias'])[:40]!r}, not 'none'")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= 1 << 16:
        raise InvalidFile(
            f"{ADAPTER_CONFIG}: r is {str(rank)[:40]}; it must be a rank of 1 or more"
        )
    # An integer may be beyond any float.
    scale = float(alpha) if isinstance(alpha, int | float) and abs(alpha) < 1e9 else math.nan
    if not scale > 0:
        raise InvalidFile(
            f"{ADAPTER_CONFIG}: lora_alpha is {str(alpha)[:40]}, not a number above 0"
        )
    return rank, scale


def _modules(tensors: Mapping[str, TensorInfo], rank: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each adapted layer, whose two tensors must be there and fit."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in tensors.items():
        found = _TENSOR.fullmatch(name)
        if not found:
            raise InvalidFile(f"{ADAPTER_WEIGHTS}: {name[:100]!r} is no part of a LoRA adapter")
        if info.dtype not in _DTYPES:
            raise InvalidFile(
                f"{ADAPTER_WEIGHTS}: {name[:100]!r} is {info.dtype}, not {', '.join(_DTYPES)}"
            )
        sides.setdefault(found["module"], {})[found["side"]] = info.shape
    if not sides:
        raise InvalidFile(f"{ADAPTER_WEIGHTS} holds no tensors")
    modules = {}
    for module, shapes in sides.items():
        a, b = shapes.get("A", ()), shapes.get("B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise InvalidFile(
                f"{ADAPTER_WEIGHTS}: lora_A and lora_B of {module[:100]!r} have the shapes "
                f"{list(a)} and {list(b)}, which do not fit the rank {rank}"
            )
        if not _is_in_layers(module) and module.rpartition(".")[2] not in _HEADS:
            raise InvalidFile(
                f"{ADAPTER_WEIGHTS} adapts {module[:100]!r}, which is neither attention nor MLP "
                "nor the head"
            )
        modules[module] = (a[1], b[0])
    return modules


def _read_header(
    read: Read, size: int, name: str
) -> tuple[dict[str, TensorInfo], Mapping[str, Any]]:
    length = header_size(read(0, 8), size, name)
    header = read(8, 8 + length)
    tensors = read_tensors(header, size, name)
    text = json.loads(header).get("__metadata__", {}).get("holdfast", "{}")
    try:
        return tensors, parse_json(text.encode(), f"the metadata of {name}", len(header))
    except (StoreError, UnicodeEncodeError) as error:
        raise InvalidFile(str(error)) from error


def _is_in_layers(name: str) -> bool:
    return _LAYER.search(name) is not None


def _hint(files: Mapping[str, Blob]) -> str:
    if "adapter_model.bin" in files:
        return "; adapter_model.bin may run code when it is read, save the adapter as safetensors"
    return ""
