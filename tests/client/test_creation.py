"""Clients from checkpoints: whatever goes wrong, nothing half-made stays at the server."""

from __future__ import annotations

import time

import pytest

from holdfast import AdamParams, SamplingParams, ServiceClient, TrainingClient
from holdfast.client.futures import ClientFuture
from holdfast.client.runtime import runtime
from holdfast.errors import (
    AwaitTimeoutError,
    ClosedError,
    InvalidAnswerError,
    NotFoundError,
    OperationCancelledError,
    RequestError,
)
from holdfast.protocol.errors import failed_future_body
from tests.client.conftest import QUICK, quiet
from tests.client.scripted import LOST_ANSWER, Fault, Reply, Request, ScriptedServer, status

PATH = "tinker://r:train:0/weights/a"
INFO = {
    "base_model": "tiny",
    "is_lora": True,
    "lora_rank": 8,
    "train_unembed": False,
    "train_mlp": True,
    "train_attn": None,
    "optimizer_config": {"type": "adamw"},
}


def pending(request: Request, seq: int) -> Reply:
    return Reply.json({"type": "try_again", "request_id": "x", "queue_state": "active"})


def failed(request: Request, seq: int) -> Reply:
    return Reply.json(
        failed_future_body("checkpoint is corrupt", category="user", code="checkpoint_corrupt")
    )


@pytest.fixture(params=["one request", "three requests"])
def from_state(request: pytest.FixtureRequest, scripted: ScriptedServer) -> ServiceClient:
    """Against a server that creates by load_weights, and against one that does not."""
    scripted.config = {"create_by_load": request.param == "one request"}
    scripted.results["weights_info"] = lambda request, seq: Reply.json(INFO)
    client = ServiceClient(base_url=scripted.url, retry_config=QUICK)
    request.addfinalizer(lambda: client.close().result(10))
    return client


def start(client: ServiceClient, **options: float) -> ClientFuture[TrainingClient]:
    return client.create_training_client_from_state_with_optimizer(
        PATH, await_timeout=options.get("await_timeout")
    )


def test_it_trains_when_it_is_made(scripted: ScriptedServer, from_state: ServiceClient) -> None:
    training = start(from_state).result(10)
    training.optim_step().result(10)
    assert scripted.alive == [training.model_id]
    load = scripted.sent("load_weights")[0].json()
    assert load["optimizer"] is True
    assert load["path"] == PATH
    if scripted.config["create_by_load"]:
        assert not scripted.sent("create_model")
        assert scripted.models[training.model_id].applied == [(1, "optim_step")]
    else:
        created = scripted.sent("create_model")[0].json()
        assert created["base_model"] == "tiny"
        assert created["lora_config"] == {
            "rank": 8,
            "train_unembed": False,
            "train_mlp": True,
            "train_attn": True,
        }
        assert scripted.models[training.model_id].applied == [
            (1, "load_weights"),
            (2, "optim_step"),
        ]


def test_a_failed_load_leaves_no_model(scripted: ScriptedServer, from_state: ServiceClient) -> None:
    scripted.results["load_weights"] = failed
    with pytest.raises(RequestError, match="corrupt") as caught:
        start(from_state).result(10)
    assert caught.value.code == "checkpoint_corrupt"
    assert scripted.models
    assert scripted.alive == []


def test_a_refused_load_leaves_no_model(
    scripted: ScriptedServer, from_state: ServiceClient
) -> None:
    scripted.faults["load_weights"].append(status(404, {"detail": "not found"}))
    with pytest.raises(NotFoundError):
        start(from_state).result(10)
    assert scripted.alive == []


def test_a_load_that_times_out_leaves_no_model(
    scripted: ScriptedServer, from_state: ServiceClient
) -> None:
    scripted.results["load_weights"] = pending
    started = time.monotonic()
    with pytest.raises(AwaitTimeoutError, match="unloaded"):
        start(from_state, await_timeout=0.5).result(10)
    assert 0.5 <= time.monotonic() - started < 5
    assert scripted.models
    assert scripted.alive == []


def test_a_cancelled_load_leaves_no_model(
    scripted: ScriptedServer, from_state: ServiceClient
) -> None:
    scripted.results["load_weights"] = pending
    future = start(from_state)
    while not scripted.sent("load_weights"):
        time.sleep(0.01)
    assert future.cancel()
    with pytest.raises(OperationCancelledError):
        future.result(10)
    # It is gone before the error is there, not some time after.
    assert scripted.models
    assert scripted.alive == []
    assert future.cancelled()


def test_a_client_that_could_not_be_made_says_so_to_its_caller_alone(
    scripted: ScriptedServer, from_state: ServiceClient
) -> None:
    """The error of the load that was given up is asked for by nobody, and prints nothing."""
    scripted.results["load_weights"] = pending
    with quiet(runtime().loop):
        with pytest.raises(AwaitTimeoutError):
            start(from_state, await_timeout=0.2).result(10)
        time.sleep(0.1)


def test_a_model_that_no_info_is_given_of_is_unloaded(
    scripted: ScriptedServer, from_state: ServiceClient
) -> None:
    scripted.results["get_info"] = lambda request, seq: Reply.json({"type": "get_info"})
    with pytest.raises(InvalidAnswerError):
        start(from_state).result(10)
    assert scripted.models
    assert scripted.alive == []


def test_an_answer_lost_on_creation_makes_one_model(
    scripted: ScriptedServer, from_state: ServiceClient
) -> None:
    scripted.faults["create_model"].append(LOST_ANSWER)
    scripted.faults["load_weights"].append(LOST_ANSWER)
    training = start(from_state).result(10)
    assert scripted.alive == [training.model_id]


def test_an_unload_that_fails_does_not_hide_the_error(
    scripted: ScriptedServer, from_state: ServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    scripted.results["load_weights"] = failed
    scripted.faults["unload_model"].append(status(400))
    with pytest.raises(RequestError, match="corrupt"):
        start(from_state).result(10)
    assert "was not unloaded" in caplog.text


def test_a_failed_creation_leaves_no_model(scripted: ScriptedServer, client: ServiceClient) -> None:
    scripted.faults["get_info"].append(status(404))
    with pytest.raises(NotFoundError):
        client.create_lora_training_client("tiny").result(10)
    assert scripted.models
    assert scripted.alive == []


def test_nothing_is_sent_before_the_first_use(scripted: ScriptedServer) -> None:
    client = ServiceClient(base_url=scripted.url)
    client.close().result(10)
    assert scripted.requests == []


def test_closing_while_the_session_is_being_made_ends_it(scripted: ScriptedServer) -> None:
    scripted.faults["create_session"].append(Fault(delay=0.3))
    client = ServiceClient(base_url=scripted.url, retry_config=QUICK)
    making = client.create_lora_training_client("tiny")
    while not scripted.sent("create_session"):
        time.sleep(0.01)
    client.close().result(10)
    assert len(scripted.sent("sessions/S1/finish")) == 1
    with pytest.raises(ClosedError):
        making.result(10)
    assert scripted.models == {}


def test_wrong_arguments_are_errors_of_the_call(client: ServiceClient) -> None:
    with pytest.raises(RequestError, match="rank"):
        client.create_lora_training_client("tiny", rank="8")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="nothing to train"):
        client.create_lora_training_client(
            "tiny", train_mlp=False, train_attn=False, train_unembed=False
        )
    with pytest.raises(RequestError, match="model_path or base_model"):
        client.create_sampling_client()
    with pytest.raises(RequestError, match="http://HOST:PORT"):
        ServiceClient(base_url="localhost:8000")
    with pytest.raises(RequestError, match="leave out /api/v1"):
        ServiceClient(base_url="http://localhost:8000/api/v1/")


def test_a_parameter_that_is_none_is_an_error_and_not_the_default() -> None:
    with pytest.raises(RequestError, match=r"^AdamParams: lr: .* are learning_rate,"):
        AdamParams(lr=1e-3)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match=r"^SamplingParams: max_token: .*; the parameters are"):
        SamplingParams(max_token=3)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match=r"^AdamParams: learning_rate: .*; given: -1"):
        AdamParams(learning_rate=-1)
    assert AdamParams(learning_rate=1e-3).learning_rate == 1e-3


def test_leaving_the_block_says_how_it_ended(scripted: ScriptedServer) -> None:
    def run(error: BaseException | None) -> None:
        with ServiceClient(base_url=scripted.url, retry_config=QUICK) as client:
            client.create_lora_training_client("tiny").result(10)
            if error is not None:
                raise error

    run(None)
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            run(error)
    finishes = [r.json() for r in scripted.requests if r.path.endswith("/finish")]
    assert [body["reason"]["type"] for body in finishes] == ["success", "errored", "interrupted"]


def test_heartbeats_go_on_while_the_client_lives_and_end_with_it(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.client.session._HEARTBEAT_SECONDS", 0.05)
    client = ServiceClient(base_url=scripted.url, retry_config=QUICK)
    client.create_lora_training_client("tiny").result(10)
    scripted.faults["session_heartbeat"].extend([status(503), LOST_ANSWER, Fault()])
    time.sleep(0.6)
    assert len(scripted.sent("session_heartbeat")) > 5
    assert scripted.sent("session_heartbeat")[0].json()["session_id"] == "S1"
    client.close().result(10)
    count = len(scripted.sent("session_heartbeat"))
    time.sleep(0.3)
    assert len(scripted.sent("session_heartbeat")) == count


def test_a_session_that_ended_gets_no_more_heartbeats(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.client.session._HEARTBEAT_SECONDS", 0.05)
    with ServiceClient(base_url=scripted.url, retry_config=QUICK) as client:
        client.create_lora_training_client("tiny").result(10)
        scripted.faults["session_heartbeat"].append(status(410))
        time.sleep(0.5)
    assert len(scripted.sent("session_heartbeat")) == 1
