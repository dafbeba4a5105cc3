"""Training data: chunks of model input, loss function inputs, and where they came from."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.protocol import tinker_public_pb2 as pb
from holdfast.protocol.errors import InvalidMessageError
from holdfast.protocol.tensors import Tensor, pack_integers, unpack_integers


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token ids, int32 little-endian."""

    tokens: bytes

    def __post_init__(self) -> None:
        if len(self.tokens) % 4:
            raise InvalidMessageError(
                f"encoded_text: {len(self.tokens)} bytes are no whole number of int32 tokens"
            )

    @classmethod
    def of(cls, tokens: Iterable[int]) -> EncodedText:
        return cls(pack_integers(tokens, "int32"))

    def ids(self) -> list[int]:
        return unpack_integers(self.tokens, "int32")

    def __len__(self) -> int:
        return len(self.tokens) // 4


@dataclass(frozen=True, slots=True)
class Image:
    data: bytes
    format: str
    expected_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ImagePointer:
    """An image kept elsewhere. It has a JSON form only."""

    location: str
    format: str
    expected_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Audio:
    """Discretised mel spectrogram, as its own serialised bytes."""

    dmel: bytes


Chunk = EncodedText | Image | ImagePointer | Audio


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a datum that was taken from a recorded sequence."""

    source: Literal["prompt", "sampled"]
    sequence_id: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence to train on, and what its loss needs."""

    model_input: tuple[Chunk, ...]
    loss_fn_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    model_input_spans: tuple[Span, ...] = ()
    loss_fn_input_spans: tuple[Span, ...] = ()


def text_tokens(chunks: Iterable[Chunk]) -> bytes:
    """The token ids of a text-only input, int32 little-endian.

    Raises InvalidMessageError for a chunk that is not text, naming its place and kind.
    """
    parts: list[bytes] = []
    for i, chunk in enumerate(chunks):
        if not isinstance(chunk, EncodedText):
            raise InvalidMessageError(
                f"model_input chunk {i} is {_KIND_NAME[type(chunk)]}: this server's base models"
                " take encoded_text only"
            )
        parts.append(chunk.tokens)
    return b"".join(parts)


_KIND_NAME: dict[type, str] = {
    EncodedText: "encoded_text",
    Image: "image",
    ImagePointer: "image_asset_pointer",
    Audio: "dmel",
}


# ---- JSON ----


def chunk_from_json(body: object) -> Chunk:
    """Read one chunk. Raises InvalidMessageError naming what is wrong."""
    if not isinstance(body, Mapping):
        raise InvalidMessageError(f"a chunk is an object with a type, not {body!r:.80}")
    kind = body.get("type", "encoded_text" if "tokens" in body else None)
    if kind == "encoded_text":
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise InvalidMessageError(
                f"encoded_text tokens: a list is expected, not {tokens!r:.80}"
            )
        return EncodedText.of(tokens)
    if kind == "image":
        return Image(_base64(body, "data"), _text(body, "format"), _expected_tokens(body))
    if kind == "image_asset_pointer":
        return ImagePointer(_text(body, "location"), _text(body, "format"), _expected_tokens(body))
    if kind == "dmel":
        return Audio(_base64(body, "dmel"))
    raise InvalidMessageError(
        f"chunk type {kind!r:.80} is not one of {', '.join(_KIND_NAME.values())}"
    )


def chunks_from_json(body: object) -> tuple[Chunk, ...]:
    """Read a `{"chunks": [..]}` model input."""
    chunks = body.get("chunks") if isinstance(body, Mapping) else None
    if not isinstance(chunks, list):
        raise InvalidMessageError('a model input is {"chunks": [..]}')
    return tuple(map(chunk_from_json, chunks))


def chunk_to_json(chunk: Chunk) -> dict[str, Any]:
    body: dict[str, Any] = {"type": _KIND_NAME[type(chunk)]}
    if isinstance(chunk, EncodedText):
        body["tokens"] = chunk.ids()
    elif isinstance(chunk, Audio):
        body["dmel"] = base64.b64encode(chunk.dmel).decode("ascii")
    else:
        body["format"] = chunk.format
        if isinstance(chunk, Image):
            body["data"] = base64.b64encode(chunk.data).decode("ascii")
        else:
            body["location"] = chunk.location
        if chunk.expected_tokens is not None:
            body["expected_tokens"] = chunk.expected_tokens
    return body


def datum_from_json(body: object) -> Datum:
    """Read `{"model_input": {"chunks": [..]}, "loss_fn_inputs": {name: tensor}}`."""
    if not isinstance(body, Mapping):
        raise InvalidMessageError(f"a datum is an object, not {body!r:.80}")
    inputs = body.get("loss_fn_inputs")
    if inputs is None:
        inputs = {}
    if not isinstance(inputs, Mapping):
        raise InvalidMessageError(f"loss_fn_inputs is an object, not {inputs!r:.80}")
    tensors: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if not isinstance(value, Mapping):
            raise InvalidMessageError(
                f"loss_fn_inputs {name!r:.80} is an object with data and dtype, not {value!r:.80}"
            )
        tensors[name] = Tensor.from_json(value)
    return Datum(chunks_from_json(body.get("model_input")), tensors)


def datum_to_json(datum: Datum) -> dict[str, Any]:
    """The JSON form, which has no provenance spans."""
    return {
        "model_input": {"chunks": [chunk_to_json(chunk) for chunk in datum.model_input]},
        "loss_fn_inputs": {name: tensor.to_json() for name, tensor in datum.loss_fn_inputs.items()},
    }


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise InvalidMessageError(f"chunk {key}: a text is expected, not {value!r:.80}")
    return value


def _base64(body: Mapping[str, Any], key: str) -> bytes:
    try:
        return base64.b64decode(_text(body, key), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidMessageError(f"chunk {key} is not base64: {error}") from None


def _expected_tokens(body: Mapping[str, Any]) -> int | None:
    value = body.get("expected_tokens")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidMessageError(f"expected_tokens {value!r:.80}: a whole number is expected")
    return value


# ---- protobuf ----


def chunk_from_protobuf(message: pb.Chunk) -> Chunk:
    kind = message.WhichOneof("chunk")
    if kind == "encoded_text":
        return EncodedText(message.encoded_text.tokens)
    if kind == "image":
        image = message.image
        expected = image.expected_tokens if image.HasField("expected_tokens") else None
        return Image(image.data, image.format, expected)
    if kind == "dmel":
        return Audio(message.dmel.dmel)
    raise InvalidMessageError("a chunk without content: encoded_text, image or dmel is expected")


def write_chunk(chunk: Chunk, message: pb.Chunk) -> None:
    """Fill an empty message. Raises InvalidMessageError for an image pointer."""
    if isinstance(chunk, EncodedText):
        message.encoded_text.tokens = chunk.tokens
    elif isinstance(chunk, Image):
        message.image.data = chunk.data
        message.image.format = chunk.format
        if chunk.expected_tokens is not None:
            message.image.expected_tokens = chunk.expected_tokens
    elif isinstance(chunk, Audio):
        message.dmel.dmel = chunk.dmel
    else:
        raise InvalidMessageError(
            "an image_asset_pointer cannot be sent in training data: send the image itself"
        )


def datum_from_protobuf(message: pb.Datum) -> Datum:
    # A slice of a repeated field is a list, which takes less time to go through.
    return Datum(
        tuple(map(chunk_from_protobuf, message.model_input[:])),
        {name: Tensor.from_protobuf(value) for name, value in message.loss_fn_inputs.items()},
        tuple(map(_span_from_protobuf, message.model_input_spans[:])),
        tuple(map(_span_from_protobuf, message.loss_fn_input_spans[:])),
    )


def write_datum(datum: Datum, message: pb.Datum) -> None:
    """Fill an empty message."""
    for chunk in datum.model_input:
        write_chunk(chunk, message.model_input.add())
    for name, tensor in datum.loss_fn_inputs.items():
        tensor.write_protobuf(message.loss_fn_inputs[name])
    for span in datum.model_input_spans:
        _write_span(span, message.model_input_spans.add())
    for span in datum.loss_fn_input_spans:
        _write_span(span, message.loss_fn_input_spans.add())


def _span_from_protobuf(message: pb.ProvenanceSpan) -> Span:
    kind = message.WhichOneof("span")
    if kind == "prompt_tokens":
        prompt = message.prompt_tokens
        return Span("prompt", prompt.sequence_id, prompt.offset, prompt.length)
    if kind == "sampled_tokens":
        sampled = message.sampled_tokens
        return Span("sampled", sampled.sequence_id, sampled.offset, sampled.length)
    raise InvalidMessageError("a provenance span without content")


def _write_span(span: Span, message: pb.ProvenanceSpan) -> None:
    target = message.prompt_tokens if span.source == "prompt" else message.sampled_tokens
    target.sequence_id = span.sequence_id
    target.offset = span.offset
    target.length = span.length
