"""AdamW and gradient clipping on a flat buffer, with the bits of PyTorch's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from holdfast.engine.interface import AdamParams, EngineError, StateLost
from holdfast.engine.slots import Layout

_CHUNK = 1 << 16
"""Elements updated at a time: five arrays of a chunk stay in a core's cache."""


class AdamState:
    """Moments of one run's parameters; None and zero steps until the first update."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.steps = [0] * len(layout.names)
        self.exp_avg: Tensor | None = None
        self.exp_avg_sq: Tensor | None = None


def check_params(params: AdamParams) -> None:
    """Refuse a step's parameters that AdamW cannot take, naming the value."""
    for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(params, name)
        wanted = "finite and at least 0"
        wrong = not (math.isfinite(value) and value >= 0)
        if name in ("beta1", "beta2"):
            wanted = "at least 0 and below 1"
            wrong = wrong or value >= 1
        if wrong:
            raise EngineError(
                "invalid_optimizer_params", f"{name} is {value}; it must be {wanted}."
            )


def grad_norm(layout: Layout, grads: Tensor, present: list[bool]) -> Tensor:
    """The 2-norm of all gradients: the norm of the parameters' norms, in name order.

    As `torch.nn.utils.get_total_norm`; a norm of the flat buffer has other bits. Raises
    EngineError naming the parameter where a norm is not finite.
    """
    names = [name for name, there in zip(layout.names, present, strict=True) if there]
    views = [view for view, there in zip(layout.views(grads), present, strict=True) if there]
    norms = torch.stack([torch.linalg.vector_norm(view) for view in views])
    total: Tensor = torch.linalg.vector_norm(norms)
    if not math.isfinite(total.item()):
        finite = torch.isfinite(norms).tolist()
        culprit = names[finite.index(False)] if False in finite else "all parameters together"
        raise EngineError(
            "gradient_not_finite",
            f"The gradient norm of {culprit} is not finite. The step was not applied and the "
            "gradients were cleared; check the loss weights and the learning rate.",
        )
    return total


@torch.no_grad()
def step(
    weights: Tensor, grads: Tensor, present: list[bool], state: AdamState, params: AdamParams
) -> float:
    """Clip, update the weights in place and give the gradient norm before clipping.

    Equals `clip_grad_norm_` and `torch.optim.AdamW(foreach=False, fused=False)` over the
    parameters in name order; one without a gradient (`present` false) is left out, as there.
    `grads` may be changed. Raises StateLost where it fails once it has begun to change the rest.
    """
    check_params(params)
    layout = state.layout
    norm = grad_norm(layout, grads, present)
    if params.grad_clip_norm > 0:
        grads.mul_(torch.clamp(params.grad_clip_norm / (norm + 1e-6), max=1.0))
    if state.exp_avg is None or state.exp_avg_sq is None:
        state.exp_avg, state.exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
    chunk = min(_CHUNK, layout.size) if weights.device.type == "cpu" else layout.size
    # The last memory that is needed: a shortage is met before anything is changed.
    work = torch.empty_like(weights[:chunk])
    ranges = _ranges(layout, present, state.steps)
    steps = [s + there for s, there in zip(state.steps, present, strict=True)]
    try:
        for start, stop, count in ranges:
            for at in range(start, stop, chunk):
                part = slice(at, min(at + chunk, stop))
                _update(
                    weights[part],
                    grads[part],
                    state.exp_avg[part],
                    state.exp_avg_sq[part],
                    work[: part.stop - at],
                    count,
                    params,
                )
        state.steps = steps
        return norm.item()  # which waits for a device, and tells of what has failed there
    except Exception as error:
        raise StateLost(f"an optim_step broke off half way: {error}") from error


def _ranges(layout: Layout, present: list[bool], steps: list[int]) -> list[tuple[int, int, int]]:
    """Runs of neighbouring parameters of one step count: (start, stop, the count to come)."""
    ranges: list[tuple[int, int, int]] = []
    for index, there in enumerate(present):
        if not there:
            continue
        start, stop, count = layout.offsets[index], layout.offsets[index + 1], steps[index] + 1
        if ranges and ranges[-1][1:] == (start, count):
            ranges[-1] = (ranges[-1][0], stop, count)
        else:
            ranges.append((start, stop, count))
    return ranges


def _update(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    work: Tensor,
    count: int,
    params: AdamParams,
) -> None:
    """One AdamW update, operation by operation as `torch.optim.adam._single_tensor_adam`.

    `work` is overwritten; nothing else is allocated.
    """
    if params.weight_decay != 0:
        weights.mul_(1 - params.learning_rate * params.weight_decay)
    exp_avg.lerp_(grads, 1 - params.beta1)
    exp_avg_sq.mul_(params.beta2).addcmul_(grads, grads, value=1 - params.beta2)
    step_size = params.learning_rate / (1 - params.beta1**count)
    root = (1 - params.beta2**count) ** 0.5
    denominator = torch.sqrt(exp_avg_sq, out=work).div_(root).add_(params.eps)
    weights.addcdiv_(exp_avg, denominator, value=-step_size)
