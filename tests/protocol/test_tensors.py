"""Tensors hold together, whatever they were made from."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.protocol import tinker_public_pb2 as pb
from holdfast.protocol.errors import InvalidTensorError
from holdfast.protocol.tensors import (
    DTYPES,
    ITEM_SIZE,
    Csr,
    DType,
    Tensor,
    pack_integers,
    unpack_integers,
)

LIMIT = 10_000


def values_of(dtype: DType) -> st.SearchStrategy[float]:
    if dtype == "float32":
        return st.floats(width=32)
    if dtype == "bfloat16":
        return st.integers(0, 2**16 - 1).map(
            lambda bits: struct.unpack("<f", struct.pack("<I", bits << 16))[0]
        )
    size = 8 * ITEM_SIZE[dtype] - 1
    return st.integers(-(2**size), 2**size - 1)


@st.composite
def dense_tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    size = math.prod(shape)
    values = draw(st.lists(values_of(dtype), min_size=size, max_size=size))
    return Tensor.of(values, dtype, shape)


@st.composite
def sparse_tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    crow, col = [0], list[int]()
    for _ in range(rows):
        row = sorted(draw(st.sets(st.integers(0, columns - 1)))) if columns else []
        col += row
        crow.append(len(col))
    values = draw(st.lists(values_of(dtype), min_size=len(col), max_size=len(col)))
    data = Tensor.of(values, dtype).data
    return Tensor(
        dtype, (rows, columns), data, Csr(pack_integers(crow, "int64"), pack_integers(col, "int64"))
    )


TENSORS = dense_tensors() | sparse_tensors()


@given(TENSORS)
def test_protobuf_round_trips_every_dtype_and_layout(tensor: Tensor) -> None:
    message = pb.Tensor()
    tensor.write_protobuf(message)
    assert Tensor.from_protobuf(pb.Tensor.FromString(message.SerializeToString())) == tensor


@given(TENSORS)
def test_json_keeps_every_value(tensor: Tensor) -> None:
    again = Tensor.from_json(tensor.to_json())
    assert again.shape == tensor.shape
    assert again.csr == tensor.csr
    assert np.array_equal(again.values(), tensor.values(), equal_nan=True)
    if tensor.dtype == "float32":
        assert bytes_without_nan_payload(again) == bytes_without_nan_payload(tensor)


def bytes_without_nan_payload(tensor: Tensor) -> bytes:
    array = tensor.to_numpy(max_elements=LIMIT)
    array[np.isnan(array)] = 0
    return array.tobytes()


@given(dense_tensors())
def test_numpy_round_trips(tensor: Tensor) -> None:
    array = tensor.to_numpy(max_elements=LIMIT)
    assert array.shape == tensor.shape
    assert array.flags.owndata or array.base is not None
    array[...] = array  # writable
    again = Tensor.from_numpy(array)
    if tensor.dtype == "bfloat16":
        assert again.dtype == "float32"
        assert np.array_equal(again.values(), tensor.values(), equal_nan=True)
    else:
        assert again == tensor


@given(sparse_tensors())
def test_sparse_becomes_the_dense_matrix(tensor: Tensor) -> None:
    assert tensor.csr is not None
    found = tensor.to_numpy(max_elements=LIMIT)
    expected = np.zeros(tensor.shape, dtype=found.dtype)
    crow = unpack_integers(tensor.csr.crow_indices, "int64")
    col = unpack_integers(tensor.csr.col_indices, "int64")
    for row in range(tensor.shape[0]):
        for place in range(crow[row], crow[row + 1]):
            expected[row, col[place]] = tensor.values()[place]
    assert np.array_equal(found, expected, equal_nan=True)


def test_torch_reads_the_sparse_form_alike() -> None:
    torch = pytest.importorskip("torch")
    dense = torch.tensor([[0, 0, 3.0], [0, 0, 0], [1.5, 0, -2]])
    import tinker

    sent = tinker.TensorData.from_torch_sparse(dense.repeat(1, 4))
    assert sent.sparse_crow_indices is not None
    assert sent.shape is not None
    ours = Tensor.from_json(
        {
            "data": sent.data,
            "dtype": sent.dtype,
            "shape": sent.shape,
            "sparse_crow_indices": sent.sparse_crow_indices,
            "sparse_col_indices": sent.sparse_col_indices,
        }
    )
    assert ours.csr is not None
    assert np.array_equal(ours.to_numpy(max_elements=100), dense.repeat(1, 4).numpy())


def test_bfloat16_rounds_to_nearest_even_like_torch() -> None:
    torch = pytest.importorskip("torch")
    values = [1.0, 1.00390625, 1.01171875, 3.14159, -0.0, 1e-40, 3.39e38, math.inf, -math.inf]
    ours = Tensor.of(values, "bfloat16")
    theirs = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)
    assert ours.values() == theirs.float().tolist()
    assert math.isnan(Tensor.of([math.nan], "bfloat16").values()[0])


def test_a_huge_sparse_shape_is_refused_before_anything_is_allocated() -> None:
    tensor = Tensor(
        "float32",
        (1, 2**39),
        struct.pack("<f", 1),
        Csr(pack_integers([0, 1], "int64"), pack_integers([2**39 - 1], "int64")),
    )
    with pytest.raises(InvalidTensorError, match="at most 1000"):
        tensor.to_numpy(max_elements=1000)


def csr(crow: list[int], col: list[int]) -> Csr:
    return Csr(pack_integers(crow, "int64"), pack_integers(col, "int64"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Tensor("float64", (1,), b"\0" * 8), "dtype 'float64'"),  # type: ignore[arg-type]
        (lambda: Tensor("float32", (2,), b"\0" * 4), "takes 2 values, 1 were given"),
        (lambda: Tensor("float32", (1,), b"\0" * 5), "no whole number"),
        (lambda: Tensor("float32", (-1,), b""), "whole numbers"),
        (lambda: Tensor("float32", (), b"\0" * 4), "0 dimensions"),
        (lambda: Tensor("float32", (1,) * 9, b"\0" * 4), "9 dimensions"),
        (lambda: Tensor("float32", (2**62, 2**62), b""), "too large"),
        (lambda: Tensor("float32", (2, 2, 2), b"", csr([0], [])), "two dimensions"),
        (lambda: Tensor("float32", (2, 2), b"", csr([0, 0], [])), "2 rows take 3"),
        (lambda: Tensor("float32", (2, 2), b"\0" * 4, csr([0, 0, 1], [])), "0 entries for 1"),
        (lambda: Tensor("float32", (2, 2), b"\0" * 4, csr([0, 0, 2], [0])), "from 0 to 2"),
        (lambda: Tensor("float32", (2, 2), b"\0" * 4, csr([1, 0, 1], [0])), "from 1 to 1"),
        (lambda: Tensor("float32", (2, 2), b"\0" * 4, csr([0, 2, 1], [0])), "passes|falls"),
        (lambda: Tensor("float32", (2, 2), b"\0" * 4, csr([0, -1, 1], [0])), "falls"),
        (lambda: Tensor("float32", (1, 2), b"\0" * 4, csr([0, 1], [2])), "column 2"),
        (lambda: Tensor("float32", (1, 2), b"\0" * 4, csr([0, 1], [-1])), "column -1"),
        (lambda: Tensor("float32", (1, 2), b"\0" * 8, csr([0, 2], [1, 1])), "column 1"),
        (lambda: Tensor("float32", (1, 2), b"", Csr(b"\0" * 7, b"")), "int64"),
        (lambda: Tensor.of([1, "2"], "int64"), "'2' is not a int64"),  # type: ignore[list-item]
        (lambda: Tensor.of([1.5], "int64"), "1.5"),
        (lambda: Tensor.of([2**31], "int32"), "2147483648"),
        (lambda: Tensor.of([True], "float32"), "true or false"),
        (lambda: Tensor.of([10**400], "float32"), "not a float32"),
        (lambda: Tensor.from_json({"data": [1], "dtype": "bool"}), "'bool'"),
        (lambda: Tensor.from_json({"data": [[1]], "dtype": "int64"}), r"\[1\] is not"),
        (lambda: Tensor.from_json({"data": "1", "dtype": "int64"}), "flat list"),
        (lambda: Tensor.from_json({"data": [1], "dtype": "int64", "shape": ["1"]}), "whole"),
        (lambda: Tensor.from_json({"data": [1], "dtype": "int64", "shape": [True]}), "whole"),
        (
            lambda: Tensor.from_json(
                {"data": [1], "dtype": "int64", "sparse_crow_indices": [0, 1]}
            ),
            "together",
        ),
        (lambda: Tensor.from_numpy(np.array(["a"])), "numbers are expected"),
    ],
)
def test_what_does_not_hold_together_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(InvalidTensorError, match=reason):
        make()


def test_without_a_shape_values_have_one_dimension() -> None:
    assert Tensor.from_json({"data": [1, 2], "dtype": "int64", "shape": None}).shape == (2,)
    assert Tensor.from_json({"data": [1], "dtype": "int64", "shape": []}).shape == (1,)
    message = pb.Tensor(dense=b"\0" * 8, dtype=pb.DTYPE_FLOAT32)
    assert Tensor.from_protobuf(message).shape == (2,)


def test_numpy_values_take_the_wires_dtypes() -> None:
    for given_, wire in [("int8", "int64"), ("uint32", "int64"), ("float64", "float32")]:
        assert Tensor.from_numpy(np.ones(2, dtype=given_)).dtype == wire
    backwards = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert Tensor.from_numpy(backwards).values() == [0, 3, 1, 4, 2, 5]


@given(
    data=st.binary(max_size=40),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=3),
    dtype=st.integers(-1, 6),
    crow=st.binary(max_size=32)
    | st.lists(st.integers(-1, 3)).map(lambda v: struct.pack(f"<{len(v)}q", *v)),
    col=st.binary(max_size=32)
    | st.lists(st.integers(-1, 3)).map(lambda v: struct.pack(f"<{len(v)}q", *v)),
    sparse=st.booleans(),
)
def test_hostile_messages_are_tensors_or_refused(
    data: bytes, shape: list[int], dtype: int, crow: bytes, col: bytes, sparse: bool
) -> None:
    message = pb.Tensor(shape=shape)
    message.dtype = dtype  # type: ignore[assignment]
    if sparse:
        message.sparse_csr.values = data
        message.sparse_csr.crow_indices = crow
        message.sparse_csr.col_indices = col
    else:
        message.dense = data
    try:
        tensor = Tensor.from_protobuf(message)
        array = tensor.to_numpy(max_elements=LIMIT)
    except InvalidTensorError:
        return
    assert array.shape == tuple(shape) or not shape
