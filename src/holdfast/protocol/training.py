"""Bodies of models and their training operations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from holdfast.protocol.bodies import Body, Counter, Finite, Id, Metadata, Seed, SeqId

Beta = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LoraConfig(Body):
    rank: int = Field(default=32, ge=1, le=65536)
    seed: Seed | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Body):
    """The kind of optimizer, fixed for a model's life; kinds may have keys of their own."""

    model_config = ConfigDict(extra="allow")

    type: str = "adamw"


class CreateModelRequest(Body):
    session_id: Id
    model_seq_id: Counter
    base_model: Annotated[str, Field(min_length=1, max_length=512)]
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()
    user_metadata: Metadata | None = None
    type: Literal["create_model"] = "create_model"


class CreateModelResponse(Body):
    model_id: Id
    type: Literal["create_model"] = "create_model"


class GetInfoRequest(Body):
    model_id: Id
    type: Literal["get_info"] = "get_info"


class ModelData(Body):
    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(Body):
    model_id: Id
    model_data: ModelData
    optimizer_config: OptimizerConfig = OptimizerConfig()
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    type: Literal["get_info"] = "get_info"


class UnloadModelRequest(Body):
    model_id: Id
    type: Literal["unload_model"] = "unload_model"


class UnloadModelResponse(Body):
    model_id: Id
    type: Literal["unload_model"] = "unload_model"


class AdamParams(Body):
    """One AdamW step's parameters; weight_decay is decoupled, grad_clip_norm 0 is off."""

    learning_rate: NotNegative = 1e-4
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: NotNegative = 1e-12
    weight_decay: NotNegative = 0.0
    grad_clip_norm: NotNegative = 0.0


class OtherOptimizerParams(Body):
    """One step's parameters of an optimizer other than AdamW, named by `type`."""

    model_config = ConfigDict(extra="allow")

    type: str
    learning_rate: NotNegative
    grad_clip_norm: Finite = 0.0


class OptimStepRequest(Body):
    """Either adam_params, or optimizer_params for a model of another optimizer type."""

    model_id: Id
    seq_id: SeqId
    adam_params: AdamParams | None = None
    optimizer_params: OtherOptimizerParams | None = None
    type: Literal["optim_step"] = "optim_step"


class OptimStepResponse(Body):
    metrics: dict[str, float] | None = None
    type: Literal["optim_step"] = "optim_step"
