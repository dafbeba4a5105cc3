"""What callers build and get: data to train on, parameters, results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from holdfast.protocol import sampling, training
from holdfast.protocol.bodies import describe
from holdfast.protocol.checkpoints import (
    Checkpoint,
    CheckpointsListResponse,
    Cursor,
    LoadWeightsResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    WeightsInfoResponse,
)
from holdfast.protocol.data import Audio, Chunk, EncodedText, Image, ImagePointer, Span
from holdfast.protocol.data import Datum as WireDatum
from holdfast.protocol.errors import InvalidMessageError, InvalidTensorError
from holdfast.protocol.paths import CheckpointPath
from holdfast.protocol.rest import (
    GetSessionResponse,
    ListSessionsResponse,
    SessionSearchRequest,
    SessionSearchResponse,
    TrainingRun,
    TrainingRunsResponse,
)
from holdfast.protocol.sampling import GetSamplerResponse
from holdfast.protocol.sessions import GetServerCapabilitiesResponse, SupportedModel
from holdfast.protocol.tensors import Tensor
from holdfast.protocol.training import (
    GetInfoResponse,
    LoraConfig,
    ModelData,
    OptimizerConfig,
    OptimStepResponse,
    OtherOptimizerParams,
    UnloadModelResponse,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = [
    "AdamParams",
    "Checkpoint",
    "CheckpointPath",
    "CheckpointsListResponse",
    "Cursor",
    "Datum",
    "DmelChunk",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "GetSamplerResponse",
    "GetServerCapabilitiesResponse",
    "GetSessionResponse",
    "ImageAssetPointerChunk",
    "ImageChunk",
    "ListSessionsResponse",
    "LoadWeightsResponse",
    "LoraConfig",
    "ModelData",
    "ModelInput",
    "ModelInputChunk",
    "OptimStepResponse",
    "OptimizerConfig",
    "OtherOptimizerParams",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "SessionSearchRequest",
    "SessionSearchResponse",
    "Span",
    "SupportedModel",
    "TensorData",
    "TrainingRun",
    "TrainingRunsResponse",
    "UnloadModelResponse",
    "WeightsInfoResponse",
]


class _Parameters(BaseModel):
    """Read from a caller: a name that is no parameter's does not leave that at its default."""

    model_config = ConfigDict(extra="forbid")

    if not TYPE_CHECKING:  # to which each has a parameter of its own

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                errors, name = error.errors(include_url=False), type(self).__name__
                message = describe(errors)
                if any(each["type"] == "extra_forbidden" for each in errors):
                    message += f"; the parameters are {', '.join(type(self).model_fields)}"
                raise InvalidMessageError(f"{name}: {message}") from None


class AdamParams(training.AdamParams, _Parameters):
    """One AdamW step's parameters; weight_decay is decoupled, grad_clip_norm 0 is off.

    Raises InvalidMessageError for a value that is out of range, and for a name that is none of
    theirs.
    """


class SamplingParams(sampling.SamplingParams, _Parameters):
    """`stop`: absent is the model's end of sequence, an empty list is no stop at all.

    Raises InvalidMessageError for a value that is out of range, and for a name that is none of
    theirs.
    """


TensorDtype = Literal["float32", "int64"]

_DTYPE_OF_INPUT: Mapping[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}
_DENSE_LIMIT = 1 << 31


class TensorData:
    """A tensor of float32 or int64, dense or sparse (CSR).

    >>> TensorData([1.0, 2.0], "float32").tolist()
    [1.0, 2.0]
    """

    __slots__ = ("tensor",)

    def __init__(
        self,
        data: Iterable[float] | npt.NDArray[Any],
        dtype: TensorDtype,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: list[int] | None = None,
        sparse_col_indices: list[int] | None = None,
    ) -> None:
        """`data` is flat and row-major; for a sparse tensor it holds the listed values."""
        flatten = getattr(data, "ravel", None)
        values = flatten().tolist() if flatten is not None else list(data)
        if shape is None and flatten is not None:
            shape = list(getattr(data, "shape", ()))
        self.tensor = Tensor.from_json(
            {
                "data": values,
                "dtype": dtype,
                "shape": None if shape is None else list(shape),
                "sparse_crow_indices": sparse_crow_indices,
                "sparse_col_indices": sparse_col_indices,
            }
        )

    @classmethod
    def of(cls, tensor: Tensor) -> TensorData:
        """Wrap a tensor of the wire."""
        made = cls.__new__(cls)
        made.tensor = tensor
        return made

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> TensorData:
        """From an array of any integer or float dtype."""
        tensor = Tensor.from_numpy(array if array.ndim else array.reshape(1))
        if tensor.dtype == "int32":
            tensor = Tensor.from_numpy(array.astype("int64"))
        return cls.of(tensor)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """From a torch tensor; floats become float32."""
        detached = tensor.detach().cpu()
        if detached.is_floating_point():
            detached = detached.float()
        return cls.from_numpy(detached.contiguous().numpy())

    @property
    def dtype(self) -> TensorDtype:
        return "int64" if self.tensor.dtype in ("int64", "int32") else "float32"

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape)

    @property
    def data(self) -> list[Any]:
        """The stored values, flat."""
        return self.tensor.values()

    @property
    def is_sparse(self) -> bool:
        return self.tensor.csr is not None

    def to_numpy(self) -> npt.NDArray[Any]:
        """The dense array, in its shape."""
        array = self.tensor.to_numpy(max_elements=_DENSE_LIMIT)
        return array.astype("int64") if self.tensor.dtype == "int32" else array

    def to_torch(self) -> torch.Tensor:
        """The dense torch tensor, in its shape."""
        import torch

        return torch.from_numpy(self.to_numpy())

    def tolist(self) -> list[Any]:
        """The dense values, nested by shape."""
        if self.tensor.csr is None and len(self.tensor.shape) == 1:
            return self.tensor.values()
        nested: list[Any] = self.to_numpy().tolist()
        return nested

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorData) and self.tensor == other.tensor

    def __hash__(self) -> int:
        return hash(self.tensor)

    def __repr__(self) -> str:
        layout = ", sparse" if self.is_sparse else ""
        return f"TensorData({self.dtype}, shape={self.shape}{layout})"


@dataclass(frozen=True, slots=True)
class EncodedTextChunk:
    """Token ids."""

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class ImageChunk:
    """An image's bytes; `format` is png or jpeg."""

    data: bytes
    format: str
    expected_tokens: int | None = None
    type: Literal["image"] = "image"


@dataclass(frozen=True, slots=True)
class ImageAssetPointerChunk:
    """An image kept elsewhere; for sampling prompts only."""

    location: str
    format: str
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"


@dataclass(frozen=True, slots=True)
class DmelChunk:
    """Audio as a discretised mel spectrogram."""

    dmel: bytes
    type: Literal["dmel"] = "dmel"


ModelInputChunk = EncodedTextChunk | ImageChunk | ImageAssetPointerChunk | DmelChunk


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What a model reads: a sequence of chunks, mostly of one with token ids.

    >>> ModelInput.from_ints([1, 2, 3]).length
    3
    """

    chunks: Sequence[ModelInputChunk] = ()

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        return cls([EncodedTextChunk(list(tokens))])

    @classmethod
    def empty(cls) -> ModelInput:
        return cls()

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """A longer input; this one is left as it is."""
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        return self.append(EncodedTextChunk([token]))

    def to_ints(self) -> list[int]:
        """The token ids. Raises ValueError when there are chunks of another kind."""
        tokens: list[int] = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise ValueError(f"a {chunk.type} chunk has no token ids")
            tokens.extend(chunk.tokens)
        return tokens

    @property
    def length(self) -> int:
        """Tokens; an image counts as its expected_tokens."""
        total = 0
        for chunk in self.chunks:
            if isinstance(chunk, EncodedTextChunk):
                total += chunk.length
            elif isinstance(chunk, ImageChunk | ImageAssetPointerChunk):
                if chunk.expected_tokens is None:
                    raise ValueError("an image without expected_tokens has no known length")
                total += chunk.expected_tokens
            else:
                raise ValueError("the length of a dmel chunk is known to the server alone")
        return total

    def to_wire(self) -> tuple[Chunk, ...]:
        """The chunks as they are sent. Raises InvalidTensorError for what are no token ids."""
        return tuple(map(_chunk_to_wire, self.chunks))


def _chunk_to_wire(chunk: ModelInputChunk) -> Chunk:
    if isinstance(chunk, EncodedTextChunk):
        return EncodedText.of(chunk.tokens)
    if isinstance(chunk, ImageChunk):
        return Image(chunk.data, chunk.format, chunk.expected_tokens)
    if isinstance(chunk, ImageAssetPointerChunk):
        return ImagePointer(chunk.location, chunk.format, chunk.expected_tokens)
    return Audio(chunk.dmel)


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence to train on, with what its loss needs by name.

    Values may be TensorData, numpy arrays, torch tensors or, for the names that losses define,
    lists.

    >>> datum = Datum(
    ...     model_input=ModelInput.from_ints([1, 2, 3]),
    ...     loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]},
    ... )
    >>> datum.loss_fn_inputs["weights"].tolist()
    [0.0, 1.0, 1.0]
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = {name: _as_tensor(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", tensors)

    def to_wire(self) -> WireDatum:
        tensors: Mapping[str, TensorData] = self.loss_fn_inputs
        return WireDatum(
            self.model_input.to_wire(), {name: data.tensor for name, data in tensors.items()}
        )


def _as_tensor(name: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if isinstance(value, Tensor):
        return TensorData.of(value)
    if hasattr(value, "detach"):
        return TensorData.from_torch(value)
    if hasattr(value, "__array__"):
        return TensorData.from_numpy(value)
    if not isinstance(value, list | tuple):
        raise InvalidTensorError(
            f"loss_fn_inputs {name!r} is a {type(value).__name__}: TensorData, an array, a tensor"
            " or a list is expected"
        )
    dtype = _DTYPE_OF_INPUT.get(name)
    if dtype is None:
        raise InvalidTensorError(
            f"loss_fn_inputs {name!r} is a list, and its dtype is not known: give a TensorData;"
            f" lists are for {', '.join(_DTYPE_OF_INPUT)}"
        )
    if value and isinstance(value[0], list | tuple):
        width = len(value[0])
        if any(not isinstance(row, list | tuple) or len(row) != width for row in value):
            raise InvalidTensorError(f"loss_fn_inputs {name!r}: the rows differ in length")
        flat = [item for row in value for item in row]
        return TensorData.of(Tensor.of(flat, dtype, (len(value), width)))
    return TensorData.of(Tensor.of(value, dtype))


@dataclass(frozen=True, slots=True)
class ForwardBackwardOutput:
    """The result of forward and forward_backward: per datum its outputs by name, and metrics."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class SampledSequence:
    tokens: list[int]
    """The stop token included when one ended it."""
    logprobs: list[float] | None
    stop_reason: Literal["stop", "length"]
    topk_logprobs: list[list[tuple[int, float]] | None] | None = None
    sequence_id: str | None = None


@dataclass(frozen=True, slots=True)
class SampleResponse:
    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    """One per prompt token; the first has none."""
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: TensorData | None = None
    prompt_alt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
