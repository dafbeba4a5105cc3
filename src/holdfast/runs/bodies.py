"""The journaled bodies of operations that are not batches: small JSON documents."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from holdfast.engine.interface import AdamParams, LoraConfig, RunConfig
from holdfast.store import Manifest, NameKey

CREATE = "create"
CREATE_FROM_STATE = "create_from_state"
FORWARD = "forward"
FORWARD_BACKWARD = "forward_backward"
OPTIM_STEP = "optim_step"
SAVE_WEIGHTS = "save_weights"
SAVE_SAMPLER = "save_weights_for_sampler"
SAVE_EXTERNAL = "save_weights_external"
LOAD_WEIGHTS = "load_weights"
MISSING = "missing"
"""A number that was given up: which operation it would have been is not known."""

SAVES = frozenset({SAVE_WEIGHTS, SAVE_SAMPLER, SAVE_EXTERNAL})
CHANGES_STATE = frozenset({CREATE, CREATE_FROM_STATE, FORWARD_BACKWARD, OPTIM_STEP, LOAD_WEIGHTS})
"""What replay executes again."""


class Body:
    """A body that is stored as canonical JSON: equal bodies have equal bytes."""

    kind: ClassVar[str]

    def encode(self) -> bytes:
        return encode_json(dataclasses.asdict(self))  # type: ignore[call-overload]

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(**json.loads(data))


@dataclass(frozen=True, slots=True)
class Create(Body):
    """A new run, its seed already drawn. The rest of its configuration is in the run's row."""

    kind: ClassVar[str] = CREATE
    config: dict[str, Any]

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        return cls(config_as_json(config))


@dataclass(frozen=True, slots=True)
class Load(Body):
    """A load into a live run. `readers` are the owners on whose behalf it reads."""

    kind: ClassVar[str] = LOAD_WEIGHTS
    run: str
    segment: str
    name: str
    optimizer: bool
    readers: list[str]

    @property
    def key(self) -> NameKey:
        return NameKey(self.run, self.segment, self.name)


@dataclass(frozen=True, slots=True)
class CreateFromState(Body):
    """A new run from a checkpoint, which decides everything that is not given."""

    kind: ClassVar[str] = CREATE_FROM_STATE
    run: str
    segment: str
    name: str
    optimizer: bool
    readers: list[str]
    base_model: str | None = None
    optimizer_type: str | None = None

    @property
    def key(self) -> NameKey:
        return NameKey(self.run, self.segment, self.name)


@dataclass(frozen=True, slots=True)
class OptimStep(Body):
    """One step of AdamW."""

    kind: ClassVar[str] = OPTIM_STEP
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float

    @property
    def params(self) -> AdamParams:
        return AdamParams(**dataclasses.asdict(self))


@dataclass(frozen=True, slots=True)
class Save(Body):
    """A named checkpoint of weights and optimizer state."""

    kind: ClassVar[str] = SAVE_WEIGHTS
    name: str
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class SaveSampler(Body):
    """Weights for sampling: named, or for one sampler of this session only."""

    kind: ClassVar[str] = SAVE_SAMPLER
    name: str | None
    sampling_session_seq_id: int | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class SaveExternal(Body):
    """A named adapter for other programs: weights and their configuration."""

    kind: ClassVar[str] = SAVE_EXTERNAL
    name: str
    ttl_seconds: int | None = None


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def config_as_json(config: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_from_json(value: Mapping[str, Any]) -> RunConfig:
    return RunConfig(**{**value, "lora": LoraConfig(**value["lora"])})


def config_of(manifest: Manifest) -> RunConfig:
    """The configuration of a run that continues a checkpoint."""
    return RunConfig(manifest.base_model, manifest.lora, manifest.optimizer or "adamw")
