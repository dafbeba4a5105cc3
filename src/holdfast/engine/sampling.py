"""Samples from the model with a KV cache, and scores prompts by the plan that training uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from holdfast.engine.base import Base
from holdfast.engine.batch import check_token_ids, check_tokens
from holdfast.engine.forward import Network, log_softmax_, logits_blocks
from holdfast.engine.interface import EngineError
from holdfast.engine.payload import Array, SampledSequence, SampleOutput, SampleRequest, TopK
from holdfast.engine.plan import plan

MAX_SAMPLES = 128
MAX_TOPK = 1024
_TOGETHER = 16
"""Samples that are decoded in one batch; part of what fixes a sample's bits."""
_FILLER = -99999.0
_SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class Sampler:
    """Sampling for one base model, with whatever adapter is bound at the time."""

    def __init__(self, base: Base, network: Network, token_budget: int) -> None:
        self._base = base
        self._network = network
        self._budget = token_budget
        self._tokenizer: Callable[[list[int]], str] | None = None

    @torch.no_grad()
    def sample(self, request: SampleRequest, progress: Callable[[], None]) -> SampleOutput:
        """Answer a request; the same request, weights and fingerprint give the same answer.

        Raises EngineError (user) for a request that cannot be met.
        """
        prompt = self._check(request)
        scores = _PromptScores.of(request, len(prompt))
        if scores is not None:
            self._score_prompt(prompt, request, scores)
            progress()
        room = self._base.info.max_sequence_length - len(prompt)
        limit = room if request.max_tokens is None else min(request.max_tokens, room)
        sequences: list[SampledSequence] = []
        while len(sequences) < request.num_samples:
            first = len(sequences)
            count = min(_TOGETHER, request.num_samples - first)
            sequences += self._decode(prompt, request, first, count, limit, progress)
        return SampleOutput(
            sequences,
            prompt_logprobs=None if scores is None else scores.logprobs,
            topk_prompt=None if scores is None else scores.topk,
            target_prompt_logprobs=None if scores is None else scores.targets,
            prompt_alt=None if scores is None else scores.alternatives,
        )

    def _check(self, request: SampleRequest) -> Tensor:
        info = self._base.info
        vocabulary = info.vocab_size
        prompt = check_tokens("the prompt", request.prompt, vocabulary, info.max_sequence_length)
        length = len(prompt)
        _between("num_samples", request.num_samples, 1, MAX_SAMPLES)
        if request.max_tokens is not None:
            _between("max_tokens", request.max_tokens, 0, 1 << 31)
        if not (math.isfinite(request.temperature) and request.temperature >= 0):
            raise _invalid(f"temperature is {request.temperature}; it must be at least 0.")
        if not 0 < request.top_p <= 1:
            raise _invalid(f"top_p is {request.top_p}; it must be above 0 and at most 1.")
        if request.top_k != -1:
            _between("top_k", request.top_k, 1, 1 << 31)
        if request.seed is not None:
            _between("seed", request.seed, -(1 << 63), (1 << 63) - 1)
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
            _between(name, getattr(request, name), 0, min(MAX_TOPK, vocabulary))
        if request.prompt_logprobs_last_n is not None:
            if not request.prompt_logprobs:
                raise _invalid("prompt_logprobs_last_n needs prompt_logprobs.")
            _between("prompt_logprobs_last_n", request.prompt_logprobs_last_n, 1, length - 1)
        targets = request.target_prompt_tokens
        if targets is not None:
            if targets.ndim != 2 or len(targets) != length - 1:
                raise _invalid(
                    f"target_prompt_logprobs have shape {targets.shape}; for a prompt of {length} "
                    f"tokens ({length - 1}, K) is expected."
                )
            check_token_ids("target_prompt_logprobs", np.maximum(targets, 0), vocabulary)
        for stop in request.stop or ():
            if isinstance(stop, str) and not stop:
                raise _invalid("A stop string is empty.")
        return prompt

    def _score_prompt(self, prompt: Tensor, request: SampleRequest, scores: _PromptScores) -> None:
        """Fill in what is asked about the prompt; the bits of a forward over prompt[:-1]."""
        if len(prompt) < 2:
            return
        generator = _generator(request.seed, -1)
        part = plan([len(prompt) - 1], self._budget)[0]
        for start, stop, logits_TV in logits_blocks(self._network, part, [prompt[:-1]]):
            if scores.alternatives is not None:
                alternatives = _draw_many(
                    logits_TV, request.temperature, request.prompt_alt_tokens_k, generator
                )
            logprobs_TV = log_softmax_(logits_TV)
            following = prompt[start + 1 : stop + 1].to(logprobs_TV.device)
            rows = slice(start + 1, stop + 1)
            if scores.logprobs is not None:
                scores.logprobs[rows] = _numpy(logprobs_TV.gather(1, following[:, None])[:, 0])
            if scores.topk is not None:
                _put(scores.topk, rows, *logprobs_TV.topk(scores.topk.tokens.shape[1]))
            if scores.alternatives is not None:
                _put(scores.alternatives, rows, logprobs_TV.gather(1, alternatives), alternatives)
            if scores.targets is not None and request.target_prompt_tokens is not None:
                wanted = torch.from_numpy(request.target_prompt_tokens[start:stop].astype(np.int64))
                found = logprobs_TV.gather(1, wanted.clamp(min=0).to(logprobs_TV.device))
                scores.targets[start:stop] = np.where(wanted.numpy() >= 0, _numpy(found), np.nan)
        if scores.logprobs is not None and request.prompt_logprobs_last_n is not None:
            scores.logprobs[: len(prompt) - request.prompt_logprobs_last_n] = np.nan

    def _decode(
        self,
        prompt: Tensor,
        request: SampleRequest,
        first: int,
        count: int,
        limit: int,
        progress: Callable[[], None],
    ) -> list[SampledSequence]:
        """Samples number `first` to `first + count - 1`, decoded side by side.

        A sample that has ended stays in the batch to its end, so that the others' bits do not
        depend on it.
        """
        drafts = [_Draft(_generator(request.seed, first + i)) for i in range(count)]
        stop_ids, stop_texts = self._stops(request)
        k = request.topk_sample_logprobs
        if limit > 0:
            cache = DynamicCache(config=self._base.model.config)
            for start, stop in _prefill_blocks(len(prompt), self._budget):
                tokens = prompt[None, start:stop].to(self._network.device)
                logits_BV = self._network.following(tokens, cache)
            if count > 1:
                logits_BV = logits_BV.repeat_interleave(count, 0)
                cache.batch_repeat_interleave(count)
        for position in range(limit):
            logits_BV = logits_BV.float()
            logprobs_BV = torch.log_softmax(logits_BV, -1)
            chosen = [
                _draw(logits_BV[i], request.temperature, request.top_k, request.top_p, d.generator)
                for i, d in enumerate(drafts)
            ]
            top = logprobs_BV.topk(k) if k else None
            for i, draft in enumerate(drafts):
                if draft.stop_reason is None:
                    draft.tokens.append(chosen[i])
                    draft.logprobs.append(float(logprobs_BV[i, chosen[i]]))
                    if top is not None:
                        draft.topk.append((_numpy(top.indices[i]), _numpy(top.values[i])))
                    if chosen[i] in stop_ids or self._ends_with(draft.tokens, stop_texts):
                        draft.stop_reason = "stop"
            progress()
            if all(draft.stop_reason for draft in drafts) or position == limit - 1:
                break
            tokens = torch.tensor(chosen, device=self._network.device)[:, None]
            logits_BV = self._network.following(tokens, cache)
        return [draft.finished(k) for draft in drafts]

    def _stops(self, request: SampleRequest) -> tuple[frozenset[int], list[str]]:
        if request.stop is None:
            return frozenset(self._base.eos_token_ids), []
        ids = frozenset(stop for stop in request.stop if isinstance(stop, int))
        return ids, [stop for stop in request.stop if isinstance(stop, str)]

    def _ends_with(self, tokens: list[int], stops: list[str]) -> bool:
        """Whether the text of the tokens has a stop string in it, its last token included."""
        if not stops:
            return False
        # The stop string's own tokens and one before it: a token has at least one byte.
        longest = max(len(stop.encode()) for stop in stops)
        text = self._text(tokens[-longest - 4 :])
        return any(stop in text for stop in stops)

    def _text(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self._base.directory)
        return self._tokenizer(tokens)


class _Draft:
    """A sample as it grows."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.topk: list[tuple[Array, Array]] = []
        self.stop_reason: str | None = None

    def finished(self, k: int) -> SampledSequence:
        topk = None
        if k:
            topk = _empty_topk(len(self.tokens), k)
            for row, (tokens, logprobs) in enumerate(self.topk):
                topk.tokens[row], topk.logprobs[row] = tokens, logprobs
        return SampledSequence(
            np.array(self.tokens, dtype=np.int32),
            np.array(self.logprobs, dtype=np.float32),
            self.stop_reason or "length",
            topk,
        )


class _PromptScores:
    """What a request asks about its prompt, to be filled in."""

    def __init__(self, request: SampleRequest, length: int) -> None:
        self.logprobs: Array | None = None
        self.topk: TopK | None = None
        self.targets: Array | None = None
        self.alternatives: TopK | None = None
        if request.prompt_logprobs:
            self.logprobs = np.full(length, np.nan, dtype=np.float32)
        if request.topk_prompt_logprobs:
            self.topk = _empty_topk(length, request.topk_prompt_logprobs)
        if request.target_prompt_tokens is not None:
            shape = request.target_prompt_tokens.shape
            self.targets = np.full(shape, np.nan, dtype=np.float32)
        if request.prompt_alt_tokens_k:
            self.alternatives = _empty_topk(length, request.prompt_alt_tokens_k)

    @classmethod
    def of(cls, request: SampleRequest, length: int) -> _PromptScores | None:
        scores = cls(request, length)
        asked = (scores.logprobs, scores.topk, scores.targets, scores.alternatives)
        return scores if any(part is not None for part in asked) else None


def _empty_topk(length: int, k: int) -> TopK:
    return TopK(np.zeros((length, k), np.int32), np.full((length, k), _FILLER, np.float32))


def _put(topk: TopK, rows: slice, logprobs: Tensor, tokens: Tensor) -> None:
    topk.tokens[rows] = _numpy(tokens)
    topk.logprobs[rows] = _numpy(logprobs)


def _numpy(values: Tensor) -> Array:
    return values.cpu().numpy()


def _generator(seed: int | None, index: int) -> torch.Generator:
    """The random numbers of one sample, by the request's seed and the sample's number."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        mixed = np.random.SeedSequence([seed & ((1 << 64) - 1), index + 1]).generate_state(2)
        generator.manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)
    return generator


def _draw(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token: greedy at temperature 0, else from the k likeliest that make up top_p."""
    if temperature == 0:
        return int(logits_V.argmax())
    values, tokens = torch.sort(logits_V.cpu().double() / temperature, descending=True, stable=True)
    if top_k != -1:
        values, tokens = values[:top_k], tokens[:top_k]
    probabilities = torch.softmax(values, -1)
    cumulative = probabilities.cumsum(-1)
    if top_p < 1:
        # The smallest set whose probability reaches top_p.
        kept = int((cumulative - probabilities < top_p).sum())
        cumulative = cumulative[:kept]
    point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, point, right=True))
    return int(tokens[min(index, len(cumulative) - 1)])


def _draw_many(
    logits_TV: Tensor, temperature: float, count: int, generator: torch.Generator
) -> Tensor:
    """[T, count] distinct tokens per row; at temperature 0 the likeliest ones."""
    if temperature == 0:
        return logits_TV.topk(count).indices
    # The largest of logits with Gumbel noise: a draw without replacement.
    uniform = torch.rand(logits_TV.shape, generator=generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    return (logits_TV.cpu().double() / temperature + noise).topk(count).indices.to(logits_TV.device)


def _prefill_blocks(length: int, budget: int) -> list[tuple[int, int]]:
    return [(start, min(start + budget, length)) for start in range(0, length, budget)]


def _load_tokenizer(directory: Path) -> Callable[[list[int]], str]:
    try:
        if (directory / "tokenizer.json").is_file():
            fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
            return lambda tokens: str(fast.decode(tokens, skip_special_tokens=False))
        # Without any files transformers would make up a tokenizer from the model's type.
        if not any((directory / name).is_file() for name in _SLOW_TOKENIZERS):
            raise FileNotFoundError("the model's directory has no tokenizer files")
        slow = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # The tokenizers library raises bare exceptions.
        raise EngineError(
            "no_tokenizer",
            f"Stop strings need the base model's tokenizer, which cannot be loaded: {error}. "
            "Use token ids as stops.",
        ) from error
    return lambda tokens: str(slow.decode(tokens, skip_special_tokens=False))


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _invalid(f"{name} is {value}; it must be {low} to {high}.")


def _invalid(message: str) -> EngineError:
    return EngineError("invalid_sample_request", message)
