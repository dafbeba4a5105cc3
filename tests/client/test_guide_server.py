"""Each sentence of the persistence guide is a test of that name, against a real server process."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator

import pytest

from holdfast import (
    AdamParams,
    RestClient,
    ServiceClient,
    TrainingClient,
    types,
)
from holdfast.errors import (
    AwaitTimeoutError,
    ConflictError,
    HoldfastError,
    NotFoundError,
    RequestError,
)
from tests.client.scenario import batch, seen
from tests.support.server import ServerProcess

ADAM = AdamParams(learning_rate=2e-3)
MODEL = "holdfast-tiny"

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def training(service: ServiceClient) -> TrainingClient:
    return service.create_lora_training_client(MODEL, rank=4, seed=3).result(60)


@pytest.fixture
def rest(server: ServerProcess) -> RestClient:
    return RestClient(base_url=server.url)


def step(client: TrainingClient, seed: int) -> dict[str, object]:
    gradients = client.forward_backward(batch(types, seed), "cross_entropy")
    client.optim_step(ADAM).result(60)
    return seen(gradients.result(60))


def trained(client: TrainingClient, *seeds: int) -> list[dict[str, object]]:
    return [step(client, seed) for seed in seeds]


def models(client: ServiceClient) -> list[str]:
    """The ids of the session's runs that the server still has in memory."""
    rest = client.create_rest_client()
    session = client._session._id
    assert session is not None
    return rest.get_session(session).result(10).training_run_ids


# ---- saving ----


def test_save_a_named_checkpoint_the_server_returns_a_path_you_can_store(
    training: TrainingClient, service: ServiceClient
) -> None:
    step(training, 1)
    path = training.save_state("checkpoint-001").result(60).path
    assert path == f"tinker://{training.model_id}/weights/checkpoint-001"
    after = step(training, 2)
    again = service.create_training_client_from_state_with_optimizer(path).result(60)
    assert step(again, 2) == after


@pytest.mark.parametrize("name", ["epoch-3-loss-1.23", "000060", "final", "a_b.c"])
def test_use_descriptive_names(training: TrainingClient, name: str) -> None:
    assert training.save_state(name).result(60).path.endswith(f"/weights/{name}")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "x" * 500, "a\0", "auto.1"])
def test_names_that_are_none_are_refused_and_the_run_stays_usable(
    training: TrainingClient, name: str
) -> None:
    with pytest.raises(RequestError):
        training.save_state(name).result(60)
    step(training, 1)


def test_a_name_that_is_taken_needs_overwrite(training: TrainingClient) -> None:
    path = training.save_state("a").result(60).path
    with pytest.raises(ConflictError, match="a"):
        training.save_state("a").result(60)
    step(training, 1)
    assert training.save_state("a", overwrite=True).result(60).path == path


def test_a_save_holds_what_was_called_before_it_and_nothing_after(
    training: TrainingClient, service: ServiceClient
) -> None:
    """Everything is sent ahead, nothing is awaited in between."""
    training.forward_backward(batch(types, 1), "cross_entropy")
    training.optim_step(ADAM)
    saved = training.save_state("between")
    second = training.forward_backward(batch(types, 2), "cross_entropy")
    training.optim_step(ADAM)
    third = training.forward_backward(batch(types, 3), "cross_entropy")
    loaded = service.create_training_client_from_state_with_optimizer(saved.result(60).path)
    assert step(loaded.result(60), 2) == seen(second.result(60))
    assert seen(second.result(60)) != seen(third.result(60))


def test_metadata_and_time_to_live_are_kept(training: TrainingClient, rest: RestClient) -> None:
    path = training.save_state("a", ttl_seconds=7200, user_metadata={"k": "v"}).result(60).path
    (found,) = rest.list_checkpoints(training.model_id).result(10).checkpoints
    assert found.tinker_path == path
    assert found.user_metadata == {"k": "v"}
    assert found.expires_at is not None
    assert 7000 < (found.expires_at - found.time).total_seconds() <= 7300
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result(10)
    (found,) = rest.list_checkpoints(training.model_id).result(10).checkpoints
    assert found.expires_at is None


# ---- loading ----


def test_use_load_state_when_changing_the_optimizer_it_gives_the_weights_alone(
    training: TrainingClient, service: ServiceClient
) -> None:
    trained(training, 1, 2)
    path = training.save_state("a").result(60).path
    uninterrupted = trained(training, 3, 4)
    training.load_state(path).result(60)
    in_place = trained(training, 3, 4)
    cold = trained(service.create_training_client_from_state(path).result(60), 3, 4)
    # What you get is a function of the checkpoint alone, on a used model and on a new one.
    assert in_place == cold
    assert cold[0] == uninterrupted[0]
    assert cold[1] != uninterrupted[1]


def test_use_load_state_with_optimizer_to_resume_training_exactly_where_it_left_off(
    training: TrainingClient, service: ServiceClient
) -> None:
    trained(training, 1, 2)
    path = training.save_state("a").result(60).path
    uninterrupted = trained(training, 3, 4)
    training.load_state_with_optimizer(path).result(60)
    assert trained(training, 3, 4) == uninterrupted
    resumed = service.create_training_client_from_state_with_optimizer(path).result(60)
    assert trained(resumed, 3, 4) == uninterrupted


def test_gradients_that_were_accumulated_are_resumed_and_said(
    training: TrainingClient, service: ServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    training.forward_backward(batch(types, 1), "cross_entropy")
    path = training.save_state("pending").result(60).path
    training.optim_step(ADAM).result(60)
    after = step(training, 2)
    resumed = service.create_training_client_from_state_with_optimizer(path).result(60)
    assert resumed.loaded is not None
    assert resumed.loaded.pending_forward_backwards == 1
    assert "no optim_step has applied" in caplog.text
    resumed.optim_step(ADAM).result(60)
    assert step(resumed, 2) == after


# ---- clients from checkpoints ----


def test_the_client_derives_the_models_configuration_from_the_checkpoint(
    service: ServiceClient, rest: RestClient
) -> None:
    first = service.create_lora_training_client(
        MODEL, rank=3, train_unembed=False, train_mlp=False
    ).result(60)
    path = first.save_state("a").result(60).path
    for make in (
        service.create_training_client_from_state,
        service.create_training_client_from_state_with_optimizer,
    ):
        info = make(path).result(60).get_info()
        assert (info.lora_rank, info.model_data.model_name) == (3, MODEL)
        assert (info.train_unembed, info.train_mlp, info.train_attn) == (False, False, True)
    known = rest.get_weights_info_by_tinker_path(path).result(10)
    assert (known.lora_rank, known.train_unembed, known.base_model) == (3, False, MODEL)


def test_three_requests_give_what_one_gives(
    training: TrainingClient, service: ServiceClient
) -> None:
    """The way of servers that do not create a model by its load."""
    trained(training, 1, 2)
    path = training.save_state("a").result(60).path
    uninterrupted = trained(training, 3)
    service._session.config = service._session.config.model_copy(update={"create_by_load": False})
    resumed = service.create_training_client_from_state_with_optimizer(path).result(60)
    assert trained(resumed, 3) == uninterrupted


@pytest.mark.anyio
async def test_async_variants_are_also_available(server: ServerProcess) -> None:
    async with ServiceClient(base_url=server.url) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=3)
        saved = await (await training.save_state_async("a"))
        await (await training.load_state_async(saved.path))
        await (await training.load_state_with_optimizer_async(saved.path))
        one = await service.create_training_client_from_state_async(saved.path)
        two = await service.create_training_client_from_state_with_optimizer_async(saved.path)
        outputs = await asyncio.gather(
            *[c.forward(batch(types, 1), "cross_entropy") for c in (training, one, two)]
        )
        assert seen(outputs[0]) == seen(outputs[1]) == seen(outputs[2])


# ---- failures ----


@pytest.mark.parametrize(
    "make",
    ["create_training_client_from_state", "create_training_client_from_state_with_optimizer"],
)
@pytest.mark.parametrize("one_request", [True, False])
def test_if_it_fails_to_load_the_temporary_client_is_closed_and_the_model_is_gone(
    server: ServerProcess, make: str, one_request: bool
) -> None:
    with ServiceClient(base_url=server.url) as service:
        training = service.create_lora_training_client(MODEL, rank=4).result(60)
        path = training.save_weights_for_sampler("s").result(60).path
        assert path is not None
        service._session.config = service._session.config.model_copy(
            update={"create_by_load": one_request}
        )
        missing = f"tinker://{training.model_id}/weights/none"
        for wrong in (missing, path, "nonsense"):
            with pytest.raises(RequestError):
                getattr(service, make)(wrong).result(60)
        assert loaded_models(service) == [training.model_id]


def test_without_the_clean_up_the_model_would_stay(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative of the test above."""

    async def leave(self: object) -> None:
        pass

    monkeypatch.setattr("holdfast.client.service._Making._unmake", leave)
    with ServiceClient(base_url=server.url) as service:
        training = service.create_lora_training_client(MODEL, rank=4).result(60)
        path = training.save_weights_for_sampler("s").result(60).path
        assert path is not None
        service._session.config = service._session.config.model_copy(
            update={"create_by_load": False}
        )
        with pytest.raises(RequestError):
            service.create_training_client_from_state(path).result(60)
        assert len(loaded_models(service)) == 2


def loaded_models(service: ServiceClient) -> list[str]:
    """Which of the session's models take operations: a far number is accepted, or refused.

    An unloaded one stays known, for polls. For the end of a test: a model asked waits for the gap.
    """
    alive: list[str] = []
    for model_id in models(service):
        request = {"model_id": model_id, "seq_id": 5_000, "adam_params": {}}
        answer = service._session.server.call(
            "POST", "optim_step", request, accept=frozenset(range(400, 500))
        )
        if service._future(answer).result(10).status == 200:
            alive.append(model_id)
    return alive


def test_waiting_can_be_capped_and_the_client_stays_usable(training: TrainingClient) -> None:
    step(training, 1)
    path = training.save_state("a").result(60).path
    for _ in range(8):
        training.forward(batch(types, 1), "cross_entropy")
    with pytest.raises(AwaitTimeoutError, match="may still finish"):
        training.load_state_with_optimizer(path, await_timeout=0.001).result(60)
    step(training, 2)


def test_errors_carry_what_a_caller_needs(training: TrainingClient) -> None:
    with pytest.raises(NotFoundError) as caught:
        training.load_state(f"tinker://{training.model_id}/weights/none").result(60)
    error = caught.value
    assert isinstance(error, HoldfastError)
    assert error.code == "checkpoint_not_found"
    assert error.category == "user"
    assert not error.retryable
    assert "none" in error.message


def test_requests_are_sequentially_ordered(training: TrainingClient) -> None:
    """Sent ahead in one go, the losses are those of a loop that waits for each."""
    sent = []
    for seed in (1, 2, 3, 4):
        sent.append(training.forward_backward(batch(types, seed), "cross_entropy"))
        training.optim_step(ADAM)
    ahead = [seen(future.result(60)) for future in sent]
    with_waits = training_like(training)
    assert ahead == trained(with_waits, 1, 2, 3, 4)


def training_like(training: TrainingClient) -> TrainingClient:
    service = ServiceClient(base_url=training._server.base_url)
    return service.create_lora_training_client(MODEL, rank=4, seed=3).result(60)


def test_unload_frees_the_model_and_keeps_its_checkpoints(
    training: TrainingClient, service: ServiceClient
) -> None:
    path = training.save_state("a").result(60).path
    training.unload().result(60)
    assert training.model_id not in loaded_models(service)
    service.create_training_client_from_state_with_optimizer(path).result(60)


# ---- a server that dies ----


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that tests may kill, as long as they leave one running."""
    with ServerProcess(tmp_path_factory.mktemp("mortal")) as running:
        yield running


def test_an_acknowledged_save_outlives_kill_9(mortal: ServerProcess) -> None:
    with ServiceClient(base_url=mortal.url) as service:
        training = service.create_lora_training_client(MODEL, rank=4, seed=3).result(60)
        trained(training, 1, 2)
        path = training.save_state("a").result(60).path
        uninterrupted = trained(training, 3, 4)
        mortal.kill()
        mortal.start()
        resumed = service.create_training_client_from_state_with_optimizer(path).result(60)
        assert trained(resumed, 3, 4) == uninterrupted


def test_operations_called_while_the_server_is_away_are_done_when_it_is_back(
    mortal: ServerProcess,
) -> None:
    with ServiceClient(base_url=mortal.url) as service:
        training = service.create_lora_training_client(MODEL, rank=4, seed=3).result(60)
        trained(training, 1)
        path = training.save_state("a").result(60).path
        uninterrupted = trained(training, 2)
        mortal.kill()
        making = service.create_training_client_from_state_with_optimizer(path)
        time.sleep(1.0)
        assert not making.done()
        mortal.start()
        assert trained(making.result(60), 2) == uninterrupted


# ---- what else a script meets ----


def test_sampling_and_its_logprobs(training: TrainingClient, service: ServiceClient) -> None:
    step(training, 1)
    sampler = training.save_weights_and_get_sampling_client().result(60)
    prompt = types.ModelInput.from_ints([10, 20, 30])
    params = types.SamplingParams(max_tokens=5, temperature=0.0)
    output = sampler.sample(prompt, 2, params, include_prompt_logprobs=True).result(60)
    assert len(output.sequences) == 2
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert output.prompt_logprobs == sampler.compute_logprobs(prompt).result(60)
    assert sampler.get_base_model() == MODEL
    base = service.create_sampling_client(base_model=MODEL).result(60)
    assert base.compute_logprobs(prompt).result(60) != output.prompt_logprobs


def test_a_custom_loss_steps_as_the_built_in_one(
    training: TrainingClient, service: ServiceClient
) -> None:
    torch = pytest.importorskip("torch")
    data = batch(types, 1)

    def loss(data: list[types.Datum], logprobs: list[object]) -> tuple[object, dict[str, float]]:
        parts = [
            (lp * d.loss_fn_inputs["weights"].to_torch()).sum()
            for d, lp in zip(data, logprobs, strict=True)
        ]
        total = -torch.stack(parts).sum()
        return total, {"parts": float(len(parts))}

    output = training.forward_backward_custom(data, loss).result(60)  # type: ignore[arg-type]
    training.optim_step(ADAM).result(60)
    assert output.metrics["parts"] == 3.0
    assert {"loss:sum", "surrogate_loss:sum"} <= set(output.metrics)
    plain = service.create_lora_training_client(MODEL, rank=4, seed=3).result(60)
    built_in = step(plain, 1)
    assert seen(output)["logprobs"] == built_in["logprobs"]
    assert step(training, 2) == step(plain, 2)


def test_a_custom_loss_that_fails_keeps_the_next_step_from_a_part_of_a_batch(
    training: TrainingClient,
) -> None:
    pytest.importorskip("torch")

    def broken(data: object, logprobs: object) -> tuple[object, dict[str, float]]:
        raise KeyError("mine")

    training.forward_backward(batch(types, 1), "cross_entropy")
    failed = training.forward_backward_custom(batch(types, 2), broken)  # type: ignore[arg-type]
    stepped = training.optim_step(ADAM)
    with pytest.raises(KeyError, match="mine"):
        failed.result(60)
    with pytest.raises(RequestError, match="gradients"):
        stepped.result(60)
    step(training, 3)


def test_the_tokenizer_comes_from_the_server(
    training: TrainingClient, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    tokenizer = training.get_tokenizer()
    text = "3 March 2024"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_runs_and_checkpoints_can_be_managed(
    training: TrainingClient, rest: RestClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    step(training, 1)
    path = training.save_state("a").result(60).path
    run = rest.get_training_run_by_tinker_path(path).result(10)
    assert run.training_run_id == training.model_id
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == path
    assert training.model_id in [
        found.training_run_id for found in rest.list_training_runs().result(10).training_runs
    ]
    rest.publish_checkpoint_from_tinker_path(path).result(10)
    assert rest.list_checkpoints(training.model_id).result(10).checkpoints[0].public
    rest.unpublish_checkpoint_from_tinker_path(path).result(10)
    folder = rest.download_checkpoint(path, tmp_path_factory.mktemp("archive")).result(30)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not [p.name for p in folder.iterdir() if re.match(r"\.", p.name)]
    rest.delete_checkpoint(training.model_id, "weights/a").result(10)
    assert not rest.list_checkpoints(training.model_id).result(10).checkpoints
    with pytest.raises(NotFoundError):
        training.load_state(path).result(60)
