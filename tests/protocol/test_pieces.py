"""A large body that is read in pieces is what it would be as a whole, or wrong in the same way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.protocol import pieces
from holdfast.protocol.bodies import read_json
from holdfast.protocol.errors import InvalidMessageError
from holdfast.protocol.pieces import read_json_in_pieces

NAMES = st.sampled_from(["a", "b", 'a"', "[{", "\\", ""])
SCALARS = st.none() | st.booleans() | st.integers(-9, 99) | NAMES | st.floats(-1, 1)
ELEMENTS = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=3)
)
BATCHES = st.dictionaries(
    NAMES, st.dictionaries(NAMES, st.lists(ELEMENTS, max_size=6) | ELEMENTS, max_size=3), max_size=3
)
TEXTS = st.builds(
    lambda value, indent, ascii: json.dumps(value, indent=indent, ensure_ascii=ascii).encode(),
    BATCHES | ELEMENTS,
    st.sampled_from([None, 1]),
    st.booleans(),
)


def same(value: Any) -> Any:
    return value


def read(text: bytes, piece: int) -> Any:
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(pieces, "PIECE", piece)
        return read_json_in_pieces(text, same)


@given(TEXTS, st.sampled_from([0, 5, 20]))
def test_what_is_read_in_pieces_is_what_is_read_as_a_whole(text: bytes, piece: int) -> None:
    assert read(text, piece) == read_json(text)


@given(TEXTS, st.data(), st.sampled_from(list(b'[]{},:"\\0 ')))
def test_what_is_wrong_as_a_whole_is_wrong_in_pieces(
    text: bytes, data: st.DataObject, byte: int
) -> None:
    at = data.draw(st.integers(0, len(text)))
    changed = text[:at] + bytes([byte]) * data.draw(st.booleans()) + text[at + 1 :]
    try:
        expected = read_json(changed)
    except InvalidMessageError as error:
        with pytest.raises(InvalidMessageError) as caught:
            read(changed, 0)
        assert caught.value.message == error.message
    else:
        assert read(changed, 0) == expected


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": {"b": [{}, ]}}',
        b'{"a": {"b": [{} {}]}}',
        b'{"a": {"b": [, {}]}}',
        b'{"a": {"b": [{},, {}]}}',
        b'{"a": {"b": [{}}}',
        b'{"a": {"b": [{}]}',
        b'{"a": {"b": [{}]}}]',
        b'{"a": {"b": ["\xff"]}}',
        b'{"a": {"b": [{}], "c": "',
        b"",
    ],
)
def test_a_list_that_is_wrong_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidMessageError):
        read(text, 0)


def test_of_two_members_of_a_name_the_last_counts() -> None:
    text = b'{"a": {"b": [{"x": 1}], "b": [{"x": 2}]}, "a": {"b": [{"x": 3}], "b": [{"x": 4}]}}'
    assert read(text, 0) == read_json(text) == {"a": {"b": [{"x": 4}]}}


def test_elements_become_what_is_made_of_them() -> None:
    text = b'{"a": {"b": [{"x": [1]}, 2]}, "c": [3]}'
    found = read_json_in_pieces(text, lambda value: ("made", value))
    assert found == {"a": {"b": [("made", {"x": [1]}), ("made", 2)]}, "c": [3]}


def test_no_piece_has_much_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noted(data: bytes) -> Any:
        sizes.append(len(data))
        return read_json(data)

    monkeypatch.setattr(pieces, "read_json", noted)
    element = {"tokens": list(range(1000))}
    text = json.dumps({"a": {"data": [element] * 1000, "b": "c"}, "d": 1}).encode()
    assert read_json_in_pieces(text, same)["a"]["data"] == [element] * 1000
    assert len(text) > 50 * pieces.PIECE
    assert max(sizes) < pieces.PIECE + len(json.dumps(element)) + 10
    sizes.clear()
    read_json_in_pieces(json.dumps([element] * 1000).encode(), same)  # no batch
    assert max(sizes) > 50 * pieces.PIECE
