"""Users' mistakes, through the official client: each has its message, and none does any harm.

After every mistake the same run takes a step, so nothing hangs and nothing is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.support.checkpoints import without_optimizer
from tests.support.models import CONTEXT, VOCABULARY
from tests.support.sdk import ADAM, WAIT, batch, datum, raw_datum, service_client, step
from tests.support.server import ServerProcess

MODEL = "small-llama"
REFUSED = (
    tinker.RequestFailedError,
    tinker.BadRequestError,
    tinker.NotFoundError,
    tinker.UnprocessableEntityError,
)


@pytest.fixture(scope="module")
def shared(server: ServerProcess) -> Iterator[tinker.ServiceClient]:
    with service_client(server) as service:
        yield service


@pytest.fixture(scope="module")
def client(shared: tinker.ServiceClient) -> tinker.TrainingClient:
    """One run for all mistakes."""
    return shared.create_lora_training_client(MODEL, rank=8, seed=1).result(timeout=WAIT)


@pytest.fixture(scope="module")
def saved(client: tinker.TrainingClient) -> str:
    step(client, 1)
    return client.save_state("good").result(timeout=WAIT).path


def refused(call: Callable[[], Any], *words: str) -> str:
    """The message with which `call` is refused or fails; it has all the `words` in it."""
    with pytest.raises(REFUSED) as failure:
        call().result(timeout=WAIT)
    message = str(failure.value)
    for word in words:
        assert word in message, message
    assert "Traceback" not in message
    assert ".py" not in message
    return message


def loss_of(client: tinker.TrainingClient) -> float:
    return client.forward(batch(9), "cross_entropy").result(timeout=WAIT).metrics["loss:sum"]


# --- Creating ------------------------------------------------------------------------------------


def test_an_unknown_base_model(shared: tinker.ServiceClient) -> None:
    message = refused(
        lambda: shared.create_lora_training_client("no/such-model"), "'no/such-model'"
    )
    assert "small-llama" in message, "it says which there are"
    refused(lambda: shared.create_sampling_client(base_model="no/such-model"), "'no/such-model'")
    step(shared.create_lora_training_client(MODEL, rank=1).result(timeout=WAIT), 1)


@pytest.mark.parametrize("rank", [0, -1, 100_000, 60_000])
def test_a_wrong_rank(shared: tinker.ServiceClient, rank: int) -> None:
    refused(lambda: shared.create_lora_training_client(MODEL, rank=rank), "rank", str(rank))
    step(shared.create_lora_training_client(MODEL, rank=1).result(timeout=WAIT), 1)


def test_an_unknown_optimizer(shared: tinker.ServiceClient) -> None:
    optimizer = types.DimuonOptimizerConfig()
    refused(
        lambda: shared.create_lora_training_client(MODEL, optimizer=optimizer), "dimuon", "adamw"
    )


# --- Loading -------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_rank(shared: tinker.ServiceClient, saved: str) -> None:
    other = shared.create_lora_training_client(MODEL, rank=16).result(timeout=WAIT)
    before = loss_of(other)
    for load in (other.load_state, other.load_state_with_optimizer):
        refused(lambda load=load: load(saved), "rank", "8", "16")  # type: ignore[misc]
        assert loss_of(other) == before
    step(other, 1)


@pytest.mark.parametrize("flag", ["train_attn", "train_mlp", "train_unembed"])
def test_a_checkpoint_of_other_train_flags(
    shared: tinker.ServiceClient, saved: str, flag: str
) -> None:
    options: dict[str, Any] = {"rank": 8, flag: False}
    other = shared.create_lora_training_client(MODEL, **options).result(timeout=WAIT)
    before = loss_of(other)
    for load in (other.load_state, other.load_state_with_optimizer):
        refused(lambda load=load: load(saved), flag, "True", "False")  # type: ignore[misc]
        assert loss_of(other) == before
    step(other, 1)


def test_a_checkpoint_of_another_base_model(shared: tinker.ServiceClient, saved: str) -> None:
    other = shared.create_lora_training_client("small-qwen3", rank=8).result(timeout=WAIT)
    refused(lambda: other.load_state(saved), MODEL, "small-qwen3")
    step(other, 1)


def test_a_missing_checkpoint(shared: tinker.ServiceClient, client: tinker.TrainingClient) -> None:
    for missing in (
        f"tinker://{client.model_id}/weights/none",
        "tinker://no-such-run/weights/none",
        f"tinker://{client.model_id}/sampler_weights/none",
    ):
        before = loss_of(client)
        if "sampler" not in missing:
            refused(lambda path=missing: client.load_state(path), missing, "not found")  # type: ignore[misc]
            for create in (
                shared.create_training_client_from_state,
                shared.create_training_client_from_state_with_optimizer,
            ):
                refused(lambda c=create, p=missing: c(p), missing, "not found")  # type: ignore[misc]
        refused(
            lambda path=missing: shared.create_sampling_client(model_path=path),  # type: ignore[misc]
            missing,
            "not found",
        )
        assert loss_of(client) == before
    step(client, 1)


def test_a_sampler_path_where_a_training_path_is_needed(
    shared: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    path = client.save_weights_for_sampler("only-sampling").result(timeout=WAIT).path
    for load in (client.load_state, client.load_state_with_optimizer):
        refused(lambda load=load: load(path), path, "sampling", "/weights/")  # type: ignore[misc]
    refused(lambda: shared.create_training_client_from_state(path), path, "sampling")
    step(client, 1)


def test_loading_an_optimizer_that_was_not_saved(
    server: ServerProcess,
    shared: tinker.ServiceClient,
    client: tinker.TrainingClient,
    saved: str,
) -> None:
    path = without_optimizer(server, saved, "weights-only")
    before = loss_of(client)
    refused(lambda: client.load_state_with_optimizer(path), path, "no optimizer state")
    assert loss_of(client) == before
    refused(
        lambda: shared.create_training_client_from_state_with_optimizer(path),
        path,
        "no optimizer state",
    )
    client.load_state(path).result(timeout=WAIT)
    step(client, 1)


def test_saving_with_a_ttl_that_is_too_short(client: tinker.TrainingClient) -> None:
    refused(lambda: client.save_state("short", ttl_seconds=60), "ttl_seconds", "60", "3600")
    step(client, 1)


# --- Batches -------------------------------------------------------------------------------------

TOKENS = list(range(10, 20))
ONES = [1.0] * 10


def wrong(at: int, value: Any, values: list[Any]) -> list[Any]:
    changed = list(values)
    changed[at] = value
    return changed


BATCHES: dict[str, tuple[list[types.Datum], tuple[str, ...]]] = {
    "token outside the vocabulary": (
        [datum(TOKENS), datum(wrong(3, VOCABULARY, TOKENS))],
        ("atum 1", "tokens[3]", str(VOCABULARY)),
    ),
    "negative token": ([datum(wrong(2, -1, TOKENS))], ("atum 0", "tokens[2]", "-1")),
    "target outside the vocabulary": (
        [raw_datum(TOKENS, target_tokens=wrong(4, 9999, TOKENS), weights=ONES)],
        ("atum 0", "target_tokens[4]", "9999"),
    ),
    "too few targets": (
        [raw_datum(TOKENS, target_tokens=TOKENS[:7], weights=ONES[:7])],
        ("atum 0", "target_tokens", "7", "10"),
    ),
    "too few weights": (
        [raw_datum(TOKENS, target_tokens=TOKENS, weights=ONES[:3])],
        ("atum 0", "weights", "3", "10"),
    ),
    "NaN weight": (
        [raw_datum(TOKENS, target_tokens=TOKENS, weights=wrong(5, float("nan"), ONES))],
        ("atum 0", "weights[5]", "nan", "finite"),
    ),
    "infinite weight": (
        [raw_datum(TOKENS, target_tokens=TOKENS, weights=wrong(0, float("inf"), ONES))],
        ("atum 0", "weights[0]", "inf", "finite"),
    ),
    "no weights": (
        [raw_datum(TOKENS, target_tokens=TOKENS)],
        ("atum 0", "'weights'", "cross_entropy"),
    ),
    "no targets": ([raw_datum(TOKENS, weights=ONES)], ("atum 0", "'target_tokens'")),
    "an input that nobody knows": (
        [raw_datum(TOKENS, target_tokens=TOKENS, weights=ONES, mask=np.ones(10, np.float32))],
        ("atum 0", "'mask'", "weights"),
    ),
    "over-long sequence": (
        [datum([5] * (CONTEXT + 2))],
        ("atum 0", str(CONTEXT + 1), str(CONTEXT)),
    ),
    "empty sequence": ([raw_datum([], target_tokens=[], weights=[])], ("atum 0", "no tokens")),
    "an image": (
        [
            types.Datum(
                model_input=types.ModelInput(
                    chunks=[types.ImageChunk(data=b"\x89PNG", format="png")]
                ),
                loss_fn_inputs={},
            )
        ],
        ("atum 0", "chunk 0", "image", "encoded_text"),
    ),
}


@pytest.mark.parametrize("mistake", BATCHES)
def test_a_batch_with(client: tinker.TrainingClient, mistake: str) -> None:
    data, words = BATCHES[mistake]
    before = loss_of(client)
    refused(lambda: client.forward(data, "cross_entropy"), *words)
    message = refused(lambda: client.forward_backward(data, "cross_entropy"), *words)
    assert loss_of(client) == before
    # The user's batch was not complete, so it must not be stepped on; then all is well again.
    told = refused(lambda: client.optim_step(ADAM), "forward_backward")
    assert words[-1] in told, (told, message)
    assert loss_of(client) == before
    step(client, 1)


def test_an_unknown_loss(client: tinker.TrainingClient) -> None:
    unknown: Any = "focal"
    refused(lambda: client.forward(batch(1), unknown), "'focal'", "cross_entropy")
    step(client, 1)


def test_a_loss_setting_that_does_not_exist(client: tinker.TrainingClient) -> None:
    refused(lambda: client.forward(batch(1), "cross_entropy", {"smoothing": 0.1}), "'smoothing'")
    step(client, 1)


def test_gradients_that_are_not_finite(client: tinker.TrainingClient, saved: str) -> None:
    client.load_state_with_optimizer(saved).result(timeout=WAIT)
    before = loss_of(client)
    huge = [raw_datum(TOKENS, target_tokens=TOKENS, weights=[3e38] * 10)]
    client.forward_backward(huge, "cross_entropy").result(timeout=WAIT)
    refused(lambda: client.optim_step(ADAM), "gradient", "lora_", "finite")
    assert loss_of(client) == before, "the step changed nothing"
    # The gradients are gone: the next step is that of a run that never had them.
    after = step(client, 1).metrics["loss:sum"], loss_of(client)
    client.load_state_with_optimizer(saved).result(timeout=WAIT)
    assert (step(client, 1).metrics["loss:sum"], loss_of(client)) == after


def test_a_failed_part_spoils_the_step_but_not_the_run(
    client: tinker.TrainingClient, saved: str
) -> None:
    """Never a step on part of a batch, even when a good part came after the bad one."""
    client.load_state_with_optimizer(saved).result(timeout=WAIT)
    before = loss_of(client)
    good = client.forward_backward(batch(1), "cross_entropy")
    bad = client.forward_backward([datum([VOCABULARY] * 9)], "cross_entropy")
    also_good = client.forward_backward(batch(2), "cross_entropy")
    stepped = client.optim_step(ADAM)
    good.result(timeout=WAIT)
    refused(lambda: bad, "tokens[0]")
    also_good.result(timeout=WAIT)
    refused(lambda: stepped, "tokens[0]")
    assert loss_of(client) == before


def test_a_step_without_gradients_changes_nothing(client: tinker.TrainingClient) -> None:
    before = loss_of(client)
    metrics = client.optim_step(ADAM).result(timeout=WAIT).metrics
    assert metrics is not None
    assert loss_of(client) == before


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"beta1": 1.0}, ("beta1", "1.0")),
        ({"learning_rate": -1e-3}, ("learning_rate", "-0.001")),
        ({"eps": -1.0}, ("eps", "-1.0")),
        ({"grad_clip_norm": -1.0}, ("grad_clip_norm", "-1.0")),
        ({"weight_decay": -0.5}, ("weight_decay", "-0.5")),
    ],
)
def test_wrong_optimizer_parameters(
    client: tinker.TrainingClient, params: dict[str, float], words: tuple[str, ...]
) -> None:
    client.forward_backward(batch(1), "cross_entropy").result(timeout=WAIT)
    refused(lambda: client.optim_step(types.AdamParams(**params)), *words)
    client.optim_step(ADAM).result(timeout=WAIT)
    step(client, 1)


# --- Sampling ------------------------------------------------------------------------------------


def test_sampling_mistakes(client: tinker.TrainingClient) -> None:
    sampler = client.save_weights_and_get_sampling_client().result(timeout=WAIT)
    params = types.SamplingParams(max_tokens=2)
    outside = types.ModelInput.from_ints([5, VOCABULARY])
    refused(lambda: sampler.sample(outside, 1, params), str(VOCABULARY), "vocabulary")
    long = types.ModelInput.from_ints([5] * (CONTEXT + 1))
    refused(lambda: sampler.sample(long, 1, params), str(CONTEXT))
    assert sampler.sample(types.ModelInput.from_ints([5]), 1, params).result(timeout=WAIT)
