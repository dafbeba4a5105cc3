"""AdamW and clipping on a flat buffer equal torch's, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from holdfast.engine.interface import AdamParams, EngineError
from holdfast.engine.optimizer import AdamState, check_params, step
from holdfast.engine.slots import Layout

# Odd sizes: their ends fall into the scalar tails of vectorised loops. One spans several chunks.
SHAPES = ((1, 7), (3, 5), (33, 17), (8, 64), (1, 1), (260, 300), (19, 32))
LAYOUT = Layout(tuple(f"p{i}" for i in range(len(SHAPES))), SHAPES)


def flat_of(tensors: list[Tensor]) -> Tensor:
    flat = torch.zeros(LAYOUT.size)
    for view, tensor in zip(LAYOUT.views(flat), tensors, strict=True):
        view.copy_(tensor)
    return flat


class Pair:
    """The same parameters under torch's optimizer and under ours."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        self.optimizer = torch.optim.AdamW(self.parameters, foreach=False, fused=False)
        self.weights = flat_of([p.detach() for p in self.parameters])
        self.state = AdamState(LAYOUT)

    def step(self, params: AdamParams, present: list[bool], scale: float = 1.0) -> None:
        grads = [torch.randn(shape) * scale for shape in SHAPES]
        for parameter, grad, there in zip(self.parameters, grads, present, strict=True):
            parameter.grad = grad.clone() if there else None
        for group in self.optimizer.param_groups:
            group.update(lr=params.learning_rate, betas=(params.beta1, params.beta2))
            group.update(eps=params.eps, weight_decay=params.weight_decay)
        limit = params.grad_clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit, foreach=False)
        self.optimizer.step()
        assert step(self.weights, flat_of(grads), present, self.state, params) == float(norm)

    def check(self) -> None:
        assert self.state.exp_avg is not None and self.state.exp_avg_sq is not None
        rows = zip(
            self.parameters,
            LAYOUT.views(self.weights),
            LAYOUT.views(self.state.exp_avg),
            LAYOUT.views(self.state.exp_avg_sq),
            self.state.steps,
            strict=True,
        )
        for parameter, weight, exp_avg, exp_avg_sq, count in rows:
            assert torch.equal(parameter, weight)
            theirs = self.optimizer.state[parameter]
            assert count == int(theirs["step"]) if theirs else count == 0
            if theirs:
                assert torch.equal(theirs["exp_avg"], exp_avg)
                assert torch.equal(theirs["exp_avg_sq"], exp_avg_sq)


ALL = [True] * len(SHAPES)
PARAMS = (
    AdamParams(1e-3),
    AdamParams(1e-2, 0.8, 0.999, 1e-8, 0.1, 1.0),
    AdamParams(0.5, 0.0, 0.0, 1e-3, 0.01, 1e9),
    AdamParams(0.0, weight_decay=0.3),
)


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_equal_torch(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        pair = Pair()
        for params in PARAMS * 2:
            pair.step(params, ALL)
            pair.check()
    finally:
        torch.set_num_threads(1)


def test_parameters_without_a_gradient_are_left_out() -> None:
    """Their step counts lag behind, and so does their bias correction."""
    pair = Pair()
    some = [True, False, True, True, False, False, True]
    other = [False, False, True, True, True, True, False]
    for present in (some, ALL, other, some, ALL):
        pair.step(AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=0.5), present)
        pair.check()
    assert pair.state.steps == [4, 2, 5, 5, 3, 3, 4]


def test_a_norm_of_the_flat_buffer_would_differ() -> None:
    """Why the norm is one of norms: the comparison above can tell."""
    different = 0
    for seed in range(20):
        torch.manual_seed(seed)
        grads = [torch.randn(shape) for shape in SHAPES]
        ours = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        different += int(ours != torch.linalg.vector_norm(flat_of(grads)))
    assert different > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    pair = Pair()
    pair.step(AdamParams(1e-2), ALL)
    grads = [torch.randn(shape) for shape in SHAPES]
    grads[3][2, 5] = value
    before = pair.weights.clone()
    with pytest.raises(EngineError, match=r"norm of p3 is not finite") as caught:
        step(pair.weights, flat_of(grads), ALL, pair.state, AdamParams(1e-2, grad_clip_norm=1.0))
    assert caught.value.code == "gradient_not_finite"
    assert torch.equal(pair.weights, before)
    pair.check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", math.inf),
        ("weight_decay", -1.0),
        ("grad_clip_norm", math.nan),
    ],
)
def test_impossible_parameters_are_named(name: str, value: float) -> None:
    with pytest.raises(EngineError, match=f"{name} is {value}"):
        check_params(AdamParams(**{name: value}))
