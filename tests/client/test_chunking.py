"""Large batches: nothing is lost or reordered, and the parts' results make the whole's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client.chunking import combine, split
from holdfast.protocol.batches import BatchResult
from holdfast.protocol.data import Datum, EncodedText
from holdfast.protocol.tensors import Tensor


def datum(length: int) -> Datum:
    return Datum(
        (EncodedText.of(range(length)),), {"weights": Tensor.of([1.0] * length, "float32")}
    )


def length_of(item: Datum) -> int:
    (text,) = item.model_input
    assert isinstance(text, EncodedText)
    return len(text)


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=30),
    max_datums=st.integers(1, 10),
    max_bytes=st.integers(1, 2000),
)
def test_parts_are_the_data_in_order_within_the_limits(
    lengths: list[int], max_datums: int, max_bytes: int
) -> None:
    data = [datum(length) for length in lengths]
    parts = split(data, max_datums=max_datums, max_bytes=max_bytes)
    assert [item for part in parts for item in part] == data
    for part in parts:
        assert 1 <= len(part) <= max_datums
        size = sum(8 * length_of(item) for item in part)
        assert len(part) == 1 or size <= max_bytes


def result(datums: int, **metrics: float) -> BatchResult:
    named = {name.replace("__", ":"): value for name, value in metrics.items()}
    return BatchResult([{"a": Tensor.of([float(datums)], "float32")}] * datums, named)


def test_metrics_are_put_together_by_their_endings() -> None:
    whole = combine(
        [
            result(1, a__sum=1.0, b__mean=1.0, c__min=1.0, d__max=1.0, e__slack=1.0, f__unique=1.0),
            result(3, a__sum=2.0, b__mean=2.0, c__min=2.0, d__max=2.0, e__slack=2.0, f__unique=2.0),
        ]
    )
    assert whole.metrics == {
        "a:sum": 3.0,
        "b:mean": 1.75,
        "c:min": 1.0,
        "d:max": 2.0,
        "e:slack": 0.25,
        "f:unique": 1.0,
        "f:unique_1": 2.0,
    }
    assert [output["a"].values() for output in whole.outputs] == [[1.0], [3.0], [3.0], [3.0]]


def test_what_has_no_meaning_for_the_whole_is_left_out() -> None:
    parts = [
        result(1, a__sum=1.0, only__sum=1.0, b__median=1.0, plain=1.0),
        result(1, a__sum=1.0, b__median=2.0, plain=2.0),
    ]
    assert combine(parts).metrics == {"a:sum": 2.0}
    assert combine(parts[:1]) is parts[0]


@pytest.mark.parametrize("values", [(math.inf, -math.inf), (math.nan, 1.0)])
def test_sums_that_are_no_numbers_are_none(values: tuple[float, float]) -> None:
    parts = [result(1, a__sum=value) for value in values]
    assert math.isnan(combine(parts).metrics["a:sum"])


def test_hashes_wrap_around() -> None:
    parts = [result(1, a__hash2=2.0**63), result(1, a__hash2=2.0**63 + 4096)]
    assert combine(parts).metrics["a:hash2"] == 4096.0
