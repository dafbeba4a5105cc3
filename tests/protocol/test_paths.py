"""Checkpoint names and tinker:// paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.protocol.errors import InvalidNameError, InvalidPathError, RequestError
from holdfast.protocol.paths import (
    KIND_OF_TYPE,
    KINDS,
    TYPE_OF_KIND,
    CheckpointPath,
    check_name,
    check_user_name,
)

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
RUN_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,60}", fullmatch=True)


@pytest.mark.parametrize(
    "name", ["epoch-3-loss-1.23", "final", "000060", "a", "x" * 128, "a.b_c-d"]
)
def test_ordinary_names_are_allowed(name: str) -> None:
    assert check_user_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../../x",
        "a/b",
        ".hidden",
        "-x",
        "x" * 129,
        "x" * 500,
        "a\n",
        "a\0b",
        "a b",
        "é",
        "a%2Fb",
    ],
)
def test_other_names_are_refused_with_the_rule(name: str) -> None:
    with pytest.raises(InvalidNameError, match="1 to 128 characters"):
        check_name(name)


def test_reserved_names_are_the_servers() -> None:
    assert check_name("auto.12") == "auto.12"
    with pytest.raises(InvalidNameError, match="reserved"):
        check_user_name("auto.12")


@given(run_id=RUN_IDS, kind=st.sampled_from(KINDS), name=NAMES)
def test_paths_round_trip(run_id: str, kind: str, name: str) -> None:
    path = CheckpointPath.of(run_id, kind, name)
    assert CheckpointPath.parse(str(path)) == path
    assert CheckpointPath.parse(str(path).replace(":train", "%3Atrain")) == path
    assert KIND_OF_TYPE[path.checkpoint_type] == kind
    assert path.checkpoint_id == f"{kind}/{name}"


def test_percent_encoded_run_ids_are_decoded() -> None:
    assert CheckpointPath.parse("tinker://S%3Atrain%3A0/weights/a").run_id == "S:train:0"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("final", "does not begin with"),
        ("TINKER://r/weights/a", "does not begin with"),
        ("tinker://r/weights", "2 parts"),
        ("tinker://r/weights/a/b", "4 parts"),
        ("tinker://r/other/a", "not a kind of checkpoint"),
        ("tinker:///weights/a", "run id"),
        ("tinker://r/weights/", "checkpoint name"),
        ("tinker://%2e%2e/weights/a", "run id"),
        ("tinker://a%2Fb/weights/a", "run id"),
        ("tinker://r/weights/%2e%2e", "checkpoint name"),
    ],
)
def test_a_wrong_path_is_named_with_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(InvalidPathError, match=reason) as caught:
        CheckpointPath.parse(text)
    assert isinstance(caught.value, RequestError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.code == "invalid_path"


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for candidate in (text, f"tinker://{text}", f"tinker://r/weights/{text}"):
        try:
            path = CheckpointPath.parse(candidate)
        except InvalidPathError:
            continue
        assert "/" not in path.run_id
        assert "/" not in path.name
        assert path.name not in (".", "..")


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(InvalidPathError) as caught:
        CheckpointPath.parse("x" * 100_000)
    assert len(str(caught.value)) < 400


def test_types_and_kinds_are_one_to_one() -> None:
    assert {KIND_OF_TYPE[TYPE_OF_KIND[kind]] for kind in KINDS} == set(KINDS)
