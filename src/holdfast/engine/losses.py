"""Loss functions: sums over tokens of a function of the targets' log-probabilities.

Each takes the log-probabilities of one block of tokens, its inputs in the same shape, and the
configuration's numbers; all float32 tensors, [T] or, where `wide`, [T, K].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
LossFunction = Callable[[Tensor, Inputs], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """One entry of the table: which inputs and settings it knows, and its formula."""

    function: LossFunction
    required: tuple[str, ...]
    """Inputs beside target_tokens."""
    config: Mapping[str, float]
    """Settings with their defaults; each may also be given per token, as an input."""
    wide: bool = False
    """Whether target_tokens may be [N, K]."""


def cross_entropy(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """-sum(weights * logp)"""
    return -(inputs["weights"] * logprobs).sum()


def importance_sampling(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """-sum(exp(logp - q) * A), with q the sampler's log-probabilities and A the advantages."""
    return -(torch.exp(logprobs - inputs["logprobs"]) * inputs["advantages"]).sum()


def ppo(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """-sum(min(r * A, clip(r, low, high) * A)), r = exp(logp - q); the bounds are of r itself."""
    ratio = torch.exp(logprobs - inputs["logprobs"])
    clipped = torch.clamp(ratio, inputs["clip_low_threshold"], inputs["clip_high_threshold"])
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def cispo(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """-sum(stopgrad(clip(r, low, high)) * logp * A), r as in `ppo`."""
    ratio = torch.exp(logprobs.detach() - inputs["logprobs"])
    clipped = torch.clamp(ratio, inputs["clip_low_threshold"], inputs["clip_high_threshold"])
    return -(clipped * logprobs * inputs["advantages"]).sum()


def dro(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """-sum(logp * A - beta / 2 * (logp - q)^2)"""
    distance = logprobs - inputs["logprobs"]
    quadratic = 0.5 * inputs["beta"] * distance * distance
    return -(logprobs * inputs["advantages"] - quadratic).sum()


_POLICY = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, ("weights",), {}, wide=True),
    "importance_sampling": Loss(importance_sampling, _POLICY, {}),
    "ppo": Loss(ppo, _POLICY, _CLIP),
    "cispo": Loss(cispo, _POLICY, _CLIP),
    "dro": Loss(dro, _POLICY, {"beta": 0.05}),
}
