"""Every call of the official SDK works, with nothing but an address and a key set."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.support.sdk import ADAM, WAIT, batch, datum, service_client, step
from tests.support.server import ServerProcess

MODEL = "small-llama"
PROMPT = types.ModelInput.from_ints([5, 6, 7, 8])


@pytest.fixture
def client(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(MODEL, rank=8, seed=1).result(timeout=WAIT)


def weights_of(client: tinker.TrainingClient, server: ServerProcess, name: str) -> str:
    """The hash of a client's adapter weights."""
    path = client.save_state(name).result(timeout=WAIT).path
    return server.manifest(path).files["adapter_model.safetensors"].hash


def test_capabilities_name_the_served_models(service: tinker.ServiceClient) -> None:
    served = {m.model_name for m in service.get_server_capabilities().supported_models}
    assert served == {"small-llama", "small-qwen3", "holdfast-tiny"}


def test_get_info_tells_what_was_created(client: tinker.TrainingClient) -> None:
    info = client.get_info()
    assert info.model_data.model_name == MODEL
    assert (info.is_lora, info.lora_rank) == (True, 8)
    assert info.model_id == client.model_id


def test_forward_changes_nothing_and_equals_forward_backward(
    client: tinker.TrainingClient,
) -> None:
    data = batch(1)
    before = client.forward(data, "cross_entropy").result(timeout=WAIT)
    trained = client.forward_backward(data, "cross_entropy").result(timeout=WAIT)
    assert before.metrics["loss:sum"] == trained.metrics["loss:sum"]
    for item, other in zip(before.loss_fn_outputs, trained.loss_fn_outputs, strict=True):
        assert item["logprobs"].data == other["logprobs"].data


def test_loss_is_the_weighted_sum_of_the_logprobs(client: tinker.TrainingClient) -> None:
    data = batch(1)
    output = client.forward(data, "cross_entropy").result(timeout=WAIT)
    expected = 0.0
    for item, given in zip(output.loss_fn_outputs, data, strict=True):
        logprobs = np.asarray(item["logprobs"].data)
        weights = np.asarray(given.loss_fn_inputs["weights"].data)
        assert logprobs.shape == weights.shape
        assert (logprobs < 0).all()
        expected -= float(logprobs @ weights)
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)


def test_training_learns(client: tinker.TrainingClient) -> None:
    losses = []
    for _ in range(8):
        gradients = client.forward_backward([datum(list(range(20, 40)))], "cross_entropy")
        applied = client.optim_step(types.AdamParams(learning_rate=1e-2))
        losses.append(gradients.result(timeout=WAIT).metrics["loss:sum"])
        applied.result(timeout=WAIT)
    assert losses[-1] < losses[0] / 2


def test_optim_step_reports_what_it_did(client: tinker.TrainingClient) -> None:
    client.forward_backward(batch(1), "cross_entropy").result(timeout=WAIT)
    metrics = client.optim_step(ADAM).result(timeout=WAIT).metrics
    assert metrics is not None
    assert metrics["learning_rate"] == ADAM.learning_rate
    assert metrics["step"] == 1
    assert any("norm" in name and value > 0 for name, value in metrics.items()), metrics


def test_forward_backward_custom_trains_on_a_loss_of_the_users(
    client: tinker.TrainingClient, server: ServerProcess
) -> None:
    data = batch(1)
    weights = [torch.tensor(d.loss_fn_inputs["weights"].data) for d in data]

    def as_cross_entropy(
        _data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        terms = [-(w * p).sum() for w, p in zip(weights, logprobs, strict=True)]
        return torch.stack(terms).sum(), {"mine:mean": 3.0}

    custom = client.forward_backward_custom(data, as_cross_entropy)
    client.optim_step(ADAM).result(timeout=WAIT)
    metrics = custom.result(timeout=WAIT).metrics
    assert metrics["mine:mean"] == 3.0
    assert "surrogate_loss:sum" in metrics
    assert metrics["loss:sum"] == pytest.approx(metrics["surrogate_loss:sum"], rel=1e-5)


def test_custom_loss_gives_the_step_of_the_built_in_one(
    service: tinker.ServiceClient, server: ServerProcess
) -> None:
    """-dC/dlogprobs of a cross entropy are its weights, so the weights end up the same."""
    data = batch(1)
    weights = [torch.tensor(d.loss_fn_inputs["weights"].data) for d in data]

    def loss(
        _data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        terms = [-(w * p).sum() for w, p in zip(weights, logprobs, strict=True)]
        return torch.stack(terms).sum(), {}

    clients = [
        service.create_lora_training_client(MODEL, rank=8, seed=1).result(timeout=WAIT)
        for _ in range(2)
    ]
    clients[0].forward_backward(data, "cross_entropy").result(timeout=WAIT)
    clients[1].forward_backward_custom(data, loss).result(timeout=WAIT)
    for client in clients:
        client.optim_step(ADAM).result(timeout=WAIT)
    assert weights_of(clients[0], server, "plain") == weights_of(clients[1], server, "custom")


def test_load_state_brings_the_weights_back(
    client: tinker.TrainingClient, server: ServerProcess
) -> None:
    step(client, 1)
    path = client.save_state("before").result(timeout=WAIT).path
    before = weights_of(client, server, "same")
    step(client, 2)
    assert weights_of(client, server, "after") != before
    for load in (client.load_state, client.load_state_with_optimizer):
        assert load(path).result(timeout=WAIT).path == path
        assert weights_of(client, server, f"loaded-{load.__name__}") == before


def test_clients_are_made_from_saved_states(
    service: tinker.ServiceClient, client: tinker.TrainingClient, server: ServerProcess
) -> None:
    step(client, 1)
    path = client.save_state("state").result(timeout=WAIT).path
    weights = weights_of(client, server, "same")
    for create in (
        service.create_training_client_from_state,
        service.create_training_client_from_state_with_optimizer,
    ):
        made = create(path).result(timeout=WAIT)
        assert made.model_id != client.model_id
        assert made.get_info().lora_rank == 8
        assert weights_of(made, server, "copy") == weights


def test_sampling_from_saved_weights(
    service: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    step(client, 1)
    path = client.save_weights_for_sampler("for-sampling").result(timeout=WAIT).path
    assert path.endswith("/sampler_weights/for-sampling")
    samplers = [
        service.create_sampling_client(model_path=path).result(timeout=WAIT),
        client.create_sampling_client(path).result(timeout=WAIT),
        client.save_weights_and_get_sampling_client().result(timeout=WAIT),
    ]
    params = types.SamplingParams(max_tokens=6, seed=3, temperature=0.7, stop=[])
    answers = [s.sample(PROMPT, 2, params).result(timeout=WAIT) for s in samplers]
    for answer in answers:
        assert [len(s.tokens) for s in answer.sequences] == [6, 6]
        assert all(s.logprobs is not None and len(s.logprobs) == 6 for s in answer.sequences)
        assert [s.tokens for s in answer.sequences] == [s.tokens for s in answers[0].sequences]
    assert samplers[0].get_base_model() == MODEL


def test_compute_logprobs_equals_forward(client: tinker.TrainingClient) -> None:
    step(client, 1)
    tokens = [int(t) for t in np.random.default_rng(4).integers(3, 250, 24)]
    sampler = client.save_weights_and_get_sampling_client().result(timeout=WAIT)
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result(timeout=WAIT)
    forward = client.forward([datum(tokens)], "cross_entropy").result(timeout=WAIT)
    assert scored[0] is None
    expected = forward.loss_fn_outputs[0]["logprobs"].data
    # One sequence is one token longer than the other, so its matrix products may be cut otherwise.
    np.testing.assert_allclose(np.asarray(scored[1:], float), np.asarray(expected), atol=1e-5)


def test_a_snapshot_for_sampling_does_not_follow_the_training(
    client: tinker.TrainingClient,
) -> None:
    sampler = client.save_weights_and_get_sampling_client().result(timeout=WAIT)
    before = sampler.compute_logprobs(PROMPT).result(timeout=WAIT)
    step(client, 1)
    assert sampler.compute_logprobs(PROMPT).result(timeout=WAIT) == before
    newer = client.save_weights_and_get_sampling_client().result(timeout=WAIT)
    assert newer.compute_logprobs(PROMPT).result(timeout=WAIT) != before


def test_sampling_from_a_base_model(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model=MODEL).result(timeout=WAIT)
    greedy = types.SamplingParams(max_tokens=4, temperature=0.0)
    first, second = (sampler.sample(PROMPT, 1, greedy).result(timeout=WAIT) for _ in range(2))
    assert first.sequences[0].tokens == second.sequences[0].tokens


def test_rest_lists_show_runs_and_checkpoints(
    service: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    step(client, 1)
    saved = client.save_state("first").result(timeout=WAIT).path
    sampler = client.save_weights_for_sampler("second").result(timeout=WAIT).path
    rest = service.create_rest_client()

    runs = rest.list_training_runs().result(timeout=WAIT)
    run = next(r for r in runs.training_runs if r.training_run_id == client.model_id)
    assert (run.base_model, run.is_lora, run.lora_rank) == (MODEL, True, 8)
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == saved
    assert run.last_sampler_checkpoint is not None
    assert run.last_sampler_checkpoint.tinker_path == sampler
    assert rest.get_training_run(client.model_id).result(timeout=WAIT) == run
    assert rest.get_training_run_by_tinker_path(saved).result(timeout=WAIT) == run

    listed = rest.list_checkpoints(client.model_id).result(timeout=WAIT).checkpoints
    assert {(c.checkpoint_id, c.checkpoint_type) for c in listed} == {
        ("weights/first", "training"),
        ("sampler_weights/second", "sampler"),
    }
    everything = rest.list_user_checkpoints(limit=1000).result(timeout=WAIT).checkpoints
    assert {saved, sampler} <= {c.tinker_path for c in everything}

    info = rest.get_weights_info_by_tinker_path(saved).result(timeout=WAIT)
    assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL, True, 8)


def test_rest_lists_sessions_and_samplers(
    service: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    path = client.save_weights_for_sampler("s").result(timeout=WAIT).path
    service.create_sampling_client(model_path=path).result(timeout=WAIT)
    rest = service.create_rest_client()
    session_id = client.model_id.partition(":")[0]
    assert session_id in rest.list_sessions().result(timeout=WAIT).sessions
    session = rest.get_session(session_id).result(timeout=WAIT)
    assert session.training_run_ids == [client.model_id]
    (sampler_id,) = session.sampler_ids
    sampler = rest.get_sampler(sampler_id).result(timeout=WAIT)
    assert (sampler.base_model, sampler.model_path) == (MODEL, path)


def test_rest_publishes_sets_ttl_and_deletes(
    service: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    path = client.save_state("kept").result(timeout=WAIT).path
    rest = service.create_rest_client()

    def listed() -> types.Checkpoint | None:
        found = rest.list_checkpoints(client.model_id).result(timeout=WAIT).checkpoints
        return found[0] if found else None

    rest.publish_checkpoint_from_tinker_path(path).result(timeout=WAIT)
    checkpoint = listed()
    assert checkpoint is not None
    assert checkpoint.public
    rest.unpublish_checkpoint_from_tinker_path(path).result(timeout=WAIT)
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result(timeout=WAIT)
    checkpoint = listed()
    assert checkpoint is not None
    assert not checkpoint.public
    assert checkpoint.expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result(timeout=WAIT)
    checkpoint = listed()
    assert checkpoint is not None
    assert checkpoint.expires_at is None
    rest.delete_checkpoint_from_tinker_path(path).result(timeout=WAIT)
    assert listed() is None
    with pytest.raises(tinker.RequestFailedError, match="not found"):
        client.load_state(path).result(timeout=WAIT)


def test_a_save_may_be_overwritten_when_asked(
    client: tinker.TrainingClient, server: ServerProcess
) -> None:
    path = client.save_state("best").result(timeout=WAIT).path
    first = server.manifest(path).id
    step(client, 1)
    with pytest.raises(tinker.RequestFailedError, match=r"'best'.*exists already"):
        client.save_state("best").result(timeout=WAIT)
    assert server.manifest(path).id == first
    assert client.save_state("best", overwrite=True).result(timeout=WAIT).path == path
    assert server.manifest(path).step == 1


def test_save_keeps_ttl_and_metadata(
    service: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    client.save_state("meta", ttl_seconds=4000, user_metadata={"epoch": "3"}).result(timeout=WAIT)
    rest = service.create_rest_client()
    (listed,) = rest.list_checkpoints(client.model_id).result(timeout=WAIT).checkpoints
    assert listed.user_metadata == {"epoch": "3"}
    assert listed.expires_at is not None


def test_close_ends_the_session_and_keeps_the_checkpoints(server: ServerProcess) -> None:
    with service_client(server) as first:
        client = first.create_lora_training_client(MODEL, rank=8, seed=1).result(timeout=WAIT)
        path = client.save_state("kept").result(timeout=WAIT).path
    with service_client(server) as second:
        resumed = second.create_training_client_from_state_with_optimizer(path)
        assert resumed.result(timeout=WAIT).get_info().lora_rank == 8


def test_works_with_telemetry_on(server: ServerProcess) -> None:
    with service_client(server, telemetry=True) as service:
        client = service.create_lora_training_client(MODEL, rank=8, seed=1).result(timeout=WAIT)
        step(client, 1)
        with pytest.raises(tinker.RequestFailedError, match="not found"):
            client.load_state(f"tinker://{client.model_id}/weights/none").result(timeout=WAIT)


@pytest.mark.anyio
async def test_the_async_calls_work_too(
    service: tinker.ServiceClient, server: ServerProcess
) -> None:
    assert (await service.get_server_capabilities_async()).supported_models
    client = await service.create_lora_training_client_async(MODEL, rank=8, seed=1)
    data = batch(1)
    forward = await (await client.forward_async(data, "cross_entropy"))
    gradients = await client.forward_backward_async(data, "cross_entropy")
    applied = await client.optim_step_async(ADAM)
    assert (await gradients).metrics["loss:sum"] == forward.metrics["loss:sum"]
    await applied

    def loss(
        _data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.cat(logprobs).sum(), {}

    await (await client.forward_backward_custom_async(data, loss))
    path = (await (await client.save_state_async("async"))).path
    await (await client.load_state_async(path))
    await (await client.load_state_with_optimizer_async(path))
    await service.create_training_client_from_state_async(path)
    await service.create_training_client_from_state_with_optimizer_async(path)
    saved = await (await client.save_weights_for_sampler_async("async"))
    params = types.SamplingParams(max_tokens=2)
    for sampler in (
        await client.save_weights_and_get_sampling_client_async(),
        await client.create_sampling_client_async(saved.path),
        await service.create_sampling_client_async(model_path=saved.path),
    ):
        assert (await sampler.sample_async(PROMPT, 1, params)).sequences
        assert len(await sampler.compute_logprobs_async(PROMPT)) == 4
    rest = service.create_rest_client()
    assert (await rest.get_training_run_async(client.model_id)).lora_rank == 8
    assert (await rest.list_training_runs_async()).training_runs
    assert len((await rest.list_checkpoints_async(client.model_id)).checkpoints) == 2
    assert (await rest.list_user_checkpoints_async()).checkpoints
    await rest.publish_checkpoint_from_tinker_path_async(path)
    await rest.unpublish_checkpoint_from_tinker_path_async(path)
    await rest.set_checkpoint_ttl_from_tinker_path_async(path, 7200)
    await rest.delete_checkpoint_from_tinker_path_async(path)
    assert len((await rest.list_checkpoints_async(client.model_id)).checkpoints) == 1
