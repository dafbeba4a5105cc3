"""The Elixir client's requests, as it writes them, replayed as a third client of the server.

Nulls are spelled out, forward has a path and a wrapper of its own, numbers have gaps, a failed
creation's numbers come again, and the model's id is wanted at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest

from holdfast import AdamParams, ServiceClient, TrainingClient, types
from holdfast.runs.order import GAP_LEASE_ELIXIR
from tests.client.scenario import MODEL, batch, seen
from tests.support import tinkex
from tests.support.server import ServerProcess

pytestmark = pytest.mark.timeout(120)


class Run:
    """A training client of the Elixir client, and what it shows."""

    def __init__(self, client: tinkex.TrainingClient) -> None:
        self.client = client

    def train(self, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
        shown = []
        for seed in seeds:
            gradients = self.client.forward_backward(data(seed), "cross_entropy").result(60)
            shown.append(result(gradients))
            self.client.optim_step(learning_rate=0.002).result(60)
        shown.append(result(self.client.forward(data(1000), "cross_entropy").result(60)))
        return shown

    def save(self, name: str) -> str:
        path = self.client.save_state(name).result(60)["path"]
        assert isinstance(path, str)
        return path


def create(elixir: tinkex.ServiceClient, *, rank: int = 8, seed: int = 7) -> Run:
    return Run(elixir.create_lora_training_client(MODEL, rank=rank, seed=seed, call_timeout=None))


def data(seed: int) -> list[dict[str, Any]]:
    """The scenario's batch as flat JSON lists without shapes."""
    return [
        {
            "loss_fn_inputs": {
                name: {"data": tensor.data, "dtype": tensor.dtype}
                for name, tensor in datum.loss_fn_inputs.items()
            },
            "model_input": {
                "chunks": [{"tokens": datum.model_input.to_ints(), "type": "encoded_text"}]
            },
        }
        for datum in batch(types, seed)
    ]


def result(body: dict[str, Any]) -> dict[str, Any]:
    output = types.ForwardBackwardOutput(
        body["loss_fn_output_type"],
        [
            {name: types.TensorData(t["data"], t["dtype"]) for name, t in item.items()}
            for item in body["loss_fn_outputs"]
        ],
        body["metrics"],
    )
    return seen(output)


def train(client: TrainingClient, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """The same steps through our client."""
    shown = []
    for seed in seeds:
        gradients = client.forward_backward(batch(types, seed), "cross_entropy")
        client.optim_step(AdamParams(learning_rate=0.002))
        shown.append(seen(gradients.result(60)))
    shown.append(seen(client.forward(batch(types, 1000), "cross_entropy").result(60)))
    return shown


@pytest.fixture
def elixir(server: ServerProcess) -> Iterator[tinkex.ServiceClient]:
    with tinkex.ServiceClient(server.url) as made:
        yield made


@dataclass
class Passed:
    """A run one of whose numbers was sent nowhere, and how long what followed it took."""

    run: Run
    gradients: Future[dict[str, Any]]
    waited: Callable[[], float]


@pytest.fixture(scope="module")
def passed_over(server: ServerProcess) -> Iterator[Passed]:
    """Begun before all tests here, as most of it is waiting."""
    with tinkex.ServiceClient(server.url) as elixir:
        run = create(elixir)
        run.train((1,))
        path = run.client.save_weights_for_sampler("s").result(60)["path"]
        # Making a sampling client takes a training number that is sent nowhere.
        lost = next(run.client.numbers)
        sampler = elixir.post(
            "create_sampling_session",
            {
                "base_model": None,
                "model_path": path,
                "sampling_session_seq_id": lost,
                "session_id": elixir.session_id,
                "type": "create_sampling_session",
            },
        )
        assert sampler["sampling_session_id"]
        started = time.monotonic()
        ended: list[float] = []
        gradients = run.client.forward_backward(data(2), "cross_entropy")
        gradients.add_done_callback(lambda _: ended.append(time.monotonic()))
        yield Passed(run, gradients, lambda: ended[0] - started)


@pytest.fixture(autouse=True)
def begun(passed_over: Passed) -> None:
    """Whichever test comes first."""


def test_json_training_equals_protobuf_training_to_the_last_bit(
    elixir: tinkex.ServiceClient, service: ServiceClient
) -> None:
    ours = service.create_lora_training_client(MODEL, rank=8, seed=7).result(60)
    assert create(elixir).train((1, 2)) == train(ours, (1, 2))


def test_a_batch_in_several_requests_is_one_step(elixir: tinkex.ServiceClient) -> None:
    """Also when its first datum is too large for one: then the first request is empty."""
    whole, parts = create(elixir), create(elixir)
    parts.client.largest_body = 1
    assert [len(part) for part in tinkex.chunks(data(1), 1)] == [0, *[1 for _ in data(1)]]
    losses = []
    for run in (whole, parts):
        gradients = run.client.forward_backward(data(1), "cross_entropy").result(60)
        losses.append(gradients["metrics"]["loss:sum"])
        assert len(gradients["loss_fn_outputs"]) == len(data(1))
        metrics = run.client.optim_step().result(60)["metrics"]
        assert metrics["step"] == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_checkpoint_made_by_the_elixir_client_goes_on_in_ours(
    elixir: tinkex.ServiceClient, service: ServiceClient
) -> None:
    run = create(elixir)
    run.train((1, 2))
    path = run.save("from-elixir")
    uninterrupted = run.train((3,))
    resumed = service.create_training_client_from_state_with_optimizer(path).result(60)
    assert train(resumed, (3,)) == uninterrupted
    cold = service.create_training_client_from_state(path).result(60)
    assert train(cold, (3,)) != uninterrupted


def test_a_checkpoint_made_by_ours_goes_on_in_the_elixir_client(
    elixir: tinkex.ServiceClient, service: ServiceClient
) -> None:
    """Metadata, a model like it, a load as its first operation."""
    ours = service.create_lora_training_client(MODEL, rank=8, train_unembed=False).result(60)
    train(ours, (1, 2))
    path = ours.save_state("for-elixir").result(60).path
    uninterrupted = train(ours, (3,))
    info = elixir.post("weights_info", {"tinker_path": path})
    assert (info["base_model"], info["lora_rank"], info["train_unembed"]) == (MODEL, 8, False)
    client = elixir.create_training_client_from_state(path, optimizer=True)
    assert Run(client).train((3,)) == uninterrupted


def test_a_failed_creation_from_state_repeats_its_numbers(elixir: tinkex.ServiceClient) -> None:
    """The failed try leaves its model; the next creation has the same pair and is a new model."""
    first = create(elixir).client
    elixir.model_seq_id -= 1  # what a creation that fails at its load does not advance
    assert elixir.creation == f"{first.model_id}:0"
    assert elixir.post("get_info", {"model_id": first.model_id})["lora_rank"] == 8
    with pytest.raises(tinkex.TinkexError, match="none") as caught:
        first.load_state("tinker://none/weights/none", optimizer=True).result(60)
    assert caught.value.category == "user"
    second = create(elixir, rank=4, seed=1)
    assert second.client.model_id == first.model_id
    assert elixir.creation == f"{first.model_id}:g1:0"
    assert elixir.post("get_info", {"model_id": second.client.model_id})["lora_rank"] == 4
    path = second.save("a")
    assert elixir.post("weights_info", {"tinker_path": path})["lora_rank"] == 4
    second.client.load_state(path).result(60)
    second.train((1,))


def test_a_refusal_reads_well_without_detail(elixir: tinkex.ServiceClient) -> None:
    run = create(elixir)
    with pytest.raises(tinkex.TinkexError, match="checkpoint name") as caught:
        run.client.save_state("../../x")
    assert (caught.value.status, caught.value.category) == (400, "user")
    run.train((1,))


def test_a_number_that_never_comes_is_waited_for_and_passed_over(
    passed_over: Passed, elixir: tinkex.ServiceClient, service: ServiceClient
) -> None:
    gradients = result(passed_over.gradients.result(60))
    assert GAP_LEASE_ELIXIR - 1 <= passed_over.waited() < GAP_LEASE_ELIXIR + 20
    run = passed_over.run
    run.client.optim_step(learning_rate=0.002).result(60)
    # Two steps were taken, and the second on what a run without the gap sees.
    path = run.save("after")
    assert elixir.post("weights_info", {"tinker_path": path})["step"] == 2
    whole = service.create_lora_training_client(MODEL, rank=8, seed=7).result(60)
    train(whole, (1,))
    other = whole.forward_backward(batch(types, 2), "cross_entropy").result(60)
    assert gradients == seen(other)
