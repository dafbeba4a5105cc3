"""The three-way promise: uninterrupted == resumed, to the last bit, and != cold.

A run trains, saves, and trains on: that is the uninterrupted trace. A second run is made from the
save, with or without its optimizer, and trains on the same batches. Compared are every loss and
logprob, and the hashes of all files of a checkpoint that is saved at the end.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import tinker
from tinker import types

from tests.support.checkpoints import Tensors, as_bfloat16, edited_checkpoint
from tests.support.sdk import ADAM, WAIT, Trace, batch, service_client, step, trace
from tests.support.server import ServerProcess

BEFORE, AFTER = (1, 2, 3), (4, 5, 6)
"""The batches of the steps before and after the save, by their seeds."""

PENDING = (7, 8)
"""Batches of forward_backwards that the save finds accumulated and not applied."""


def created(
    service: tinker.ServiceClient, model: str = "small-llama", **options: Any
) -> tinker.TrainingClient:
    options = {"rank": 8, "seed": 11, **options}
    return service.create_lora_training_client(model, **options).result(timeout=WAIT)


def resumed(service: tinker.ServiceClient, path: str) -> tinker.TrainingClient:
    made = service.create_training_client_from_state_with_optimizer(path)
    return made.result(timeout=WAIT)


def cold(service: tinker.ServiceClient, path: str) -> tinker.TrainingClient:
    return service.create_training_client_from_state(path).result(timeout=WAIT)


@dataclass(frozen=True)
class Saved:
    """A run that was saved, and how it went on without interruption."""

    path: str
    uninterrupted: Trace
    adam: types.AdamParams
    pending: bool

    def continued(self, server: ServerProcess, client: tinker.TrainingClient) -> Trace:
        """What another client shows on the way that this run went after its save."""
        return trace(server, client, AFTER, adam=self.adam, finish_step=self.pending)


def saved_run(
    server: ServerProcess,
    client: tinker.TrainingClient,
    *,
    adam: types.AdamParams = ADAM,
    pending: bool = False,
    name: str = "middle",
) -> Saved:
    """Train, save, train on. With `pending`, the save is taken in the middle of accumulation."""
    for seed in BEFORE:
        step(client, seed, adam)
    if pending:
        for seed in PENDING:
            client.forward_backward(batch(seed), "cross_entropy").result(timeout=WAIT)
    path = client.save_state(name).result(timeout=WAIT).path
    on = trace(server, client, AFTER, adam=adam, finish_step=pending)
    return Saved(path, on, adam, pending)


def assert_three_way(server: ServerProcess, service: tinker.ServiceClient, saved: Saved) -> None:
    assert saved.continued(server, resumed(service, saved.path)) == saved.uninterrupted
    assert_cold(saved, saved.continued(server, cold(service, saved.path)))


def assert_cold(saved: Saved, other: Trace) -> None:
    """Same weights at first, so the first loss agrees; a cold optimizer, so nothing else does."""
    if not saved.pending:
        assert other.losses[0] == saved.uninterrupted.losses[0]
    assert other.losses[-1] != saved.uninterrupted.losses[-1]
    ours, theirs = saved.uninterrupted.files, other.files
    assert ours["adapter_model.safetensors"] != theirs["adapter_model.safetensors"]
    assert ours["optimizer.safetensors"] != theirs["optimizer.safetensors"]


@pytest.mark.parametrize("model", ["small-llama", "small-qwen3", "holdfast-tiny"])
def test_resumes_exactly_on(
    server: ServerProcess, service: tinker.ServiceClient, model: str
) -> None:
    assert_three_way(server, service, saved_run(server, created(service, model)))


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_resumes_exactly_at_rank(
    server: ServerProcess, service: tinker.ServiceClient, rank: int
) -> None:
    assert_three_way(server, service, saved_run(server, created(service, rank=rank)))


TRAINED = [flags for flags in itertools.product([True, False], repeat=3) if any(flags)]


@pytest.mark.parametrize(("attn", "mlp", "unembed"), TRAINED)
@pytest.mark.parametrize("model", ["small-llama", "small-qwen3"])
def test_resumes_exactly_whatever_is_trained(
    server: ServerProcess,
    service: tinker.ServiceClient,
    model: str,
    attn: bool,
    mlp: bool,
    unembed: bool,
) -> None:
    client = created(service, model, train_attn=attn, train_mlp=mlp, train_unembed=unembed)
    assert_three_way(server, service, saved_run(server, client))


@pytest.mark.parametrize(
    "adam",
    [
        types.AdamParams(learning_rate=5e-3),
        types.AdamParams(learning_rate=5e-3, weight_decay=0.2),
        types.AdamParams(learning_rate=5e-3, grad_clip_norm=0.1),
        types.AdamParams(learning_rate=5e-3, beta1=0.5, beta2=0.7, eps=1e-3),
    ],
    ids=["plain", "weight_decay", "clipping", "betas"],
)
def test_resumes_exactly_with_optimizer_parameters(
    server: ServerProcess, service: tinker.ServiceClient, adam: types.AdamParams
) -> None:
    assert_three_way(server, service, saved_run(server, created(service), adam=adam))


def test_resumes_exactly_from_the_middle_of_gradient_accumulation(
    server: ServerProcess, service: tinker.ServiceClient
) -> None:
    saved = saved_run(server, created(service), pending=True)
    assert server.manifest(saved.path).pending_forward_backwards == len(PENDING)
    assert_three_way(server, service, saved)


def test_resumes_exactly_into_a_live_run(
    server: ServerProcess, service: tinker.ServiceClient
) -> None:
    """The run that is loaded into has gradients and moments of its own, which must all go."""
    saved = saved_run(server, created(service))
    client = created(service, seed=99)
    step(client, 50)
    client.forward_backward(batch(51), "cross_entropy").result(timeout=WAIT)
    client.load_state_with_optimizer(saved.path).result(timeout=WAIT)
    assert saved.continued(server, client) == saved.uninterrupted


def test_a_weights_only_load_is_a_function_of_the_checkpoint_alone(
    server: ServerProcess, service: tinker.ServiceClient
) -> None:
    saved = saved_run(server, created(service))
    fresh = saved.continued(server, cold(service, saved.path))
    assert_cold(saved, fresh)
    trained = created(service, seed=99)
    step(trained, 50)
    trained.forward_backward(batch(51), "cross_entropy").result(timeout=WAIT)
    trained.load_state(saved.path).result(timeout=WAIT)
    assert saved.continued(server, trained) == fresh


def test_resumes_exactly_after_save_and_load_and_save(
    server: ServerProcess, service: tinker.ServiceClient
) -> None:
    saved = saved_run(server, created(service))
    path = saved.path
    for hop in range(3):
        client = resumed(service, path)
        path = client.save_state(f"hop-{hop}").result(timeout=WAIT).path
    assert server.manifest(path).files == server.manifest(saved.path).files
    assert saved.continued(server, client) == saved.uninterrupted


def test_a_save_does_not_disturb_the_run(
    server: ServerProcess, service: tinker.ServiceClient
) -> None:
    saving, plain = created(service), created(service)
    for seed in BEFORE:
        step(saving, seed)
        saving.save_state(f"at-{seed}")
        step(plain, seed)
    assert trace(server, saving, AFTER) == trace(server, plain, AFTER)


@contextmanager
def neighbours(service: tinker.ServiceClient) -> Iterator[Callable[[], int]]:
    """Two other runs that train all the while, of other ranks; yields how many steps they took."""
    clients = [created(service, rank=rank, seed=rank) for rank in (4, 16)]
    done, steps = threading.Event(), [0, 0]
    failures: list[BaseException] = []

    def train(index: int) -> None:
        try:
            while not done.is_set():
                step(clients[index], 100 + steps[index] % 5)
                steps[index] += 1
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield lambda: min(steps)
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert not failures


def test_resumes_exactly_while_two_other_tenants_train(
    server: ServerProcess, service: tinker.ServiceClient
) -> None:
    saved = saved_run(server, created(service))
    with service_client(server) as others, neighbours(others) as steps:
        before = steps()
        assert_three_way(server, service, saved)
        beside = saved_run(server, created(service), name="beside")
        assert steps() >= before + 3, "the neighbours did not train meanwhile"
    assert beside.uninterrupted == saved.uninterrupted


@pytest.mark.parametrize("end", ["restart", "kill_and_restart"])
def test_resumes_exactly_in_a_new_server_process(own_server: ServerProcess, end: str) -> None:
    with service_client(own_server) as service:
        plain = saved_run(own_server, created(service))
        pending = saved_run(own_server, created(service), pending=True)
        getattr(own_server, end)()
        # This client's session lives on; a new one, as after a crash of the client, is alike.
        assert_three_way(own_server, service, plain)
    with service_client(own_server) as service:
        assert_three_way(own_server, service, plain)
        assert_three_way(own_server, service, pending)


# --- The comparison can fail ---------------------------------------------------------------------


def unchanged(_meta: dict[str, Any], _tensors: Tensors) -> None:
    pass


def without_moments(_meta: dict[str, Any], tensors: Tensors) -> None:
    for name in tensors:
        if name.startswith("exp_avg"):
            tensors[name][...] = 0


def without_first_moments(_meta: dict[str, Any], tensors: Tensors) -> None:
    for name in tensors:
        if name.startswith("exp_avg."):
            tensors[name][...] = 0


def without_step_count(meta: dict[str, Any], _tensors: Tensors) -> None:
    meta["steps"] = dict.fromkeys(meta["steps"], 1)


def without_gradients(_meta: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("grad.")]:
        del tensors[name]


def in_bfloat16(_meta: dict[str, Any], tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = as_bfloat16(tensors[name])


OPTIMIZER, ADAPTER = "optimizer.safetensors", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def pending_run(server: ServerProcess) -> Iterator[Saved]:
    """A run saved with moments, a step count and gradients."""
    with service_client(server) as service:
        yield saved_run(server, created(service), pending=True)


def test_an_edit_that_changes_nothing_is_not_noticed(
    server: ServerProcess, service: tinker.ServiceClient, pending_run: Saved
) -> None:
    edits = {OPTIMIZER: unchanged, ADAPTER: unchanged}
    copy = edited_checkpoint(server, pending_run.path, "unchanged", edits)
    assert pending_run.continued(server, resumed(service, copy)) == pending_run.uninterrupted


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        (OPTIMIZER, without_moments),
        (OPTIMIZER, without_first_moments),
        (OPTIMIZER, without_step_count),
        (OPTIMIZER, without_gradients),
        (OPTIMIZER, in_bfloat16),
        (ADAPTER, in_bfloat16),
    ],
)
def test_the_comparison_notices_a_state(
    server: ServerProcess,
    service: tinker.ServiceClient,
    pending_run: Saved,
    file: str,
    edit: Callable[[dict[str, Any], Tensors], None],
) -> None:
    name = f"{edit.__name__}-{file.partition('.')[0]}"
    copy = edited_checkpoint(server, pending_run.path, name, {file: edit})
    other = pending_run.continued(server, resumed(service, copy))
    assert other.losses != pending_run.uninterrupted.losses
    assert other.logprobs != pending_run.uninterrupted.logprobs
    assert other.files[ADAPTER] != pending_run.uninterrupted.files[ADAPTER]
