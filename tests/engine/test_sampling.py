"""Sampling against a naive full forward, and prompt scores with the bits of forward."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from holdfast.engine.core import Core
from holdfast.engine.interface import AdamParams, EngineError
from holdfast.engine.payload import Array, Batch, Datum, ForwardOutput, SampleOutput, SampleRequest
from holdfast.engine.sampling import _draw
from holdfast.store import Store
from holdfast.store.model import Blob
from tests.engine.conftest import MakeCore
from tests.engine.helpers import CONFIGS, VOCAB, make_batch, run_config

PROMPT = np.random.default_rng(0).integers(3, VOCAB, 30).astype(np.int32)
GREEDY = SampleRequest(PROMPT, max_tokens=12, temperature=0.0, stop=[], seed=0)
RANDOM = SampleRequest(PROMPT, num_samples=3, max_tokens=12, stop=[], seed=4)


@pytest.fixture
def core(make_core: MakeCore) -> Core:
    return make_core("qwen3")


def sample(
    core: Core, request: SampleRequest, adapter: dict[str, Blob] | None = None
) -> SampleOutput:
    return SampleOutput.decode(core.sample(adapter, request.encode()))


def logprobs_after(core: Core, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [V] of the next token, by a full forward of whatever is active."""
    with torch.no_grad():
        logits = core.base.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
    return torch.log_softmax(logits[0, -1], -1)


def trained_adapter(core: Core, store: Store, rank: int = 8) -> dict[str, Blob]:
    core.create("run", run_config(rank))
    for i in range(2):
        core.forward_backward("run", i, make_batch(i).encode())
        core.optim_step("run", AdamParams(1e-2))
    files = core.copy_state("run", optimizer=False).files
    return {name: store.put_blob(parts) for name, parts in files.items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_cached_decoding_agrees_with_full_forwards(
    kind: str, make_core: MakeCore, store: Store
) -> None:
    """Sliding windows included: the prompt is longer than the small models' window of 16."""
    core = make_core(kind, budget=24)  # The prompt's cache is filled in two blocks.
    adapter = trained_adapter(core, store)
    output = sample(core, GREEDY, adapter)
    (sequence,) = output.sequences
    assert sequence.stop_reason == "length" and len(sequence.tokens) == 12
    tokens = PROMPT.tolist()
    largest = 0.0
    for token, logprob in zip(sequence.tokens.tolist(), sequence.logprobs.tolist(), strict=True):
        full = logprobs_after(core, tokens)
        assert token == int(full.argmax())
        largest = max(largest, abs(float(full[token]) - logprob))
        tokens.append(token)
    assert largest < 1e-5, largest
    bare = sample(core, GREEDY)
    assert bare.sequences[0].logprobs.tobytes() != sequence.logprobs.tobytes()


def test_a_seed_fixes_the_answer_whatever_happens_beside_it(core: Core, store: Store) -> None:
    adapter = trained_adapter(core, store)
    first = core.sample(adapter, RANDOM.encode())
    core.sample(None, GREEDY.encode())
    core.forward_backward("run", 5, make_batch(5).encode())
    core.optim_step("run", AdamParams(0.1))
    assert core.sample(adapter, RANDOM.encode()) == first
    other = dataclasses.replace(RANDOM, seed=5)
    assert core.sample(adapter, other.encode()) != first
    tokens = {s.tokens.tobytes() for s in SampleOutput.decode(first).sequences}
    assert len(tokens) == 3  # Each sample has random numbers of its own.


def test_a_sample_that_ends_does_not_change_the_others(core: Core) -> None:
    free = sample(core, RANDOM)
    stop = int(free.sequences[0].tokens[3])
    stopped = sample(core, dataclasses.replace(RANDOM, stop=[stop]))
    for whole, cut in zip(free.sequences, stopped.sequences, strict=True):
        n = len(cut.tokens)
        assert cut.tokens.tobytes() == whole.tokens[:n].tobytes()
        assert cut.logprobs.tobytes() == whole.logprobs[:n].tobytes()
    first = stopped.sequences[0]
    assert first.stop_reason == "stop"
    assert first.tokens.tolist().count(stop) == 1 and first.tokens[-1] == stop


def test_stop_none_means_end_of_sequence_and_empty_means_no_stop(core: Core) -> None:
    free = sample(core, GREEDY).sequences[0].tokens.tolist()
    object.__setattr__(core.base, "eos_token_ids", (free[4],))
    ended = sample(core, dataclasses.replace(GREEDY, stop=None)).sequences[0]
    assert ended.tokens.tolist() == free[: free.index(free[4]) + 1]
    assert ended.stop_reason == "stop"
    assert sample(core, GREEDY).sequences[0].tokens.tolist() == free


def test_stop_strings_end_at_the_token_that_completes_them(core: Core, tmp_path: Path) -> None:
    words = {f"<{i}>": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    object.__setattr__(core.base, "directory", tmp_path)
    request = dataclasses.replace(RANDOM, num_samples=1)
    free = sample(core, request).sequences[0].tokens.tolist()
    stop = f"{free[2]}><{free[3]}"  # Spans two tokens, and ends inside the second.
    ended = sample(core, dataclasses.replace(request, stop=["nowhere", stop])).sequences[0]
    assert (ended.tokens.tolist(), ended.stop_reason) == (free[:4], "stop")


def test_stop_strings_without_a_tokenizer(core: Core) -> None:
    with pytest.raises(EngineError, match="Use token ids as stops") as caught:
        sample(core, dataclasses.replace(GREEDY, stop=["x"]))
    assert (caught.value.code, caught.value.category) == ("no_tokenizer", "user")
    assert sample(core, GREEDY)


def test_max_tokens_and_the_context(core: Core) -> None:
    prompt = np.arange(595, dtype=np.int32) % VOCAB
    request = SampleRequest(prompt, stop=[], seed=1)
    (sequence,) = sample(core, request).sequences
    assert (len(sequence.tokens), sequence.stop_reason) == (5, "length")
    (none,) = sample(core, dataclasses.replace(request, max_tokens=0)).sequences
    assert (len(none.tokens), none.stop_reason) == (0, "length")


def frequencies(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    generator = torch.Generator().manual_seed(1)
    draws = [_draw(logits, temperature, top_k, top_p, generator) for _ in range(4000)]
    return np.bincount(draws, minlength=4) / 4000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, -1, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (0.5, -1, 1.0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (1.0, 2, 1.0, [0, 4 / 7, 0, 3 / 7]),
        (1.0, -1, 0.65, [0, 4 / 7, 0, 3 / 7]),
        (1.0, -1, 0.75, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, 3, 0.01, [0, 1, 0, 0]),
        (0.0, -1, 1.0, [0, 1, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(
    temperature: float, top_k: int, top_p: float, expected: list[float]
) -> None:
    found = frequencies(temperature, top_k, top_p)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert all(f == 0 for f, e in zip(found, expected, strict=True) if e == 0)


@pytest.mark.parametrize("budget", [256, 24])
def test_prompt_logprobs_have_the_bits_of_forward(
    budget: int, make_core: MakeCore, store: Store
) -> None:
    """The same row blocks too, where the prompt is longer than the budget."""
    core = make_core("gemma2", budget=budget)
    adapter = trained_adapter(core, store)
    request = SampleRequest(PROMPT, max_tokens=1, prompt_logprobs=True)
    found = sample(core, request, adapter).prompt_logprobs
    assert found is not None and np.isnan(found[0])
    inputs: dict[str, Array] = {
        "target_tokens": PROMPT[1:].astype(np.int64),
        "weights": np.ones(len(PROMPT) - 1, np.float32),
    }
    batch = Batch([Datum(PROMPT[:-1], inputs)], "cross_entropy")
    forward = ForwardOutput.decode(core.forward("run", batch.encode()))
    assert found[1:].tobytes() == forward.outputs[0]["logprobs"].tobytes()


def test_everything_about_the_prompt(core: Core) -> None:
    targets = np.full((len(PROMPT) - 1, 2), -1, np.int64)
    targets[4] = [7, 9]
    request = SampleRequest(
        PROMPT,
        max_tokens=3,
        seed=1,
        stop=[],
        temperature=0.0,
        prompt_logprobs=True,
        prompt_logprobs_last_n=4,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        prompt_alt_tokens_k=2,
        target_prompt_tokens=targets,
    )
    output = sample(core, request)
    assert output.prompt_logprobs is not None and output.target_prompt_logprobs is not None
    assert output.topk_prompt is not None and output.prompt_alt is not None
    assert np.isnan(output.prompt_logprobs).tolist() == [True] * 26 + [False] * 4
    assert output.topk_prompt.logprobs[0].tolist() == [-99999.0] * 3
    assert not output.topk_prompt.tokens[0].any()
    full = [logprobs_after(core, PROMPT[: i + 1].tolist()) for i in range(len(PROMPT) - 1)]
    for i, logprobs in enumerate(full):
        values, tokens = logprobs.topk(3)
        assert output.topk_prompt.tokens[i + 1].tolist() == tokens.tolist()
        np.testing.assert_allclose(output.topk_prompt.logprobs[i + 1], values, atol=1e-5)
        assert output.prompt_alt.tokens[i + 1].tolist() == tokens[:2].tolist()  # Greedy ones.
        np.testing.assert_allclose(output.prompt_alt.logprobs[i + 1], values[:2], atol=1e-5)
    found = output.target_prompt_logprobs
    np.testing.assert_allclose(found[4], full[4][[7, 9]], atol=1e-5)
    assert np.isnan(np.delete(found, 4, 0)).all()
    top = output.sequences[0].topk
    assert top is not None
    assert top.tokens[:, 0].tolist() == output.sequences[0].tokens.tolist()
    assert top.logprobs[:, 0].tobytes() == output.sequences[0].logprobs.tobytes()


def test_alternatives_are_drawn_without_repetition(core: Core) -> None:
    request = SampleRequest(PROMPT, max_tokens=0, seed=3, prompt_alt_tokens_k=5)
    one, two = sample(core, request).prompt_alt, sample(core, request).prompt_alt
    other = sample(core, dataclasses.replace(request, seed=4)).prompt_alt
    assert one is not None and two is not None and other is not None
    assert all(len(set(row)) == 5 for row in one.tokens[1:].tolist())
    assert one.tokens.tobytes() == two.tokens.tobytes() != other.tokens.tobytes()


def test_a_prompt_of_one_token(core: Core) -> None:
    request = SampleRequest(PROMPT[:1], max_tokens=2, stop=[], seed=0, prompt_logprobs=True)
    output = sample(core, request)
    assert output.prompt_logprobs is not None and np.isnan(output.prompt_logprobs).all()
    assert len(output.sequences[0].tokens) == 2


def test_adapters_beyond_the_cache_are_read_again(
    core: Core, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.engine.core._CACHED_ADAPTERS", 1)
    one, two = trained_adapter(core, store, 8), trained_adapter(core, store, 4)
    before = [core.sample(a, GREEDY.encode()) for a in (one, two, None)]
    assert [core.sample(a, GREEDY.encode()) for a in (one, two, None)] == before
    assert len(set(before)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": PROMPT[:0]}, "no tokens"),
        ({"prompt": np.full(3, VOCAB, np.int32)}, "outside the model's vocabulary"),
        ({"prompt": np.zeros(601, np.int32)}, "at most 600"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 129}, "num_samples is 129; it must be 1 to 128"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"topk_prompt_logprobs": VOCAB + 1}, "topk_prompt_logprobs is 98"),
        ({"prompt_logprobs_last_n": 2}, "needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 30}, "it must be 1 to 29"),
        ({"target_prompt_tokens": np.zeros((30, 1), np.int64)}, r"\(29, K\) is expected"),
        ({"target_prompt_tokens": np.full((29, 1), VOCAB)}, "outside the model's vocabulary"),
        ({"stop": [""]}, "stop string is empty"),
    ],
)
def test_requests_that_cannot_be_met(changes: dict[str, object], message: str, core: Core) -> None:
    request = dataclasses.replace(GREEDY, **changes)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=message) as caught:
        sample(core, request)
    assert caught.value.category == "user"


def test_a_body_that_is_no_request(core: Core) -> None:
    for body in (b"", make_batch(0).encode(), RANDOM.encode()[:-1]):
        with pytest.raises(EngineError) as caught:
            core.sample(None, body)
        assert caught.value.code == "invalid_sample_request"


def test_progress_is_told_with_every_token(core: Core) -> None:
    told: list[None] = []
    core._progress = lambda: told.append(None)
    sample(core, GREEDY)
    assert len(told) == 12
