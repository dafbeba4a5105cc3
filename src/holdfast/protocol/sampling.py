"""Bodies of sampling sessions and of sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator

from holdfast.protocol.bodies import Body, Counter, Id
from holdfast.protocol.data import Chunk, chunk_to_json, chunks_from_json
from holdfast.protocol.tensors import Tensor


def _read_tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, dict):
        raise ValueError("a tensor is an object with data and dtype")
    return Tensor.from_json(value)


def _read_chunks(value: object) -> tuple[Chunk, ...]:
    return value if isinstance(value, tuple) else chunks_from_json(value)


def _write_chunks(chunks: tuple[Chunk, ...]) -> dict[str, Any]:
    return {"chunks": [chunk_to_json(chunk) for chunk in chunks]}


ModelInputField = Annotated[
    tuple[Chunk, ...], PlainValidator(_read_chunks), PlainSerializer(_write_chunks)
]
TensorField = Annotated[
    Tensor, PlainValidator(_read_tensor), PlainSerializer(lambda tensor: tensor.to_json())
]
TopKCount = Annotated[int, Field(ge=0, le=1024)]


class CreateSamplingSessionRequest(Body):
    session_id: Id
    sampling_session_seq_id: Counter
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class CreateSamplingSessionResponse(Body):
    sampling_session_id: Id
    type: Literal["create_sampling_session"] = "create_sampling_session"


class GetSamplerResponse(Body):
    sampler_id: str
    base_model: str
    model_path: str | None = None


class JoinSamplingSessionRequest(Body):
    sampling_session_id: Id
    type: Literal["join_sampling_session"] = "join_sampling_session"


class JoinSamplingSessionResponse(Body):
    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"


class SamplingParams(Body):
    """`stop`: absent is the model's end of sequence, an empty list is no stop at all."""

    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=-1, ge=-1)
    top_p: float = Field(default=1.0, ge=0, le=1)


class SampleRequest(Body):
    prompt: ModelInputField
    sampling_params: SamplingParams = SamplingParams()
    num_samples: int = Field(default=1, ge=1, le=4096)
    sampling_session_id: Id | None = None
    seq_id: Counter | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool = False
    topk_prompt_logprobs: TopKCount = 0
    topk_sample_logprobs: TopKCount = 0
    target_prompt_logprobs: TensorField | None = None
    """int64 [len(prompt) - 1, K], -1 where nothing is asked; may be sparse."""
    prompt_alt_tokens_k: TopKCount = 0
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    record_stability_info: bool = False
    type: Literal["sample"] = "sample"
