"""Log-probabilities, gradients and AdamW steps have the bits of a plain PEFT + torch loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from holdfast.engine.core import Core
from holdfast.engine.interface import AdamParams, RunConfig
from holdfast.engine.payload import Batch, ForwardOutput
from tests.engine.conftest import MakeCore
from tests.engine.helpers import CONFIGS, PlainLoop, make_batch, named_weights, run_config

ModelDir = Callable[[str], Path]

STEPS = (
    AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=1.0),
    AdamParams(3e-3, 0.8, 0.99, 1e-8, 0.0, 1e9),
    AdamParams(1e-2),
)


def train_both(core: Core, directory: Path, config: RunConfig, steps: list[list[Batch]]) -> None:
    """Train the engine's run and the plain loop, and compare every number on the way."""
    core.create("run", config)
    state = core._runs["run"]
    plain = PlainLoop(directory, config)
    plain.load_weights(named_weights(core, "run"))
    for batches, params in zip(steps, STEPS, strict=True):
        for seq, batch in enumerate(batches):
            output = ForwardOutput.decode(core.forward_backward("run", seq, batch.encode()))
            logprobs, loss = plain.forward_backward(batch)
            assert output.metrics == {"loss:sum": loss}
            for ours, theirs in zip(output.outputs, logprobs, strict=True):
                assert ours["logprobs"].tobytes() == theirs.numpy().tobytes()
        assert state.grads is not None
        grads = dict(zip(state.layout.names, state.layout.views(state.grads), strict=True))
        assert grads.keys() == plain.parameters.keys()
        for name, parameter in plain.parameters.items():
            assert parameter.grad is not None
            assert parameter.grad.any() or "lora_A" in name, name
            assert torch.equal(grads[name], parameter.grad), name
        metrics = core.optim_step("run", params)
        assert metrics["grad_norm"] == plain.optim_step(params)
        weights = named_weights(core, "run")
        for name, parameter in plain.parameters.items():
            assert torch.equal(weights[name], parameter), name


PADDED, EVEN, SEVERAL = (40, 24, 40, 13), (32, 32, 32), (90, 90, 90, 80, 5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_architectures(kind: str, make_core: MakeCore, model_dir: ModelDir) -> None:
    """Padding, accumulation over operations, several micro-batches, and K targets per token."""
    steps = [
        [make_batch(1, PADDED)],
        [make_batch(2, EVEN), make_batch(3, SEVERAL)],
        [make_batch(4, PADDED, wide=3)],
    ]
    train_both(make_core(kind), model_dir(kind), run_config(), steps)


FLAGS = [
    (attn, mlp, unembed)
    for attn in (True, False)
    for mlp in (True, False)
    for unembed in (True, False)
    if attn or mlp or unembed
]


@pytest.mark.parametrize(("attn", "mlp", "unembed"), FLAGS)
def test_every_choice_of_layers(
    attn: bool, mlp: bool, unembed: bool, make_core: MakeCore, model_dir: ModelDir
) -> None:
    """On a model with tied embeddings, whose lookup stays as it is."""
    config = run_config(attn=attn, mlp=mlp, unembed=unembed)
    steps = [[make_batch(1)], [make_batch(2)], [make_batch(3)]]
    train_both(make_core("qwen3"), model_dir("qwen3"), config, steps)


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_ranks(rank: int, make_core: MakeCore, model_dir: ModelDir) -> None:
    steps = [[make_batch(1)], [make_batch(2)], [make_batch(3)]]
    train_both(make_core("llama"), model_dir("llama"), run_config(rank), steps)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_a_head_in_row_blocks(kind: str, make_core: MakeCore, model_dir: ModelDir) -> None:
    """A sequence over the budget: the same log-probabilities, gradients up to their order."""
    whole, split = make_core(kind, budget=256), make_core(kind, budget=64)
    batch = make_batch(1, (200,)).encode()
    results: list[tuple[ForwardOutput, torch.Tensor]] = []
    for core in (whole, split):
        core.create("run", run_config())
        core.forward_backward("run", 0, make_batch(0).encode())
        core.optim_step("run", AdamParams(1e-2))
        if results:  # Equal weights, whatever the first step's plan was.
            core._runs["run"].weights.copy_(whole._runs["run"].weights)
        output = core.forward_backward("run", 1, batch)
        grads = core._runs["run"].grads
        assert grads is not None
        results.append((ForwardOutput.decode(output), grads))
    (one, grads_one), (two, grads_two) = results
    assert one.outputs[0]["logprobs"].tobytes() == two.outputs[0]["logprobs"].tobytes()
    scale = float(grads_one.abs().max())
    assert torch.allclose(grads_one, grads_two, rtol=1e-4, atol=1e-5 * scale)


def test_the_last_transform_of_the_head_counts(make_core: MakeCore) -> None:
    """Gemma 2 caps its logits after the last product; a head without that would differ."""
    core = make_core("gemma2")
    network = core._network
    assert network.splits
    tokens = torch.arange(24).view(1, 24)
    with torch.no_grad():
        hidden = network.trunk(tokens)
        capped = network.head(hidden)
        uncapped = core.base.model.lm_head(hidden)
        assert torch.equal(capped, network.whole(tokens))
        assert float(capped.abs().max()) <= 5.0
        assert not torch.equal(capped, uncapped)


def test_a_head_that_cannot_be_split_runs_whole(make_core: MakeCore) -> None:
    core = make_core("llama", budget=128)
    outputs = []
    for splits in (True, False):
        core._network.splits = splits
        core.create("run", run_config())
        outputs.append(core.forward_backward("run", 0, make_batch(0).encode()))
        outputs.append(core.forward("run", make_batch(0).encode()))
    assert len(set(outputs)) == 1
    with pytest.raises(Exception, match="cannot be run in blocks"):
        core.forward("run", make_batch(0, (200,)).encode())


def test_logits_are_never_more_rows_than_the_budget(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core("llama", budget=64)
    core.create("run", run_config())
    rows: list[int] = []
    head = core._network.head

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        rows.append(logits.shape[:-1].numel())
        return logits

    monkeypatch.setattr(core._network, "head", counted)
    batch = make_batch(0, (300, 30, 30, 20, 8))
    core.forward_backward("run", 0, batch.encode())
    core.forward("run", batch.encode())
    assert max(rows) <= 64
    assert sum(rows) == 2 * (300 + 60 + 40)
