"""forward_backward bodies and results, ours against the official client's own code."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
import tinker
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types as official
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)
from tinker.types.forward_backward_request import ForwardBackwardRequest

from holdfast.protocol import tinker_public_pb2 as pb
from holdfast.protocol.batches import BatchRequest, BatchResult
from holdfast.protocol.data import Audio, Chunk, Datum, EncodedText, Image, Span, text_tokens
from holdfast.protocol.errors import InvalidMessageError, InvalidTensorError, RequestError
from holdfast.protocol.samples import SampledSequence, SampleResult, TopK
from holdfast.protocol.tensors import DTYPES, DType, Tensor, pack_integers

TEXT = st.text(min_size=1, max_size=6)
TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5)
FLOATS = st.floats(width=32)


@st.composite
def dense(draw: st.DrawFn) -> Tensor:
    dtype: DType = draw(st.sampled_from(("float32", "int64")))
    shape = draw(st.lists(st.integers(0, 3), min_size=1, max_size=2))
    values: st.SearchStrategy[float] = FLOATS if dtype == "float32" else st.integers(-9, 9)
    size = math.prod(shape)
    return Tensor.of(draw(st.lists(values, min_size=size, max_size=size)), dtype, shape)


CHUNKS: st.SearchStrategy[Chunk] = (
    TOKENS.map(EncodedText.of)
    | st.builds(Image, st.binary(max_size=4), TEXT, st.none() | st.integers(0, 2**31 - 1))
    | st.binary(max_size=4).map(Audio)
)
SPANS = st.lists(
    st.builds(
        Span, st.sampled_from(("prompt", "sampled")), TEXT, st.integers(0, 9), st.integers(0, 9)
    ),
    max_size=2,
).map(tuple)
DATUMS = st.builds(
    Datum,
    st.lists(CHUNKS, max_size=3).map(tuple),
    st.dictionaries(TEXT, dense(), max_size=3),
    SPANS,
    SPANS,
)
REQUESTS = st.builds(
    BatchRequest,
    model_id=TEXT,
    seq_id=st.integers(1, 2**31 - 1),
    data=st.lists(DATUMS, max_size=3),
    loss_fn=TEXT,
    loss_fn_config=st.dictionaries(TEXT, st.floats(allow_nan=False) | TEXT, max_size=3),
    forward_only=st.booleans(),
)


@given(REQUESTS)
def test_requests_round_trip_through_protobuf(request: BatchRequest) -> None:
    data = request.to_protobuf()
    assert BatchRequest.from_protobuf(data) == request
    assert BatchRequest.from_protobuf(data).to_protobuf() == data


@given(REQUESTS)
def test_requests_round_trip_through_json(request: BatchRequest) -> None:
    text = json.dumps(request.to_json())
    again = BatchRequest.from_json(json.loads(text), forward_only=request.forward_only)
    assert [d.model_input for d in again.data] == [d.model_input for d in request.data]
    assert again.loss_fn_config == request.loss_fn_config
    assert (again.model_id, again.seq_id) == (request.model_id, request.seq_id)
    for mine, theirs in zip(again.data, request.data, strict=True):
        for name, tensor in theirs.loss_fn_inputs.items():
            found = mine.loss_fn_inputs[name]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert np.array_equal(found.values(), tensor.values(), equal_nan=True)


def official_request(**changes: Any) -> bytes:
    inputs: dict[str, Any] = {
        "target_tokens": np.array([2, 3, 4]),
        "weights": np.array([0.0, -1.25, math.nan], dtype=np.float32),
        **changes,
    }
    datum = official.Datum(
        model_input=official.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs
    )
    request = ForwardBackwardRequest(
        forward_backward_input=official.ForwardBackwardInput(
            data=[datum, datum], loss_fn="ppo", loss_fn_config={"low": 0.8, "kind": "x"}
        ),
        model_id="S:train:0",
        seq_id=7,
    )
    return forward_backward_request_to_proto(request).SerializeToString()


def test_the_official_clients_request_is_read() -> None:
    request = BatchRequest.from_protobuf(official_request())
    assert (request.model_id, request.seq_id, request.loss_fn) == ("S:train:0", 7, "ppo")
    assert request.loss_fn_config == {"low": 0.8, "kind": "x"}
    assert not request.forward_only
    assert len(request.data) == 2
    tokens = text_tokens(request.data[0].model_input)
    assert np.frombuffer(tokens, "<i4").tolist() == [1, 2, 3]
    targets = request.data[0].loss_fn_inputs["target_tokens"]
    assert (targets.dtype, targets.shape, targets.values()) == ("int64", (3,), [2, 3, 4])
    weights = request.data[0].loss_fn_inputs["weights"].values()
    assert weights[:2] == [0.0, -1.25]
    assert math.isnan(weights[2])


def test_the_official_clients_sparse_matrices_are_read() -> None:
    torch = pytest.importorskip("torch")
    wide = torch.zeros(3, 16)
    wide[0, 2], wide[2, 15] = 1.5, -2.0
    request = BatchRequest.from_protobuf(official_request(weights=wide))
    tensor = request.data[0].loss_fn_inputs["weights"]
    assert tensor.csr is not None, "it was sent dense: the case is not tested"
    assert np.array_equal(tensor.to_numpy(max_elements=48), wide.numpy())


@st.composite
def results(draw: st.DrawFn) -> BatchResult:
    names = draw(st.lists(TEXT, max_size=3, unique=True))
    layouts = {
        name: (draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(1, 3), max_size=1)))
        for name in names
    }
    outputs = []
    for _ in range(draw(st.integers(0, 4))):
        output = {}
        for name, (dtype, trailing) in layouts.items():
            shape = (draw(st.integers(0, 3)), *trailing)
            values = st.integers(0, 100)
            size = math.prod(shape)
            output[name] = Tensor.of(
                draw(st.lists(values, min_size=size, max_size=size)), dtype, shape
            )
        outputs.append(output)
    metrics = draw(st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=3))
    return BatchResult(outputs, metrics, draw(TEXT.filter(lambda t: ":" not in t)))


@given(results())
def test_results_round_trip_through_protobuf(result: BatchResult) -> None:
    assert BatchResult.from_protobuf(result.to_protobuf()) == result


@given(results())
def test_results_round_trip_through_json(result: BatchResult) -> None:
    again = BatchResult.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again.output_type == result.output_type
    assert again.metrics == {k: v for k, v in result.metrics.items() if math.isfinite(v)}
    for mine, theirs in zip(again.outputs, result.outputs, strict=True):
        assert {k: (t.shape, t.values()) for k, t in mine.items()} == {
            k: (t.shape, t.values()) for k, t in theirs.items()
        }


def test_what_json_has_no_number_for_is_null_and_read_as_nan() -> None:
    values = [math.nan, -1.25, -math.inf]
    result = BatchResult(
        [{"logprobs": Tensor.of(values, "float32"), "tokens": Tensor.of([3, 4, 5], "int64")}],
        {"loss:sum": math.nan, "loss:mean": 1.0},
    )
    body = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert body["loss_fn_outputs"][0]["logprobs"]["data"] == [None, -1.25, None]
    assert body["loss_fn_outputs"][0]["tokens"]["data"] == [3, 4, 5]
    assert body["metrics"] == {"loss:mean": 1.0}
    again = BatchResult.from_json(body).outputs[0]
    assert again["logprobs"].values() == pytest.approx([math.nan, -1.25, math.nan], nan_ok=True)
    assert again["tokens"].values() == [3, 4, 5]


def test_null_is_no_number_in_a_request() -> None:
    datum = {
        "model_input": {"chunks": []},
        "loss_fn_inputs": {"weights": {"data": [None, 1.0], "dtype": "float32"}},
    }
    body = {"forward_backward_input": {"data": [datum], "loss_fn": "x"}, "model_id": "m"}
    with pytest.raises(InvalidTensorError, match="None is not a float32"):
        BatchRequest.from_json({**body, "seq_id": 1}, forward_only=False)


def test_protobuf_has_every_number() -> None:
    values = [math.nan, -1.25, -math.inf]
    data = BatchResult([{"logprobs": Tensor.of(values, "float32")}], {"a:sum": math.inf})
    (theirs,) = deserialize_forward_backward_output(data.to_protobuf()).loss_fn_outputs
    (ours,) = BatchResult.from_protobuf(data.to_protobuf()).outputs
    assert theirs["logprobs"].data == pytest.approx(values, nan_ok=True)
    assert ours["logprobs"].values() == pytest.approx(values, nan_ok=True)


@given(results())
def test_the_official_client_reads_our_results(result: BatchResult) -> None:
    theirs = deserialize_forward_backward_output(result.to_protobuf())
    assert theirs.metrics == result.metrics
    assert len(theirs.loss_fn_outputs) == len(result.outputs)
    for mine, read in zip(result.outputs, theirs.loss_fn_outputs, strict=True):
        assert set(read) == set(mine)
        for name, tensor in mine.items():
            assert read[name].data == tensor.values()
            assert read[name].shape == list(tensor.shape)


def test_datums_of_different_widths_go_into_records_of_their_own() -> None:
    wide = {"logprobs": Tensor.of([1, 2, 3, 4], "float32", (2, 2))}
    flat = {"logprobs": Tensor.of([1, 2], "float32")}
    result = BatchResult([wide, flat, flat], {})
    message = pb.ForwardBackwardOutput.FromString(result.to_protobuf())
    assert [record.num_datums for record in message.loss_fn_outputs] == [1, 2]
    assert BatchResult.from_protobuf(result.to_protobuf()) == result


def test_the_example_of_two_datums() -> None:
    result = BatchResult(
        [
            {"logprobs": Tensor.of([0, 1, 2, 3, 4], "float32")},
            {"logprobs": Tensor.of([5, 6, 7], "float32")},
        ],
        {"loss:sum": 1.0},
    )
    record = pb.ForwardBackwardOutput.FromString(result.to_protobuf()).loss_fn_outputs[0]
    batched = record.fields["logprobs"]
    assert len(batched.data) == 32
    assert batched.offsets == struct.pack("<3q", 0, 20, 32)
    assert record.num_datums == 2


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (
            [{"a": Tensor.of([1], "float32")}, {"b": Tensor.of([1], "float32")}],
            "the datums of a batch have the same",
        ),
    ],
)
def test_results_that_have_no_wire_form_are_refused(outputs: Any, reason: str) -> None:
    with pytest.raises(InvalidTensorError, match=reason):
        BatchResult(outputs, {}).to_protobuf()


def sample_result() -> SampleResult:
    topk = TopK(
        Tensor.of([7, 3, 4, 0], "int32", (2, 2)),
        Tensor.of([-0.5, -1.5, -0.25, -99999.0], "float32", (2, 2)),
    )
    return SampleResult(
        sequences=[
            SampledSequence(
                Tensor.of([7, 4], "int32"), "stop", Tensor.of([-0.5, -0.25], "float32"), topk
            ),
            SampledSequence(Tensor.of([], "int32"), "length"),
        ],
        prompt_logprobs=Tensor.of([math.nan, -1.25], "float32"),
        topk_prompt_logprobs=TopK(
            Tensor.of([0, 0, 9, 8], "int32", (2, 2)),
            Tensor.of([-99999.0, -99999.0, -0.5, -1.0], "float32", (2, 2)),
        ),
        target_prompt_logprobs=Tensor.of([-0.5, 0.0], "float32", (1, 2)),
        prompt_alt_tokens=Tensor.of([3, 4], "int64", (1, 2)),
        prompt_alt_logprobs=Tensor.of([-1, -math.inf], "float32", (1, 2)),
        prompt_cache_hit_tokens=3,
    )


def test_the_official_client_reads_our_samples() -> None:
    mine = sample_result()
    theirs = deserialize_sample_response(mine.to_protobuf())
    assert [list(s.tokens) for s in theirs.sequences] == [[7, 4], []]
    assert [s.stop_reason for s in theirs.sequences] == ["stop", "length"]
    assert list(theirs.sequences[0].logprobs or []) == [-0.5, -0.25]
    assert theirs.prompt_logprobs == [None, -1.25]
    assert theirs.topk_prompt_logprobs == [None, [(9, -0.5), (8, -1.0)]]
    assert theirs.sequences[0].topk_logprobs == [[(7, -0.5), (3, -1.5)], [(4, -0.25)]]
    assert theirs.target_prompt_logprobs is not None
    assert theirs.target_prompt_logprobs.tolist() == [[-0.5, 0.0]]
    assert theirs.prompt_alt_tokens is not None
    assert theirs.prompt_alt_tokens.tokens.tolist() == [[3, 4]]
    assert theirs.prompt_cache_hit_tokens == 3


def test_samples_round_trip() -> None:
    result = sample_result()
    assert SampleResult.from_protobuf(result.to_protobuf()) == result
    body = json.loads(json.dumps(result.to_json(), allow_nan=False))
    again = SampleResult.from_json(body)
    assert body["type"] == "sample"
    assert body["prompt_logprobs"] == [None, -1.25]
    assert body["prompt_alt_tokens"]["logprobs"]["data"] == [-1.0, None]
    assert body["topk_prompt_logprobs"] == [None, [[9, -0.5], [8, -1.0]]]
    assert again.sequences == result.sequences
    assert again.prompt_logprobs is not None
    assert again.topk_prompt_logprobs == result.topk_prompt_logprobs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_id": ""}, "model_id"),
        ({"model_id": 3}, "model_id"),
        ({"seq_id": 0}, "seq_id 0"),
        ({"seq_id": "1"}, "seq_id '1'"),
        ({"seq_id": True}, "seq_id True"),
        ({"forward_backward_input": None}, "forward_backward_input is missing"),
        ({"forward_backward_input": {"data": {}, "loss_fn": "x"}}, "list of datums"),
        ({"forward_backward_input": {"data": [], "loss_fn": None}}, "loss_fn"),
        ({"forward_backward_input": {"data": [3], "loss_fn": "x"}}, "datum 0"),
        (
            {"forward_backward_input": {"data": [], "loss_fn": "x", "loss_fn_config": {"a": []}}},
            "a number or a text",
        ),
    ],
)
def test_wrong_json_is_named(change: dict[str, Any], reason: str) -> None:
    body = {
        "model_id": "M",
        "seq_id": 1,
        "forward_backward_input": {"data": [], "loss_fn": "cross_entropy"},
    }
    BatchRequest.from_json(body, forward_only=False)
    with pytest.raises(InvalidMessageError, match=reason):
        BatchRequest.from_json({**body, **change}, forward_only=False)


CHUNK_ERRORS = [
    ({"type": "encoded_text", "tokens": "12"}, "a list is expected"),
    ({"type": "encoded_text", "tokens": [1.5]}, "1.5"),
    ({"type": "video"}, "'video' is not one of"),
    ({"type": "image", "data": "!!", "format": "png"}, "base64"),
    ({"type": "image", "data": "", "format": 3}, "a text is expected"),
    ({"type": "image", "data": "", "format": "png", "expected_tokens": "1"}, "whole number"),
    (3, "an object with a type"),
]


@pytest.mark.parametrize(("chunk", "reason"), CHUNK_ERRORS)
def test_wrong_chunks_are_named_with_their_datum(chunk: Any, reason: str) -> None:
    body = {
        "model_id": "M",
        "seq_id": 1,
        "forward_input": {
            "data": [
                {"model_input": {"chunks": []}},
                {"model_input": {"chunks": [chunk]}, "loss_fn_inputs": {}},
            ],
            "loss_fn": "x",
        },
    }
    with pytest.raises(RequestError, match=reason) as caught:
        BatchRequest.from_json(body, forward_only=True)
    assert caught.value.message.startswith("datum 1: ")


def test_images_are_refused_where_text_is_needed() -> None:
    with pytest.raises(InvalidMessageError, match="chunk 1 is image"):
        text_tokens([EncodedText.of([1]), Image(b"", "png")])


def test_a_sparse_result_is_refused() -> None:
    from holdfast.protocol.tensors import Csr

    zero = pack_integers([0, 0], "int64")
    sparse = Tensor("float32", (1, 2), b"", Csr(zero, b""))
    with pytest.raises(InvalidTensorError, match="sparse"):
        BatchResult([{"a": sparse}], {}).to_protobuf()


# ---- hostile bytes ----


@settings(max_examples=300)
@given(st.data())
def test_damaged_messages_are_read_or_refused(data: st.DataObject) -> None:
    original = bytearray(
        data.draw(
            st.sampled_from(
                (
                    official_request(),
                    BatchResult([{"a": Tensor.of([1, 2], "float32")}], {"m": 1.0}).to_protobuf(),
                    sample_result().to_protobuf(),
                )
            )
        )
    )
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(original) - 1))
        original[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(original)))
    damaged = bytes(original[:cut]) if data.draw(st.booleans()) else bytes(original)
    for read in (
        BatchRequest.from_protobuf,
        BatchResult.from_protobuf,
        SampleResult.from_protobuf,
    ):
        try:
            read(damaged)
        except (InvalidMessageError, InvalidTensorError):
            pass


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (
        BatchRequest.from_protobuf,
        BatchResult.from_protobuf,
        SampleResult.from_protobuf,
    ):
        try:
            read(data)
        except (InvalidMessageError, InvalidTensorError):
            pass


@pytest.mark.parametrize("count", [-1, 2**40])
def test_a_record_of_countless_datums_is_refused(count: int) -> None:
    message = pb.ForwardBackwardOutput()
    message.loss_fn_outputs.add().num_datums = count
    with pytest.raises(InvalidMessageError, match="without fields"):
        BatchResult.from_protobuf(message.SerializeToString())


@pytest.mark.parametrize("offsets", [[0, 8, 4], [4, 8, 8], [0, 3, 8], [0, 8], [0, 2**60, 8], []])
def test_wrong_offsets_are_refused(offsets: list[int]) -> None:
    message = pb.ForwardBackwardOutput()
    record = message.loss_fn_outputs.add(num_datums=2)
    record.fields["a"].data = b"\0" * 8
    record.fields["a"].dtype = pb.DTYPE_FLOAT32
    record.fields["a"].offsets = struct.pack(f"<{len(offsets)}q", *offsets)
    with pytest.raises(InvalidMessageError, match=r"offsets|rows"):
        BatchResult.from_protobuf(message.SerializeToString())


def test_the_official_package_can_be_imported_beside_ours() -> None:
    assert tinker.__version__
    assert pb.DESCRIPTOR.package == "holdfast.protocol"
