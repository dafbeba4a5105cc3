"""Runs one micro-batch: trunk, head in row blocks, loss, and backward through both.

Legend: B sequences, W padded width, T tokens without padding, K targets per token, H hidden size,
V vocabulary. Right padding needs no mask: under causal attention no token sees what follows it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from holdfast.engine.base import Base
from holdfast.engine.batch import CheckedBatch
from holdfast.engine.interface import EngineError
from holdfast.engine.plan import MicroBatch


class Network:
    """A causal language model as two halves: its trunk, and its head with the final transform.

    The head is the model's own forward with the trunk replaced by a stub, so that softcaps and
    scalings after the last matrix product are the model's own code.
    """

    def __init__(self, base: Base) -> None:
        self._model = base.model
        self._prefix = base.model.base_model_prefix
        self.device = base.device
        self.splits = self._check_split()
        """Whether the head gives the same bits apart from the trunk."""

    def trunk(self, tokens_BW: Tensor, **cache: Any) -> Tensor:
        """Hidden states [B, W, H] of token ids, after the trunk's last norm."""
        outputs = getattr(self._model, self._prefix)(
            input_ids=tokens_BW, use_cache=bool(cache), **cache
        )
        return cast(Tensor, outputs.last_hidden_state)

    def head(self, hidden_BWH: Tensor) -> Tensor:
        """Logits [B, W, V] of hidden states."""
        view = copy.copy(self._model)
        view._modules = {**self._model._modules, self._prefix: _Trunk(hidden_BWH)}
        return cast(Tensor, view(input_ids=None, use_cache=False).logits)

    def whole(self, tokens_BW: Tensor, **cache: Any) -> Tensor:
        """Logits [B, W, V] of token ids by the model's undivided forward."""
        return cast(Tensor, self._model(input_ids=tokens_BW, use_cache=bool(cache), **cache).logits)

    def following(self, tokens_BW: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] of what follows, after the tokens in the cache and these."""
        if not self.splits:
            return self.whole(tokens_BW, past_key_values=cache)[:, -1]
        return self.head(self.trunk(tokens_BW, past_key_values=cache)[:, -1:])[:, -1]

    @torch.no_grad()
    def _check_split(self) -> bool:
        vocabulary = self._model.get_input_embeddings().num_embeddings
        tokens = (torch.arange(24, device=self.device) * 7 % vocabulary).view(1, 24)
        try:
            return torch.equal(self.whole(tokens), self.head(self.trunk(tokens)))
        except (TypeError, AttributeError, RuntimeError, ValueError):
            return False


class _Trunk(nn.Module):
    """Stands in for the trunk and gives hidden states that are there already."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPast:
        return _TrunkOutput(last_hidden_state=self._hidden)


class _TrunkOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    """Has nothing of the further outputs that some heads pass on (router logits, …)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _TargetLogprobs(torch.autograd.Function):
    """log_softmax and gather, in place over the logits; the bits of the plain operations.

    The logits are overwritten, and so is what was kept of them in backward: two buffers [T, V]
    in all instead of four. A model that needs its logits again fails in backward (autograd's
    version check) and is never wrong in silence.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_TK: Tensor) -> Tensor:
        logprobs_TV = log_softmax_(logits_TV)
        ctx.save_for_backward(targets_TK)
        ctx.logprobs_TV = logprobs_TV
        return logprobs_TV.gather(1, targets_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (targets_TK,) = ctx.saved_tensors
        (grad_TK,) = grads
        logprobs_TV = ctx.logprobs_TV
        ctx.logprobs_TV = None
        grad_TV = torch.empty_like(logprobs_TV).zero_()  # zeros_like would fault in fresh pages
        if targets_TK.shape[1] == 1:
            grad_TV.scatter_(1, targets_TK, grad_TK)
        elif grad_TV.device.type == "cpu":
            grad_TV.scatter_add_(1, targets_TK, grad_TK)
        else:  # Deterministic, and in the order of the CPU.
            for target, grad in zip(targets_TK.T[:, :, None], grad_TK.T[:, :, None], strict=True):
                grad_TV.scatter_(1, target, grad_TV.gather(1, target) + grad)
        torch.ops.aten._log_softmax_backward_data.out(
            grad_TV, logprobs_TV, -1, torch.float32, out=grad_TV
        )
        return grad_TV, None


def log_softmax_(logits_TV: Tensor) -> Tensor:
    """Log-probabilities in float32, in the logits' own memory where that is float32 already."""
    if logits_TV.dtype != torch.float32:
        return torch.log_softmax(logits_TV, -1, dtype=torch.float32)
    torch.ops.aten._log_softmax.out(logits_TV, -1, False, out=logits_TV)
    return logits_TV


def logits_blocks(
    network: Network, part: MicroBatch, tokens: Sequence[Tensor]
) -> Iterator[tuple[int, int, Tensor]]:
    """Logits of a micro-batch, block by block: (start, stop, [stop - start, V]).

    `tokens` are those of all the operation's sequences; rows are those of B * W. Without
    gradients.
    """
    tokens_BW = _padded(part, tokens, network.device)
    if not network.splits:
        yield (*_only_block(part), _flat(network.whole(tokens_BW)))
        return
    hidden_TH = _flat(network.trunk(tokens_BW))
    for start, stop in part.blocks:
        yield start, stop, network.head(hidden_TH[None, start:stop])[0]


def forward(network: Network, part: MicroBatch, batch: CheckedBatch) -> tuple[Tensor, float]:
    """Log-probabilities [T, K] of a micro-batch's targets and its loss; no gradients."""
    targets = _Targets(part, batch, network.device)
    with torch.no_grad():
        tokens = [sequence.tokens for sequence in batch.sequences]
        for start, stop, logits_TV in logits_blocks(network, part, tokens):
            logprobs_TK = log_softmax_(logits_TV).gather(1, targets.tokens[start:stop])
            targets.loss(logprobs_TK, start, stop)
    return targets.results()


def forward_backward(
    network: Network, part: MicroBatch, batch: CheckedBatch
) -> tuple[Tensor, float]:
    """As `forward`, and the loss's gradients are added to the bound parameters' `.grad`.

    The head's gradients go block by block into those of the hidden states, and these then once
    through the trunk.
    """
    targets = _Targets(part, batch, network.device)
    tokens_BW = _padded(part, [s.tokens for s in batch.sequences], network.device)

    def backward(logits_TV: Tensor, start: int, stop: int) -> None:
        wanted = targets.tokens[start:stop]
        logprobs = _TargetLogprobs.apply(logits_TV, wanted)  # type: ignore[no-untyped-call]
        torch.autograd.backward(targets.loss(cast(Tensor, logprobs), start, stop))

    if not network.splits:
        start, stop = _only_block(part)
        backward(_flat(network.whole(tokens_BW)), start, stop)
        return targets.results()

    hidden_BWH = network.trunk(tokens_BW)
    hidden_TH = _flat(hidden_BWH.detach())
    grads = []
    for start, stop in part.blocks:
        block_TH = hidden_TH[start:stop].requires_grad_(hidden_BWH.requires_grad)
        backward(network.head(block_TH[None])[0], start, stop)
        if block_TH.grad is not None:
            grads.append(block_TH.grad)
    if hidden_BWH.requires_grad:
        grad_TH = grads[0] if len(grads) == 1 else torch.cat(grads)
        torch.autograd.backward(hidden_BWH, grad_TH.view_as(hidden_BWH))
    return targets.results()


def split_rows(part: MicroBatch, values: Tensor) -> dict[int, Tensor]:
    """Cut [T, ...] into the sequences' own rows, by position in the operation."""
    pieces = torch.split(values, list(part.lengths))
    return dict(zip(part.indices, pieces, strict=True))


def _padded(part: MicroBatch, tokens: Sequence[Tensor], device: torch.device) -> Tensor:
    tokens_BW = torch.zeros(len(part.indices), part.width, dtype=torch.int64)
    for row, index in enumerate(part.indices):
        tokens_BW[row, : part.lengths[row]] = tokens[index]
    return tokens_BW.to(device)


class _Targets:
    """A micro-batch's targets and loss inputs, and what has been computed of them so far.

    Sequences of fewer targets than K get targets of weight 0 beside them; padding has no part in
    the loss.
    """

    def __init__(self, part: MicroBatch, batch: CheckedBatch, device: torch.device) -> None:
        sequences = [batch.sequences[index] for index in part.indices]
        width = max(1 if s.targets.ndim == 1 else s.targets.shape[1] for s in sequences)

        def column(value: Tensor) -> Tensor:
            value = value.view(len(value), -1)
            missing = width - value.shape[1]
            return nn.functional.pad(value, (0, missing)) if missing else value

        self.rows: Tensor | None = None
        """Where the real tokens are among B * W, or None when there is no padding."""
        targets_TK = torch.cat([column(s.targets) for s in sequences])
        if part.padded:
            starts = [row * part.width for row in range(len(part.lengths))]
            self.rows = torch.cat(
                [torch.arange(s, s + n) for s, n in zip(starts, part.lengths, strict=True)]
            )
            padded = torch.zeros(len(starts) * part.width, width, dtype=torch.int64)
            targets_TK = padded.index_copy_(0, self.rows, targets_TK)
            self.rows = self.rows.to(device)
        self.tokens = targets_TK.to(device)
        """int64 [B * W, K]"""
        self._function = batch.loss.function
        self._inputs = {
            name: torch.cat([column(s.inputs[name]) for s in sequences]).to(device)
            for name in sequences[0].inputs
        }
        self._logprobs: list[Tensor] = []
        self._loss = 0.0

    def loss(self, logprobs_TK: Tensor, start: int, stop: int) -> Tensor:
        """The loss of a block of rows, given its log-probabilities."""
        inputs = self._inputs
        if self.rows is not None:  # One block, then.
            logprobs_TK = logprobs_TK.index_select(0, self.rows)
        else:
            inputs = {name: value[start:stop] for name, value in inputs.items()}
        loss = self._function(logprobs_TK, inputs)
        self._logprobs.append(logprobs_TK.detach())
        self._loss += loss.item()
        return loss

    def results(self) -> tuple[Tensor, float]:
        """Log-probabilities [T, K] without padding, and the loss of all blocks."""
        logprobs = self._logprobs
        return logprobs[0] if len(logprobs) == 1 else torch.cat(logprobs), self._loss


def _flat(values_BWX: Tensor) -> Tensor:
    return values_BWX.reshape(-1, values_BWX.shape[-1])


def _only_block(part: MicroBatch) -> tuple[int, int]:
    """The block of a model whose head cannot be split."""
    if len(part.blocks) > 1:
        raise EngineError(
            "sequence_too_long",
            f"A sequence of {part.width} tokens is longer than the token budget, and this base "
            "model's head cannot be run in blocks; shorten the sequence or raise the budget.",
        )
    return part.blocks[0]
