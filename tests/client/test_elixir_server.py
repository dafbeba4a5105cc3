"""The Elixir client's requests, as it writes them, replayed as a third client of the server.

Nulls are spelled out, forward has a path and a wrapper of its own, numbers have gaps, a failed
creation's numbers come again, and the model's id is wanted at once.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from holdfast import AdamParams, ServiceClient, TrainingClient, types
from holdfast.runs.order import GAP_LEASE_ELIXIR
from tests.client.scenario import MODEL, batch, seen
from tests.support.server import ServerProcess

pytestmark = pytest.mark.timeout(120)

ADAM = {
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1.0e-12,
    "grad_clip_norm": 0.0,
    "learning_rate": 0.002,
    "weight_decay": 0.0,
}


class Elixir:
    """Sends what tinkex sends, and reads answers by the rules that it matches them with."""

    def __init__(self, url: str) -> None:
        self.http = httpx2.Client(
            base_url=f"{url}/api/v1/",
            headers={
                "user-agent": "AsyncTinkex/Elixir 0.15.0",
                "x-api-key": "tml-elixir",
                "accept": "application/json",
                "accept-encoding": "gzip",
                "content-type": "application/json",
            },
            timeout=60,
        )
        self.session_id = self.post(
            "create_session",
            {
                "project_id": None,
                "sdk_version": "0.15.0",
                "tags": ["tinkex-elixir"],
                "type": "create_session",
                "user_metadata": None,
            },
        )["session_id"]
        self.model_seq_id = 0
        self.creation = ""
        """The request that made the last model."""

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"x-idempotency-key": uuid.uuid4().hex}
        answer = self.http.post(path, json=body, headers=headers)
        found = answer.json()
        assert isinstance(found, dict)
        if answer.status_code >= 300:
            # Only these are read; `detail` is not.
            assert isinstance(found.get("message") or found.get("error"), str)
            raise Refused(answer.status_code, str(found["category"]), str(found["message"]))
        return found

    def await_future(self, submitted: dict[str, Any], kind: str) -> dict[str, Any]:
        """Poll as tinkex does; an answer that it could not match fails here too."""
        for iteration in itertools.count():
            answer = self.http.post(
                "retrieve_future",
                json={"allow_metadata_only": True, "request_id": submitted["request_id"]},
                headers={
                    "x-idempotency-key": uuid.uuid4().hex,
                    "x-stainless-raw-response": "raw",
                    "x-tinker-request-iteration": str(iteration),
                    "x-tinker-request-type": kind,
                },
            )
            assert answer.status_code == 200, answer.text
            body: dict[str, Any] = answer.json()
            if body.get("type") == "try_again":
                assert isinstance(body["request_id"], str)
                assert isinstance(body["queue_state"], str)
                continue
            if body.get("status") == "failed":
                assert isinstance(body["error"], dict)
                assert body["error"]["category"] == "user", "it would poll for ever"
                raise Refused(200, body["error"]["category"], body["error"]["message"])
            assert "type" in body or "loss_fn_output_type" in body, body
            return body
        raise AssertionError

    def create_model(self, **changes: Any) -> str:
        """Its number goes on only after a success."""
        answer = self.post(
            "create_model",
            {
                "base_model": MODEL,
                "lora_config": {
                    "rank": 8,
                    "seed": 7,
                    "train_attn": True,
                    "train_mlp": True,
                    "train_unembed": True,
                    **changes,
                },
                "model_seq_id": self.model_seq_id,
                "session_id": self.session_id,
                "type": "create_model",
                "user_metadata": None,
            },
        )
        self.creation = answer["request_id"]
        model_id = answer["model_id"]  # wanted at once: the future is never polled
        assert isinstance(model_id, str)
        return model_id


class Refused(Exception):
    def __init__(self, status: int, category: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.category = category


class Run:
    """A training client: numbers from 1, one for each operation."""

    def __init__(self, elixir: Elixir, model_id: str) -> None:
        self.elixir = elixir
        self.model_id = model_id
        self.numbers = itertools.count(1)

    def send(self, path: str, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        submitted = self.elixir.post(
            path, {**body, "model_id": self.model_id, "seq_id": next(self.numbers)}
        )
        return self.elixir.await_future(submitted, kind)

    def train(self, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
        shown = []
        for seed in seeds:
            body = {"forward_backward_input": {"data": data(seed), "loss_fn": "cross_entropy"}}
            shown.append(result(self.send("forward_backward", "ForwardBackward", body)))
            self.send("optim_step", "OptimStep", {"adam_params": ADAM})
        body = {"forward_input": {"data": data(1000), "loss_fn": "cross_entropy"}}
        shown.append(result(self.send("forward", "Forward", body)))
        return shown

    def save(self, name: str) -> str:
        body = {"path": name, "ttl_seconds": None, "type": "save_weights"}
        path = self.send("save_weights", "SaveWeights", body)["path"]
        assert isinstance(path, str)
        return path

    def load(self, path: str, *, optimizer: bool) -> None:
        body = {"optimizer": optimizer, "path": path, "type": "load_weights"}
        assert self.send("load_weights", "LoadWeights", body)["type"] == "load_weights"


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
def elixir(server: ServerProcess) -> Iterator[Elixir]:
    made = Elixir(server.url)
    yield made
    made.http.close()


def test_json_training_equals_protobuf_training_to_the_last_bit(
    elixir: Elixir, service: ServiceClient
) -> None:
    ours = service.create_lora_training_client(MODEL, rank=8, seed=7).result(60)
    assert Run(elixir, elixir.create_model()).train((1, 2)) == train(ours, (1, 2))


def test_a_checkpoint_made_by_the_elixir_client_goes_on_in_ours(
    elixir: Elixir, service: ServiceClient
) -> None:
    run = Run(elixir, elixir.create_model())
    run.train((1, 2))
    path = run.save("from-elixir")
    uninterrupted = run.train((3,))
    resumed = service.create_training_client_from_state_with_optimizer(path).result(60)
    assert train(resumed, (3,)) == uninterrupted
    cold = service.create_training_client_from_state(path).result(60)
    assert train(cold, (3,)) != uninterrupted


def test_a_checkpoint_made_by_ours_goes_on_in_the_elixir_client(
    elixir: Elixir, service: ServiceClient
) -> None:
    """Metadata, a model like it, a load as its first operation."""
    ours = service.create_lora_training_client(MODEL, rank=8, train_unembed=False).result(60)
    train(ours, (1, 2))
    path = ours.save_state("for-elixir").result(60).path
    uninterrupted = train(ours, (3,))
    info = elixir.post("weights_info", {"tinker_path": path})
    assert info["is_lora"] is True
    assert (info["base_model"], info["lora_rank"]) == (MODEL, 8)
    flags = {name: info[name] for name in ("train_attn", "train_mlp", "train_unembed")}
    run = Run(elixir, elixir.create_model(rank=info["lora_rank"], seed=None, **flags))
    run.load(path, optimizer=True)
    assert run.train((3,)) == uninterrupted


def test_a_failed_creation_from_state_repeats_its_numbers(elixir: Elixir) -> None:
    """The failed try leaves its model; the next creation has the same pair and is a new model."""
    first = Run(elixir, elixir.create_model())
    assert elixir.creation == f"{first.model_id}:0"
    assert elixir.post("get_info", {"model_id": first.model_id})["lora_rank"] == 8
    with pytest.raises(Refused) as caught:
        first.load("tinker://none/weights/none", optimizer=True)
    assert caught.value.category == "user"
    assert "none" in str(caught.value)
    second = Run(elixir, elixir.create_model(rank=4, seed=1))
    assert second.model_id == first.model_id
    assert elixir.creation == f"{first.model_id}:g1:0"
    assert elixir.post("get_info", {"model_id": second.model_id})["lora_rank"] == 4
    path = second.save("a")
    assert elixir.post("weights_info", {"tinker_path": path})["lora_rank"] == 4
    second.load(path, optimizer=False)
    second.train((1,))


def test_a_number_that_never_comes_is_waited_for_and_passed_over(
    elixir: Elixir, service: ServiceClient
) -> None:
    """Making a sampling client takes a training number that is sent nowhere."""
    run = Run(elixir, elixir.create_model())
    run.train((1,))
    path = run.send(
        "save_weights_for_sampler",
        "SaveWeightsForSampler",
        {
            "path": "s",
            "sampling_session_seq_id": None,
            "ttl_seconds": None,
            "type": "save_weights_for_sampler",
        },
    )["path"]
    lost = next(run.numbers)
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
    body = {"forward_backward_input": {"data": data(2), "loss_fn": "cross_entropy"}}
    gradients = result(run.send("forward_backward", "ForwardBackward", body))
    waited = time.monotonic() - started
    assert GAP_LEASE_ELIXIR - 1 <= waited < GAP_LEASE_ELIXIR + 20
    run.send("optim_step", "OptimStep", {"adam_params": ADAM})
    # Two steps were taken, and the second on what a run without the gap sees.
    path = run.save("after")
    assert elixir.post("weights_info", {"tinker_path": path})["step"] == 2
    whole = service.create_lora_training_client(MODEL, rank=8, seed=7).result(60)
    train(whole, (1,))
    other = whole.forward_backward(batch(types, 2), "cross_entropy").result(60)
    assert gradients == seen(other)


def test_a_refusal_reads_well_without_detail(elixir: Elixir) -> None:
    run = Run(elixir, elixir.create_model())
    with pytest.raises(Refused, match="checkpoint name") as caught:
        run.save("../../x")
    assert (caught.value.status, caught.value.category) == (400, "user")
    run.train((1,))
