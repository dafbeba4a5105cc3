"""Runs: their seeds, their operations, their failures, and their independence of each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from holdfast.engine import core as core_module
from holdfast.engine import slots as slots_module
from holdfast.engine.core import Core
from holdfast.engine.forward import forward_backward
from holdfast.engine.interface import AdamParams, EngineError, Incomplete, RunConfig, StateLost
from holdfast.engine.payload import Batch, ForwardOutput
from tests.engine.conftest import MakeCore
from tests.engine.helpers import NAME, make_batch, named_weights, run_config

BODY = make_batch(0).encode()
BAD = dataclasses.replace(make_batch(0), loss_fn="none").encode()
STEP = AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=1.0)


@pytest.fixture
def core(make_core: MakeCore) -> Core:
    return make_core("qwen3")


def weights(core: Core, run: str) -> bytes:
    return core._runs[run].weights.numpy().tobytes()


def test_a_run_begins_as_peft_begins_it(core: Core) -> None:
    """A drawn as PEFT draws it, B zero: the model computes what the base model computes."""
    core.create("run", run_config(8))
    bound = {}
    for name, weight in named_weights(core, "run").items():
        if "lora_B" in name:
            assert not weight.any()
        else:
            # kaiming_uniform with a = sqrt(5): uniform up to 1 / sqrt(fan_in).
            bound[name] = float(weight.abs().max()) * weight.shape[1] ** 0.5
    assert all(0.9 < value <= 1 for value in bound.values()), bound
    assert (
        len({w.numpy().tobytes() for n, w in named_weights(core, "run").items() if "_A" in n}) > 8
    )
    ours = ForwardOutput.decode(core.forward("run", BODY))
    core._slots.activate(None)
    tokens = torch.from_numpy(make_batch(0).data[0].tokens).long()[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(core.base.model(input_ids=tokens).logits[0], -1)
    targets = torch.from_numpy(make_batch(0).data[0].inputs["target_tokens"])
    wanted = logprobs.gather(1, targets[:, None])[:, 0]
    assert torch.allclose(torch.from_numpy(ours.outputs[0]["logprobs"]), wanted, atol=1e-5)


def test_the_seed_alone_decides_the_weights(core: Core, make_core: MakeCore) -> None:
    core.create("a", run_config(seed=7))
    before = torch.random.get_rng_state()
    core.create("neighbour", run_config(seed=8))
    core.create("b", run_config(seed=7))
    assert torch.equal(torch.random.get_rng_state(), before)
    other = make_core("qwen3")
    other.create("warm up another slot", run_config(4))
    torch.rand(5)
    other.create("c", run_config(seed=7))
    assert weights(core, "a") == weights(core, "b") == weights(other, "c")
    assert weights(core, "a") != weights(core, "neighbour")


def interleaved(core: Core, alone: bool) -> list[bytes]:
    """What run "mine" sees in four steps, alone or between two others."""
    core.create("mine", run_config(8, seed=1))
    if not alone:
        core.create("same shape", run_config(8, seed=2))
        core.create("other shape", run_config(4, seed=3, mlp=False, alpha=16.0))
    seen = []
    for i in range(4):
        if not alone:
            core.forward_backward("same shape", i, make_batch(50 + i, (60,)).encode())
            core.optim_step("other shape", AdamParams(1e-2, weight_decay=0.3))
        seen.append(core.forward_backward("mine", 2 * i, make_batch(i).encode()))
        if not alone:
            core.forward_backward("other shape", i, make_batch(70 + i).encode())
            core.optim_step("same shape", AdamParams(0.1, weight_decay=0.5))
        seen.append(core.forward_backward("mine", 2 * i + 1, make_batch(10 + i).encode()))
        seen.append(str(core.optim_step("mine", STEP)).encode())
        seen.append(weights(core, "mine"))
    return seen


def test_neighbours_change_no_bit(core: Core, make_core: MakeCore) -> None:
    assert interleaved(core, alone=True) == interleaved(make_core("qwen3"), alone=False)


def test_a_run_outlives_its_slot(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """More kinds of runs than slots: they are given up and made again, and no bit changes."""
    expected = interleaved(make_core("qwen3"), alone=True)
    monkeypatch.setattr(slots_module, "MAX_SLOTS", 1)
    core = make_core("qwen3")
    assert interleaved(core, alone=False) == expected
    assert len(core._slots._slots) == 1


def test_forward_changes_nothing_and_agrees_with_forward_backward(core: Core) -> None:
    core.create("run", run_config())
    core.forward_backward("run", 0, BODY)
    before = core.copy_state("run", optimizer=True)
    assert core.forward("run", BODY) == core.forward("run", BODY)
    after = core.copy_state("run", optimizer=True)
    assert [bytes(p) for f in before.files.values() for p in f] == [
        bytes(p) for f in after.files.values() for p in f
    ]
    assert core.forward("run", BODY) == core.forward_backward("run", 1, BODY)


def test_metrics_of_a_step(core: Core) -> None:
    core.create("run", run_config())
    core.forward_backward("run", 0, BODY)
    core.forward_backward("run", 1, BODY)
    metrics = core.optim_step("run", STEP)
    assert metrics.pop("grad_norm") > 1
    assert metrics == {
        "learning_rate": 1e-2,
        "tokens": 2 * (40 + 24 + 40 + 13),
        "forward_backwards": 2,
        "skipped": 0,
        "step": 1,
    }


def test_a_step_without_gradients_changes_nothing(core: Core) -> None:
    core.create("run", run_config())
    before = weights(core, "run")
    core.forward_backward("run", 0, Batch([], "cross_entropy").encode())
    metrics = core.optim_step("run", STEP)
    assert (metrics["skipped"], metrics["step"], metrics["grad_norm"]) == (1, 0, 0)
    assert weights(core, "run") == before
    assert core._runs["run"].adam.steps == [0] * len(core._runs["run"].layout.names)


def test_a_failed_forward_backward_fails_the_next_step_and_only_that(core: Core) -> None:
    core.create("run", run_config())
    core.forward_backward("run", 1, BODY)
    with pytest.raises(EngineError, match="Unknown loss"):
        core.forward_backward("run", 2, BAD)
    core.forward_backward("run", 3, BODY)  # A later success does not make the batch whole.
    mark = core._runs["run"].info.incomplete
    assert mark is not None and mark.seq == 2
    before = weights(core, "run")
    with pytest.raises(EngineError, match=r"forward_backward 2 failed: Unknown loss") as caught:
        core.optim_step("run", STEP)
    assert (caught.value.code, caught.value.category) == ("incomplete_gradients", "user")
    assert weights(core, "run") == before
    info = core._runs["run"].info
    assert (info.step, info.pending_forward_backwards, info.incomplete) == (0, 0, None)
    core.forward_backward("run", 4, BODY)
    assert core.optim_step("run", STEP)["forward_backwards"] == 1


def test_a_failed_forward_sets_no_mark(core: Core) -> None:
    core.create("run", run_config())
    with pytest.raises(EngineError):
        core.forward("run", BAD)
    assert core._runs["run"].incomplete is None


def test_a_mark_from_outside(core: Core) -> None:
    core.create("run", run_config())
    core.mark_incomplete("run", 5, "forward_backward 5 was refused")
    core.mark_incomplete("run", 6, "forward_backward 6 was refused")
    assert core._runs["run"].incomplete == Incomplete(5, "forward_backward 5 was refused")
    with pytest.raises(EngineError, match="forward_backward 5 was refused"):
        core.optim_step("run", STEP)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            "out_of_memory",
        ),
        (RuntimeError("a kernel broke"), "internal"),
    ],
)
def test_a_failure_in_the_middle_leaves_the_gradients_of_before(
    error: Exception, code: str, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two micro-batches fails: nothing of the first is kept."""
    core.create("run", run_config())
    core.forward_backward("run", 0, BODY)
    state = core._runs["run"]
    assert state.grads is not None
    before = state.grads.clone()
    inner = forward_backward
    calls: list[object] = []

    def fails(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise error
        return inner(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(core_module, "forward_backward", fails)
        with pytest.raises(EngineError) as caught:
            core.forward_backward("run", 1, make_batch(1, (90,) * 5).encode())
    assert (caught.value.code, caught.value.category) == (code, "server")
    assert len(calls) == 2
    assert torch.equal(state.grads, before)
    assert (state.pending, state.incomplete is not None) == (1, True)
    assert all(p.grad is None for s in core._slots._slots.values() for p in s.parameters)
    core.create("run", run_config())
    core.forward_backward("run", 0, BODY)
    again = core._runs["run"].grads
    assert again is not None and torch.equal(again, before)


def test_a_device_that_has_failed_is_no_failure_of_the_operation(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails whatever comes next as well, until another process uses it."""
    core.create("run", run_config())

    def fails(*args: object) -> object:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(core_module, "forward_backward", fails)
    with pytest.raises(StateLost, match="an illegal memory access"):
        core.forward_backward("run", 0, BODY)


def test_gradients_that_are_not_finite_fail_the_step_and_are_cleared(core: Core) -> None:
    core.create("run", run_config())
    batch = make_batch(0)
    for datum in batch.data:
        datum.inputs["weights"][:] = 3e38
    core.forward_backward("run", 0, batch.encode())
    before = weights(core, "run")
    with pytest.raises(
        EngineError, match=r"norm of base_model\.model\.\S+ is not finite"
    ) as caught:
        core.optim_step("run", STEP)
    assert caught.value.code == "gradient_not_finite"
    assert weights(core, "run") == before
    core.forward_backward("run", 1, BODY)
    assert core.optim_step("run", STEP)["forward_backwards"] == 1


def test_impossible_step_parameters_change_nothing(core: Core) -> None:
    core.create("run", run_config())
    core.forward_backward("run", 0, BODY)
    with pytest.raises(EngineError, match="learning_rate is -1"):
        core.optim_step("run", AdamParams(-1.0))
    assert core.optim_step("run", STEP)["forward_backwards"] == 1


@pytest.mark.parametrize(
    ("config", "code", "message"),
    [
        (
            dataclasses.replace(run_config(), base_model="x/y"),
            "base_model_mismatch",
            f"{NAME}.*x/y",
        ),
        (run_config(attn=False, mlp=False, unembed=False), "nothing_to_train", "all false"),
        (run_config(0), "invalid_rank", "rank is 0; .* 1 to 32"),
        (run_config(100_000), "invalid_rank", "rank is 100000"),
        (run_config(seed=1 << 70), "invalid_seed", "64 bits"),
        (run_config(alpha=0.0), "invalid_alpha", "lora_alpha is 0"),
        (dataclasses.replace(run_config(), optimizer="dimuon"), "unknown_optimizer", "'dimuon'"),
    ],
)
def test_what_cannot_be_created(config: RunConfig, code: str, message: str, core: Core) -> None:
    core.create("run", run_config())
    before = weights(core, "run")
    with pytest.raises(EngineError, match=message) as caught:
        core.create("run", config)
    assert (caught.value.code, caught.value.category) == (code, "user")
    assert weights(core, "run") == before


def test_dropped_and_unknown_runs(core: Core) -> None:
    core.create("run", run_config())
    core.drop("run")
    core.drop("run")
    for call in (
        lambda: core.forward("run", BODY),
        lambda: core.forward_backward("run", 0, BODY),
        lambda: core.optim_step("run", STEP),
        lambda: core.copy_state("run", optimizer=True),
    ):
        with pytest.raises(EngineError, match="no run 'run'") as caught:
            call()
        assert caught.value.code == "unknown_run"


def test_dropping_a_run_frees_its_weights(core: Core) -> None:
    core.create("run", run_config())
    core.forward("run", BODY)
    slot = next(iter(core._slots._slots.values()))
    assert all(p.numel() for p in slot.parameters)
    core.drop("run")
    assert not any(p.numel() for p in slot.parameters)


def test_base_stays_in_eval_mode_without_dropout(core: Core) -> None:
    """The small models' config.json asks for attention dropout 0.1."""
    core.create("run", run_config())
    core.forward_backward("run", 0, BODY)
    assert not any(module.training for module in core.base.model.modules())
    assert core.base.model.config.attention_dropout == 0.0
    names = {n for n, p in core.base.model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
