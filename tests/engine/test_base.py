"""Loading a base model: the threads that compute it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from holdfast.engine import base
from holdfast.engine.base import load_base, suitable_threads, usable_processors


@pytest.mark.parametrize(
    ("hidden_size", "processors", "threads"),
    [
        (16, 64, 1),
        (64, 2, 1),
        (128, 2, 2),
        (128, 64, 2),
        (256, 64, 8),
        (768, 2, 2),
        (768, 16, 16),
        (4096, 64, 64),
        (4096, 1, 1),
    ],
)
def test_narrow_models_are_computed_by_few_threads(
    hidden_size: int, processors: int, threads: int
) -> None:
    assert suitable_threads(hidden_size, processors) == threads


@pytest.mark.parametrize(
    ("content", "processors"),
    [
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("max 100000", 8),
        ("", 8),
        (None, 8),
    ],
)
def test_a_container_uses_the_processors_it_is_granted(
    content: str | None, processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    if content is not None:
        quota.write_text(content)
    assert usable_processors(quota) == processors


@pytest.fixture
def threads_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("asked", "used"), [(None, 4), (3, 3), (1, 1)])
@pytest.mark.usefixtures("threads_before")
def test_the_threads_are_set_and_are_a_part_of_the_numerics(
    asked: int | None, used: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "usable_processors", lambda: 4)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=192,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = load_base("model", str(tmp_path), threads=asked, token_budget=64)
    assert torch.get_num_threads() == used
    assert loaded.info.fingerprint["threads"] == used
