"""Batches and results keep every bit through their bytes."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from safetensors.numpy import save

from holdfast.engine.payload import (
    Batch,
    Datum,
    ForwardOutput,
    PayloadError,
    SampledSequence,
    SampleOutput,
    SampleRequest,
    TopK,
)


def batch() -> Batch:
    data = [
        Datum(
            np.arange(n, dtype=np.int32),
            {
                "target_tokens": np.arange(n * 2, dtype=np.int64).reshape(n, 2),
                "weights": np.linspace(-1, 1, n * 2, dtype=np.float32).reshape(n, 2),
            },
        )
        for n in (3, 11)
    ]
    return Batch(data, "cross_entropy", {"a": 0.25, "b": "text"})


def test_batch_round_trip() -> None:
    again = Batch.decode(batch().encode())
    assert again.loss_fn == "cross_entropy"
    assert again.loss_fn_config == {"a": 0.25, "b": "text"}
    for before, after in zip(batch().data, again.data, strict=True):
        assert before.tokens.tobytes() == after.tokens.tobytes()
        assert before.inputs.keys() == after.inputs.keys()
        for name, value in before.inputs.items():
            assert value.dtype == after.inputs[name].dtype
            assert np.array_equal(value, after.inputs[name])


def test_equal_batches_have_equal_bytes_whatever_the_order_of_their_keys() -> None:
    first = batch()
    second = Batch(
        [Datum(d.tokens, dict(sorted(d.inputs.items(), reverse=True))) for d in first.data],
        "cross_entropy",
        {"b": "text", "a": 0.25},
    )
    assert first.encode() == second.encode()
    before = first.encode()
    first.data[0].inputs["weights"][0, 0] += 1
    assert first.encode() != before


ARRAYS = st_numpy.arrays(
    st.sampled_from(["int64", "float32", "int32", "float64", "float16", "uint8", "bool"]),
    st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), ARRAYS, max_size=6),
    st.text(st.characters(codec="utf-8")),
)
def test_the_bytes_are_those_of_safetensors(
    outputs: dict[str, npt.NDArray[np.generic]], metric: str
) -> None:
    text = json.dumps(
        {"format": "holdfast.forward.1", "count": 1, "metrics": {metric: 1.5}},
        sort_keys=True,
        separators=(",", ":"),
    )
    tensors = {f"0.{name}": value for name, value in outputs.items()}
    assert ForwardOutput([outputs], {metric: 1.5}).encode() == save(
        tensors, metadata={"holdfast": text}
    )


def test_the_bytes_do_not_depend_on_an_array_s_place_in_memory() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = ForwardOutput([{"x": values}], {}).encode()
    assert ForwardOutput([{"x": np.asfortranarray(values)}], {}).encode() == expected
    assert ForwardOutput([{"x": np.tile(values, 2)[:, :4]}], {}).encode() == expected
    assert ForwardOutput([{"x": values.astype(">f4")}], {}).encode() == expected
    assert ForwardOutput([{"x": values.T}], {}).encode() != expected


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0\.x' is an array of <U1"):
        ForwardOutput([{"x": np.array(["a"])}], {}).encode()


def test_empty_batch() -> None:
    assert Batch.decode(Batch([], "cross_entropy").encode()).data == []


def test_forward_output_round_trip() -> None:
    output = ForwardOutput(
        [{"logprobs": np.array([-0.5, np.nan], np.float32)}, {"logprobs": np.zeros(0, np.float32)}],
        {"loss:sum": 1 / 3},
    )
    again = ForwardOutput.decode(output.encode())
    assert again.metrics == {"loss:sum": 1 / 3}
    assert [o["logprobs"].tobytes() for o in again.outputs] == [
        o["logprobs"].tobytes() for o in output.outputs
    ]


def test_sample_round_trip() -> None:
    request = SampleRequest(
        prompt=np.array([1, 2], np.int32), stop=["\n"], target_prompt_tokens=np.array([[3, -1]])
    )
    again = SampleRequest.decode(request.encode())
    assert again.encode() == request.encode()
    assert again.stop == ["\n"]
    topk = TopK(np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32))
    output = SampleOutput(
        [SampledSequence(np.array([7], np.int32), np.array([-1], np.float32), "stop", topk)],
        prompt_logprobs=np.array([np.nan, -2], np.float32),
        topk_prompt=topk,
    )
    back = SampleOutput.decode(output.encode())
    assert back.encode() == output.encode()
    assert back.sequences[0].topk is not None and back.prompt_alt is None


@pytest.mark.parametrize("data", [b"", b"\xff" * 32, ForwardOutput([], {}).encode()])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PayloadError):
        Batch.decode(data)
