"""The shipped base model is small, loads from its directory, and is what its card says."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from holdfast.cli import dates

MEBIBYTE = 1024 * 1024
# Everything but lone surrogates, which are not Unicode text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def on_card(directory: Path, row: str) -> str:
    card = (directory / "MODEL.md").read_text()
    found = re.search(rf"^\| {re.escape(row)} \| (.*) \|$", card, re.MULTILINE)
    assert found, f"the card has no row {row!r}"
    return found[1]


def test_the_directory_is_small_and_holds_no_pickle(directory: Path) -> None:
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert files.keys() == {
        "MODEL.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 8 * MEBIBYTE


def test_the_model_loads_whole_and_gives_finite_logits(model: Any, directory: Path) -> None:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    # lm_head is the embedding itself, so it is not stored a second time.
    assert stored == set(model.state_dict()) - {"lm_head.weight"}
    logits = model(input_ids=torch.arange(model.config.vocab_size)[None]).logits
    assert logits.shape == (1, 259, 259)
    assert logits.isfinite().all()


def test_the_card_tells_the_truth(model: Any, directory: Path) -> None:
    weights = (directory / "model.safetensors").read_bytes()
    assert on_card(directory, "parameters") == f"{model.num_parameters():,}"
    assert on_card(directory, "weights") == f"fp32, {len(weights):,} bytes"
    digest = hashlib.sha256(weights).hexdigest()
    assert on_card(directory, "SHA-256 of `model.safetensors`") == f"`{digest}`"
    longest = model.config.max_position_embeddings
    assert on_card(directory, "longest sequence") == f"{longest} tokens"
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_loss_on_the_card_is_the_loss_of_the_weights(
    model: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from tools.base_model import train

    stated = float(on_card(directory, "held-out loss").removesuffix(" nats per token"))
    assert train.held_out_loss(model) == pytest.approx(stated, abs=1e-3)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    assert train.held_out_loss(model) != pytest.approx(stated, abs=1e-3)


@given(TEXT)
def test_a_text_is_its_bytes_and_comes_back_unchanged(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_character_of_unicode_comes_back(tokenizer: Any) -> None:
    characters = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]
    for start in range(0, len(characters), 65_536):
        text = "".join(characters[start : start + 65_536])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_stand_beyond_the_bytes(tokenizer: Any, model: Any) -> None:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (256, 257, 258)
    config = model.config
    assert ids == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert len(tokenizer) == config.vocab_size == 259
    assert tokenizer.decode([256, 104, 105, 257], skip_special_tokens=True) == "hi"
    assert tokenizer.encode("hi<|eos|>") == [104, 105, 257]


def test_the_task_encodes_as_the_tokenizer_does(tokenizer: Any) -> None:
    for example in dates.DateTask(0).held_out:
        assert dates.encode(example.prompt) == tokenizer.encode(example.prompt)
        assert dates.decode(tokenizer.encode(example.answer)) == example.answer
