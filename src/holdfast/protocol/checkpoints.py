"""Bodies of saving and loading training state, and of what is known about checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from holdfast.protocol.bodies import (
    Body,
    Counter,
    Id,
    Metadata,
    SeqId,
    Text,
    Time,
    TtlSeconds,
)
from holdfast.protocol.paths import CheckpointType
from holdfast.protocol.training import OptimizerConfig

Path = Annotated[str, Field(max_length=2048)]


class SaveWeightsRequest(Body):
    model_id: Id
    path: str
    """The checkpoint's bare name."""
    seq_id: SeqId
    ttl_seconds: TtlSeconds | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsResponse(Body):
    path: Text
    type: Literal["save_weights"] = "save_weights"


class LoadWeightsRequest(Body):
    """A load into a living model (model_id, seq_id), or one that creates it (session_id, ..)."""

    path: Path
    optimizer: bool
    model_id: Id | None = None
    seq_id: SeqId | None = None
    session_id: Id | None = None
    model_seq_id: Counter | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None
    """Another owner's key. Never stored, logged or hashed with the body."""
    type: Literal["load_weights"] = "load_weights"

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        live = (self.model_id is not None, self.seq_id is not None)
        creating = (self.session_id is not None, self.model_seq_id is not None)
        if (all(live) and not any(creating)) or (all(creating) and not any(live)):
            return self
        raise ValueError(
            "load_weights takes model_id and seq_id for a living model, or session_id and"
            " model_seq_id to create one"
        )

    @property
    def creates(self) -> bool:
        return self.model_id is None


class LoadWeightsResponse(Body):
    """`step` and `pending_forward_backwards` are what was loaded; other servers omit them."""

    path: str | None = None
    model_id: str | None = None
    step: int | None = None
    pending_forward_backwards: int | None = None
    type: Literal["load_weights"] = "load_weights"


class WeightsInfoRequest(Body):
    tinker_path: Path


class WeightsInfoResponse(Body):
    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()
    step: int | None = None
    """optim_steps applied when it was saved."""
    pending_forward_backwards: int | None = None
    """forward_backwards accumulated and not applied when it was saved."""
    has_optimizer: bool | None = None
    user_metadata: Metadata | None = None


class SaveWeightsForSamplerRequest(Body):
    """With `path`, a named checkpoint; without, a sampling session that is listed nowhere."""

    model_id: Id
    seq_id: SeqId
    path: str | None = None
    sampling_session_seq_id: Counter | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: TtlSeconds | None = None
    user_metadata: Metadata | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsForSamplerResponse(Body):
    path: str | None = None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsExternalRequest(Body):
    model_id: Id
    path: str
    seq_id: SeqId
    ttl_seconds: TtlSeconds | None = None
    age_encryption_recipients: list[str] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class SaveWeightsExternalResponse(Body):
    path: Text
    type: Literal["save_weights_external"] = "save_weights_external"


class ExternalWeightsUrlsResponse(Body):
    urls: dict[str, str]
    expires: Time


class Checkpoint(Body):
    checkpoint_id: Text
    """`weights/NAME`"""
    checkpoint_type: CheckpointType
    time: Time
    tinker_path: Text
    size_bytes: int | None = None
    public: bool = False
    user_metadata: Metadata | None = None
    expires_at: Time | None = None
    step: int | None = None
    """optim_steps applied when it was saved; other servers omit it."""
    own_bytes: int | None = None
    """Those of `size_bytes` that no other checkpoint shares; other servers omit it."""


class CheckpointFile(Body):
    size: int
    hash: Text
    """blake3, in hex."""


class CheckpointInfo(Checkpoint):
    """Everything known about a checkpoint. Other servers have no such answer."""

    manifest: Text
    """The hash of all that is said here, and of the files."""
    owner: str
    base_model: str
    base_revision: str
    lora_rank: int
    lora_alpha: float
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    optimizer: str | None = None
    """The optimizer's type; absent without optimizer state."""
    pending_forward_backwards: int = 0
    incomplete: str | None = None
    """What the accumulated gradients lack."""
    parent: str | None = None
    """The manifest that it was copied or changed from."""
    files: dict[str, CheckpointFile]


class Cursor(Body):
    offset: int
    limit: int
    total_count: int


class CheckpointsListResponse(Body):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class SetTtlRequest(Body):
    """null takes the expiry away."""

    ttl_seconds: TtlSeconds | None = None


class DeleteCheckpointsRequest(Body):
    tinker_paths: Annotated[list[Path], Field(min_length=1, max_length=1000)]


class DeleteCheckpointsResponse(Body):
    """Each path is in one of the two."""

    deleted: list[str]
    failed: dict[str, str]
    """What was wrong, by path."""


class CopyWeightsRequest(Body):
    source_path: Path
    ttl_seconds: TtlSeconds | None = None
    destination_project_id: str | None = None
    session_id: Id | None = None
    model_seq_id: Counter | None = None

    @model_validator(mode="after")
    def _one_destination(self) -> Self:
        if (self.session_id is None) != (self.model_seq_id is None):
            raise ValueError("session_id and model_seq_id go together")
        if self.session_id is not None and self.destination_project_id is not None:
            raise ValueError(
                "copy_weights takes destination_project_id, or session_id and model_seq_id"
            )
        return self


class CopyWeightsResponse(Body):
    tinker_path: Text


class ArchiveUrlResponse(Body):
    url: Text
    expires: Time | None = None
