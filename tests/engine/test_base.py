"""Loading a base model: the threads that compute it, and what is no base model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from holdfast.engine import base
from holdfast.engine.base import load_base, suitable_threads, usable_processors
from holdfast.engine.interface import EngineError


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


def write_model(directory: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=192,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


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
    write_model(tmp_path)
    loaded = load_base("model", str(tmp_path), threads=asked, token_budget=64)
    assert torch.get_num_threads() == used
    assert loaded.info.fingerprint["threads"] == used


LACKING = "model.layers.0.self_attn.q_proj.weight"


def configured(**changes: Any) -> Callable[[Path], None]:
    """Change the config.json of a directory, and leave its weights as they are."""

    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def shorten(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def leave_out(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors[LACKING]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shorten, "file not fully covered"),
        (leave_out, f"lack '{LACKING}' that its config.json asks for"),
        (configured(num_hidden_layers=3), "layers.1.input_layernorm.weight' and 17 more"),
        (configured(hidden_size=128), "'lm_head.weight' in shape (32, 192), and its config.json"),
        (configured(num_attention_heads=7), "not a multiple of the number of attention heads (7)"),
        (configured(hidden_size="big"), "expected int, got str (value: 'big')"),
        (configured(model_type="none-such"), "model type `none-such`"),
    ],
    ids=["short", "lacking", "deeper", "narrower", "heads", "text", "type"],
)
@pytest.mark.usefixtures("threads_before")
def test_a_directory_whose_parts_do_not_fit_is_no_base_model(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    """Transformers draws the weights that it does not find: other ones in every worker."""
    write_model(tmp_path)
    load_base("model", str(tmp_path), threads=1, token_budget=64)
    change(tmp_path)
    with pytest.raises(EngineError, match=re.escape(words)) as caught:
        load_base("model", str(tmp_path), threads=1, token_budget=64)
    assert caught.value.code == "model_not_loadable"
    assert caught.value.message.startswith(
        f"The base model 'model' cannot be loaded from {tmp_path}: "
    )
    assert "\n" not in caught.value.message
