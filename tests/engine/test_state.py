"""A captured state comes back whole or not at all, and its adapter is everybody's."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load, save
from transformers import AutoModelForCausalLM

from holdfast.engine.base import quiet
from holdfast.engine.core import Core
from holdfast.engine.interface import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OPTIMIZER_STATE,
    AdamParams,
    EngineError,
    RunConfig,
)
from holdfast.engine.payload import ForwardOutput
from holdfast.store import Store
from holdfast.store.model import Blob
from tests.engine.conftest import MakeCore
from tests.engine.helpers import make_batch, named_weights, run_config

STEP = AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=1.0)
Files = dict[str, Blob]


def train(core: Core, run: str, first: int, count: int) -> list[bytes]:
    """Steps of two forward_backwards each; everything a client sees of them."""
    seen = []
    for i in range(first, first + count):
        seen.append(core.forward_backward(run, 2 * i, make_batch(i).encode()))
        seen.append(core.forward_backward(run, 2 * i + 1, make_batch(i + 100).encode()))
        seen.append(json.dumps(core.optim_step(run, STEP)).encode())
    return seen


def put(core: Core, run: str, store: Store, *, optimizer: bool = True) -> Files:
    copy = core.copy_state(run, optimizer=optimizer)
    return {name: store.put_blob(parts) for name, parts in copy.files.items()}


def content(files: Files, store: Store) -> dict[str, bytes]:
    return {name: store.read_blob(blob, what=name) for name, blob in files.items()}


def three_ways(
    make_core: MakeCore,
    store: Store,
    config: RunConfig,
    spoil: Callable[[dict[str, bytes]], None] = lambda _: None,
) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Uninterrupted, resumed in another engine from a save amid accumulation, and cold."""
    core = make_core()
    core.create("run", config)
    train(core, "run", 0, 2)
    core.forward_backward("run", 90, make_batch(90).encode())
    files = put(core, "run", store)
    uninterrupted = train(core, "run", 2, 3)
    uninterrupted += [blob.hash.encode() for blob in put(core, "run", store).values()]

    saved = content(files, store)
    spoil(saved)
    spoiled = {name: store.put_blob([data]) for name, data in saved.items()}
    results = []
    for optimizer in (True, False):
        other = make_core()
        other.create("other", run_config(8, seed=99))
        train(other, "other", 50, 1)
        other.restore("run", config, spoiled, optimizer=optimizer)
        seen = train(other, "run", 2, 3)
        results.append(seen + [b.hash.encode() for b in put(other, "run", store).values()])
    return uninterrupted, results[0], results[1]


@pytest.mark.parametrize(
    "config",
    [
        run_config(1),
        run_config(8),
        run_config(32),
        run_config(8, mlp=False, unembed=False),
        run_config(8, attn=False, mlp=False, alpha=24.5),
    ],
    ids=["rank 1", "rank 8", "rank 32", "attention", "unembed"],
)
def test_uninterrupted_is_resumed_is_not_cold(
    config: RunConfig, make_core: MakeCore, store: Store
) -> None:
    uninterrupted, resumed, cold = three_ways(make_core, store, config)
    assert uninterrupted == resumed
    assert uninterrupted != cold


def edit_optimizer(
    change: Callable[[dict[str, np.ndarray], dict[str, Any]], None],
) -> Callable[[dict[str, bytes]], None]:
    """Rewrite the optimizer's file; the result is a well-formed one of another state."""

    def spoil(files: dict[str, bytes]) -> None:
        data = files[OPTIMIZER_STATE]
        size = int.from_bytes(data[:8], "little")
        meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["holdfast"])
        tensors = dict(load(data))
        change(tensors, meta)
        files[OPTIMIZER_STATE] = save(tensors, {"format": "pt", "holdfast": json.dumps(meta)})

    return spoil


def without_moments(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    for name in tensors:
        if name.startswith("exp_avg"):
            tensors[name] = np.zeros_like(tensors[name])


def without_steps(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    meta["steps"] = dict.fromkeys(meta["steps"], 1)


def without_gradients(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith("grad.")]:
        del tensors[name]


def in_bf16(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    for name, value in tensors.items():
        tensors[name] = torch.from_numpy(value).bfloat16().float().numpy()


def unchanged(_: dict[str, np.ndarray], __: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (unchanged, True),
        (without_moments, False),
        (without_steps, False),
        (without_gradients, False),
        (in_bf16, False),
    ],
)
def test_the_comparison_sees_what_is_left_out(
    change: Callable[[dict[str, np.ndarray], dict[str, Any]], None],
    same: bool,
    make_core: MakeCore,
    store: Store,
) -> None:
    uninterrupted, resumed, _ = three_ways(make_core, store, run_config(), edit_optimizer(change))
    assert (uninterrupted == resumed) is same


def test_weights_in_bf16_are_seen(make_core: MakeCore, store: Store) -> None:
    def spoil(files: dict[str, bytes]) -> None:
        tensors = {
            name: torch.from_numpy(value).bfloat16().float().numpy()
            for name, value in load(files[ADAPTER_WEIGHTS]).items()
        }
        files[ADAPTER_WEIGHTS] = save(tensors)

    uninterrupted, resumed, _ = three_ways(make_core, store, run_config(), spoil)
    assert uninterrupted != resumed


def test_save_load_save_gives_the_same_bytes(make_core: MakeCore, store: Store) -> None:
    core = make_core()
    core.create("run", run_config())
    for stage in range(4):
        if stage == 1:
            train(core, "run", 0, 1)
        if stage == 2:
            core.forward_backward("run", 9, make_batch(9).encode())
        if stage == 3:
            core.mark_incomplete("run", 10, "refused \x00 “é”")
        files = put(core, "run", store)
        info = core.restore("again", run_config(), files, optimizer=True)
        assert info == core._runs["run"].info
        assert put(core, "again", store) == files


def test_a_state_comes_back_on_the_device_of_the_model(make_core: MakeCore, store: Store) -> None:
    """All of it: the next step computes with moments and gradients as well as with weights."""
    core = make_core()
    core.create("run", run_config())
    train(core, "run", 0, 1)
    core.forward_backward("run", 9, make_batch(9).encode())
    files = put(core, "run", store)
    core.base = dataclasses.replace(core.base, device=torch.device("meta"))
    core.restore("run", run_config(), files, optimizer=True)
    state = core._runs["run"]
    for tensor in (state.weights, state.adam.exp_avg, state.adam.exp_avg_sq, state.grads):
        assert tensor is not None and tensor.device.type == "meta"


def test_the_mark_is_part_of_the_state(make_core: MakeCore, store: Store) -> None:
    core = make_core()
    core.create("run", run_config())
    core.forward_backward("run", 1, make_batch(1).encode())
    core.mark_incomplete("run", 2, "forward_backward 2 was refused")
    files = put(core, "run", store)
    core.restore("again", run_config(), files, optimizer=True)
    with pytest.raises(EngineError, match="forward_backward 2 was refused"):
        core.optim_step("again", STEP)
    core.restore("again", run_config(), files, optimizer=False)
    assert core.optim_step("again", STEP)["skipped"] == 1


def test_weights_only_is_a_function_of_the_checkpoint_alone(
    make_core: MakeCore, store: Store
) -> None:
    """Into a run that has trained, with gradients pending, and into none at all."""
    core = make_core()
    core.create("run", run_config())
    train(core, "run", 0, 2)
    files = put(core, "run", store, optimizer=False)
    assert OPTIMIZER_STATE not in files
    core.forward_backward("run", 9, make_batch(9).encode())
    seen = []
    for run in ("run", "new"):
        info = core.restore(run, run_config(), files, optimizer=False)
        assert (info.step, info.pending_forward_backwards, info.incomplete) == (0, 0, None)
        seen.append((train(core, run, 5, 2), put(core, run, store)))
    assert seen[0] == seen[1]


def test_a_sampler_checkpoint_shares_the_weights_blob(make_core: MakeCore, store: Store) -> None:
    core = make_core()
    core.create("run", run_config())
    train(core, "run", 0, 1)
    whole, weights = put(core, "run", store), put(core, "run", store, optimizer=False)
    assert weights == {name: whole[name] for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)}


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "llama"])
def test_peft_loads_the_adapter_to_the_same_logits(
    kind: str,
    make_core: MakeCore,
    model_dir: Callable[[str], Path],
    store: Store,
    tmp_path: Path,
) -> None:
    """Tied embeddings included: no base matrix is in the file."""
    core = make_core(kind)
    core.create("run", run_config())
    train(core, "run", 0, 2)
    files = content(put(core, "run", store, optimizer=False), store)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    names = load(files[ADAPTER_WEIGHTS]).keys()
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names)
    assert any("lm_head" in name for name in names)
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(model_dir(kind)).eval()
        model = PeftModel.from_pretrained(base, tmp_path).eval()
    datum = make_batch(7).data[0]
    with torch.no_grad():
        tokens = torch.from_numpy(datum.tokens).long()[None]
        logprobs = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[0], -1)
    wanted = logprobs.gather(1, torch.from_numpy(datum.inputs["target_tokens"])[:, None])[:, 0]
    body = make_batch(7, (40,)).encode()
    ours = ForwardOutput.decode(core.forward("run", body)).outputs[0]["logprobs"]
    assert make_batch(7, (40,)).data[0].tokens.tobytes() == datum.tokens.tobytes()
    assert ours.tobytes() == wanted.numpy().tobytes()


def test_an_adapter_that_peft_saved(
    make_core: MakeCore, model_dir: Callable[[str], Path], store: Store, tmp_path: Path
) -> None:
    """Without our metadata, with its own alpha."""
    from peft import LoraConfig, get_peft_model

    with quiet():
        base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=10, target_modules=names))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        model.save_pretrained(tmp_path)
    files = {
        name: store.put_blob([(tmp_path / name).read_bytes()])
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    }
    core = make_core("llama")
    config = run_config(4, mlp=False, unembed=False, alpha=10.0)
    core.restore("run", config, files, optimizer=False)
    theirs = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    ours = named_weights(core, "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(EngineError, match=r"alpha is 10.0, this run's is 32.0"):
        core.restore("run", run_config(4, mlp=False, unembed=False), files, optimizer=False)


@pytest.fixture
def trained(make_core: MakeCore, store: Store) -> tuple[Core, Files]:
    core = make_core()
    core.create("run", run_config())
    train(core, "run", 0, 1)
    core.forward_backward("run", 9, make_batch(9).encode())
    return core, put(core, "run", store)


def refused(
    core: Core, config: RunConfig, files: Mapping[str, Blob], store: Store, *, optimizer: bool
) -> EngineError:
    """The error of a load, after which the run is what it was."""
    before = put(core, "run", store)
    with pytest.raises(EngineError) as caught:
        core.restore("run", config, files, optimizer=optimizer)
    assert put(core, "run", store) == before
    assert core.forward_backward("run", 10, make_batch(3).encode())
    return caught.value


@pytest.mark.parametrize(
    ("config", "code", "phrases"),
    [
        (run_config(16), "rank_mismatch", ["8", "16"]),
        (run_config(alpha=8.0), "alpha_mismatch", ["32.0", "8.0"]),
        (run_config(unembed=False), "train_flags_mismatch", ["train_unembed", "True", "False"]),
        (run_config(mlp=False), "train_flags_mismatch", ["train_mlp", "True", "False"]),
    ],
)
def test_a_checkpoint_of_another_configuration(
    config: RunConfig, code: str, phrases: list[str], trained: tuple[Core, Files], store: Store
) -> None:
    core, files = trained
    error = refused(core, config, files, store, optimizer=True)
    assert (error.code, error.category) == (code, "user")
    assert all(phrase in error.message for phrase in phrases), error.message


def test_a_checkpoint_of_another_base_model(
    trained: tuple[Core, Files], make_core: MakeCore, store: Store
) -> None:
    _, files = trained
    other = make_core("llama")
    other.create("run", run_config())
    error = refused(other, run_config(), files, store, optimizer=False)
    assert error.code == "base_revision_mismatch"
    assert other.base.info.revision in error.message
    assert trained[0].base.info.revision in error.message


def test_with_optimizer_never_resumes_partly(trained: tuple[Core, Files], store: Store) -> None:
    core, files = trained
    partial = {name: blob for name, blob in files.items() if name != OPTIMIZER_STATE}
    error = refused(core, run_config(), partial, store, optimizer=True)
    assert (error.code, error.category) == ("no_optimizer_state", "user")


def drop_tensor(prefix: str) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    def change(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
        del tensors[min(name for name in tensors if name.startswith(prefix))]

    return change


def add_tensor(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    tensors["momentum.x"] = np.zeros((2, 2), np.float32)


def reshape_tensor(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].T.copy()


def halve_tensor(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].astype(np.float16)


def set_meta(key: str, value: object) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    def change(_: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        meta[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "code", "phrase"),
    [
        (drop_tensor("exp_avg."), "damaged_checkpoint", "'exp_avg.base_model.*' is missing"),
        (drop_tensor("exp_avg_sq."), "damaged_checkpoint", "'exp_avg_sq.base_model.*' is missing"),
        (add_tensor, "damaged_checkpoint", "'momentum.x' is unknown"),
        (reshape_tensor, "damaged_checkpoint", "has shape .*, not "),
        (halve_tensor, "damaged_checkpoint", "is F16, not F32"),
        (set_meta("format", "holdfast.optimizer.9"), "unknown_format", "optimizer.9"),
        (set_meta("optimizer", "dimuon"), "optimizer_mismatch", "'dimuon'"),
        (set_meta("steps", {}), "damaged_checkpoint", "step counts"),
        (set_meta("step", -1), "damaged_checkpoint", "-1 is no count"),
        (set_meta("incomplete", 7), "damaged_checkpoint", "metadata are incomplete"),
        (set_meta("rank", 4), "rank_mismatch", "4, this run's is 8"),
        (set_meta("base_revision", "ff"), "base_revision_mismatch", "'ff'"),
    ],
)
def test_an_optimizer_file_that_does_not_fit(
    change: Callable[[dict[str, np.ndarray], dict[str, Any]], None],
    code: str,
    phrase: str,
    trained: tuple[Core, Files],
    store: Store,
) -> None:
    core, files = trained
    data = content(files, store)
    edit_optimizer(change)(data)
    spoiled = {**files, OPTIMIZER_STATE: store.put_blob([data[OPTIMIZER_STATE]])}
    error = refused(core, run_config(), spoiled, store, optimizer=True)
    assert (error.code, error.category) == (code, "user")
    assert re.search(phrase, error.message), error.message


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, ADAPTER_CONFIG, OPTIMIZER_STATE])
@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 100, b"[1, 2]", b"null"])
def test_files_of_garbage(
    name: str, data: bytes, trained: tuple[Core, Files], store: Store
) -> None:
    core, files = trained
    error = refused(
        core, run_config(), {**files, name: store.put_blob([data])}, store, optimizer=True
    )
    assert error.code == "damaged_checkpoint" and name in error.message


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
def test_a_missing_file(name: str, trained: tuple[Core, Files], store: Store) -> None:
    core, files = trained
    partial = {key: blob for key, blob in files.items() if key != name}
    error = refused(core, run_config(), partial, store, optimizer=True)
    assert error.code == "missing_file" and name in error.message


def test_an_adapter_of_another_kind(trained: tuple[Core, Files], store: Store) -> None:
    core, files = trained
    config = json.loads(content(files, store)[ADAPTER_CONFIG])
    config["use_dora"] = True
    spoiled = {**files, ADAPTER_CONFIG: store.put_blob([json.dumps(config).encode()])}
    error = refused(core, run_config(), spoiled, store, optimizer=False)
    assert error.code == "unsupported_adapter" and "use_dora" in error.message
