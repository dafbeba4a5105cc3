"""What breaks at the socket: an operation is applied exactly once, or the error says what happened.

Every case is played by a server on a real socket. The negative cases at the end show that the
server does apply twice what is sent under two numbers, and that a client without retries fails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from holdfast import (
    AdamParams,
    Datum,
    Future,
    ModelInput,
    RetryConfig,
    SamplingParams,
    ServiceClient,
    TrainingClient,
)
from holdfast.errors import (
    ClosedError,
    ConnectionFailedError,
    InvalidAnswerError,
    NotFoundError,
    RateLimitedError,
    RequestError,
    ResultLostError,
    ResumeError,
    ServerFaultError,
    UnavailableError,
)
from holdfast.protocol.errors import failed_future_body, python_failed_future_body, refusal_body
from tests.client.conftest import QUICK
from tests.client.scripted import (
    BROKEN_BODY,
    LOST_ANSWER,
    REFUSED_CONNECTION_RESET,
    SHORT_JSON,
    Fault,
    Reply,
    Request,
    ScriptedServer,
    status,
)

DATUM = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})

Call = Callable[[TrainingClient], Future[Any]]

OPERATIONS: dict[str, Call] = {
    "forward_backward": lambda client: client.forward_backward([DATUM], "cross_entropy"),
    "optim_step": lambda client: client.optim_step(AdamParams()),
    "save_weights": lambda client: client.save_state("a"),
    "load_weights": lambda client: client.load_state("tinker://r/weights/a"),
}

TRANSIENT: dict[str, list[Fault]] = {
    "reset before it was read": [REFUSED_CONNECTION_RESET],
    "connection lost after it was applied": [LOST_ANSWER],
    "reset in the middle of the answer's body": [BROKEN_BODY],
    "truncated JSON": [SHORT_JSON],
    "429 with Retry-After": [status(429, retry_after="0.05"), status(429, retry_after_ms="20")],
    "503": [status(503)],
    "503 after it was applied": [LOST_ANSWER, status(503), status(502)],
    "408": [status(408)],
    "an empty 500": [Fault(reply=Reply(500, b"", {}))],
    "a page of a proxy": [Fault(reply=Reply(502, b"<html>bad gateway</html>", {}))],
    "several in a row": [LOST_ANSWER, BROKEN_BODY, REFUSED_CONNECTION_RESET, SHORT_JSON],
}


def answer_with(body: object) -> Callable[[Request, int], Reply]:
    return lambda request, seq: Reply.json(body)


def applied(server: ScriptedServer, client: TrainingClient) -> list[tuple[int, str]]:
    return server.models[client.model_id].applied


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_on_submission_applies_the_operation_once(
    scripted: ScriptedServer, training: TrainingClient, operation: str, fault: str
) -> None:
    scripted.faults[operation].extend(TRANSIENT[fault])
    first = OPERATIONS[operation](training)
    last = training.optim_step()
    first.result(10)
    last.result(10)
    assert applied(scripted, training) == [(1, operation), (2, "optim_step")]
    assert not scripted.faults[operation], "not every fault was played"


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_on_a_poll_delays_the_result(
    scripted: ScriptedServer, training: TrainingClient, fault: str
) -> None:
    scripted.faults["retrieve_future"].extend(TRANSIENT[fault])
    result = training.forward_backward([DATUM, DATUM], "cross_entropy").result(10)
    assert result.metrics == {"loss:sum": 2.0}
    assert applied(scripted, training) == [(1, "forward_backward")]
    assert not scripted.faults["retrieve_future"]


def test_connection_lost_between_submit_and_poll(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds = 0.3
    future = training.optim_step()
    while not applied(scripted, training):
        time.sleep(0.01)
    scripted.down()
    time.sleep(0.3)
    scripted.up()
    future.result(10)
    assert applied(scripted, training) == [(1, "optim_step")]


def test_a_server_that_refuses_connections_for_a_while_costs_time_alone(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    training.optim_step().result(10)
    scripted.down()
    futures = [training.optim_step() for _ in range(5)]
    time.sleep(0.5)
    assert not any(future.done() for future in futures)
    scripted.up()
    for future in futures:
        future.result(10)
    assert [seq for seq, _ in applied(scripted, training)] == [1, 2, 3, 4, 5, 6]


def test_a_retry_keeps_number_body_and_idempotency_key(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.faults["optim_step"].extend([LOST_ANSWER, status(503)])
    training.optim_step().result(10)
    first, second, third = scripted.sent("optim_step")
    assert first.body == second.body == third.body
    keys = {request.headers["x-idempotency-key"] for request in (first, second, third)}
    assert len(keys) == 1


def test_retry_after_is_obeyed(scripted: ScriptedServer, training: TrainingClient) -> None:
    scripted.faults["optim_step"].append(status(429, retry_after="0.6"))
    started = time.monotonic()
    training.optim_step().result(10)
    assert time.monotonic() - started >= 0.6


def test_a_slow_answer_is_waited_for(scripted: ScriptedServer, training: TrainingClient) -> None:
    scripted.faults["optim_step"].append(Fault(delay=1.0))
    later = training.save_state("a")
    training.optim_step().result(10)
    assert later.result(10).path.endswith("/a")
    assert len(scripted.sent("optim_step")) == 1


@pytest.mark.parametrize(
    ("code", "body", "error"),
    [
        (400, refusal_body("m", category="user", code="wrong_rank"), RequestError),
        (404, refusal_body("m", category="user", code="model_not_found"), NotFoundError),
        (422, {"detail": "m"}, RequestError),
        (413, {"detail": "m"}, RequestError),
    ],
)
def test_a_refusal_is_the_operations_error_and_the_next_ones_go_on(
    scripted: ScriptedServer,
    training: TrainingClient,
    code: int,
    body: Any,
    error: type[Exception],
) -> None:
    scripted.faults["optim_step"].append(status(code, body))
    refused, next_one = training.optim_step(), training.optim_step()
    with pytest.raises(error, match="m") as caught:
        refused.result(10)
    assert getattr(caught.value, "status", None) == code
    next_one.result(10)
    # The server counts a refused number as used.
    assert applied(scripted, training) == [(2, "optim_step")]


def test_the_same_failure_is_the_same_error_on_submit_on_poll_and_in_async_code(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    text, code = "checkpoint 'x' was not found", "checkpoint_not_found"
    bodies = [
        failed_future_body(text, category="user", code=code),
        python_failed_future_body(text, category="user", code=code),
    ]
    errors: list[NotFoundError] = []
    scripted.faults["load_weights"].append(
        status(404, refusal_body(text, category="user", code=code))
    )
    for body in [None, *bodies]:
        if body is not None:
            scripted.results["load_weights"] = answer_with(body)
        with pytest.raises(NotFoundError) as caught:
            training.load_state("tinker://r/weights/x").result(10)
        errors.append(caught.value)
    assert {(e.code, e.category, e.message, e.retryable) for e in errors} == {
        (code, "user", text, False)
    }


def test_a_failed_future_does_not_stop_the_next(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    def first_fails(request: Request, seq: int) -> Reply:
        if seq == 1:
            return Reply.json(failed_future_body("disk", category="server", code="disk"))
        return Reply.json({"type": "optim_step", "metrics": {"a": 1.0}})

    scripted.results["optim_step"] = first_fails
    first, second = training.optim_step(), training.optim_step()
    with pytest.raises(ServerFaultError, match="disk") as caught:
        first.result(10)
    assert caught.value.request_id == f"{training.model_id}:1"
    assert second.result(10).metrics == {"a": 1.0}


def test_410_on_a_poll_says_that_the_result_is_lost(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.faults["retrieve_future"].append(status(410))
    with pytest.raises(ResultLostError) as caught:
        training.optim_step().result(10)
    assert caught.value.request_id == f"{training.model_id}:1"
    training.optim_step().result(10)


def test_410_on_a_sample_is_asked_for_anew(scripted: ScriptedServer, client: ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model="tiny").result(10)
    scripted.faults["retrieve_future"].append(status(410))
    params = SamplingParams(max_tokens=2)
    result = sampler.sample(ModelInput.from_ints([1]), 1, params).result(10)
    assert result.sequences[0].tokens == [1, 2]
    assert [request.json()["seq_id"] for request in scripted.sent("asample")] == [0, 1]


def test_a_server_that_never_answers_ends_with_an_error_that_says_so(
    scripted: ScriptedServer,
) -> None:
    patience = RetryConfig(give_up_after=0.5, first_delay=0.01, max_delay=0.05)
    with ServiceClient(base_url=scripted.url, retry_config=patience) as client:
        training = client.create_lora_training_client("tiny").result(10)
        scripted.faults["forward_backward"].extend([REFUSED_CONNECTION_RESET] * 1000)
        lost = training.forward_backward([DATUM], "cross_entropy")
        queued = training.optim_step()
        with pytest.raises(ConnectionFailedError, match="may or may not have been accepted"):
            lost.result(10)
        # A step without the batch would be wrong in silence.
        with pytest.raises(ResumeError, match="from the last checkpoint"):
            queued.result(10)
        with pytest.raises(ResumeError, match="from the last checkpoint"):
            training.optim_step().result(10)
        scripted.faults["forward_backward"].clear()
    assert applied(scripted, training) == []


def test_a_server_that_leaves_during_the_polls_ends_all_of_them_at_once(
    scripted: ScriptedServer,
) -> None:
    patience = RetryConfig(give_up_after=0.5, first_delay=0.01, max_delay=0.05)
    with ServiceClient(base_url=scripted.url, retry_config=patience) as client:
        training = client.create_lora_training_client("tiny").result(10)
        scripted.op_seconds = 30.0
        futures = [training.optim_step() for _ in range(10)]
        while len(applied(scripted, training)) < 10:
            time.sleep(0.01)
        scripted.down()
        started = time.monotonic()
        for future in futures:
            with pytest.raises(ConnectionFailedError, match="was accepted and may still finish"):
                future.result(10)
        assert time.monotonic() - started < 3
        scripted.up()
        scripted.op_seconds = 0.0
        scripted.models[training.model_id].ready_at = 0.0
        # What was accepted is in order: the client goes on with the next number.
        training.optim_step().result(10)
        assert [seq for seq, _ in applied(scripted, training)] == list(range(1, 12))


def test_a_permanent_503_ends_with_the_servers_own_words(scripted: ScriptedServer) -> None:
    patience = RetryConfig(give_up_after=0.3, first_delay=0.01, max_delay=0.05)
    with ServiceClient(base_url=scripted.url, retry_config=patience) as client:
        training = client.create_lora_training_client("tiny").result(10)
        scripted.faults["optim_step"].extend([status(503, {"detail": "no space left"})] * 1000)
        with pytest.raises(UnavailableError, match="no space left") as caught:
            training.optim_step().result(10)
        assert caught.value.retryable
        assert caught.value.status == 503


def test_nobody_at_the_address_is_said_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.client.http._FIRST_CONTACT_SECONDS", 0.3)
    client = ServiceClient(base_url="http://127.0.0.1:9")
    with pytest.raises(ConnectionFailedError, match=r"127\.0\.0\.1:9"):
        client.get_server_capabilities()
    with pytest.raises(ConnectionFailedError, match="is a server running there"):
        client.create_lora_training_client("tiny").result(10)


def test_answers_outside_of_the_protocol_are_a_fault_to_report(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    bodies: list[object] = [[], {"type": "save_weights"}, {"path": 3}]
    for body in bodies:
        scripted.results["save_weights"] = answer_with(body)
        with pytest.raises(InvalidAnswerError):
            training.save_state("a").result(10)
    scripted.results["forward_backward"] = lambda request, seq: Reply(
        200, b"\xff\xff", {"content-type": "application/x-protobuf"}
    )
    with pytest.raises(InvalidAnswerError, match="cannot be read"):
        training.forward_backward([DATUM], "cross_entropy").result(10)


@pytest.mark.parametrize(
    "body",
    [{"request_id": None}, {"request_id": 7}, {"request_id": ""}, [], "accepted", {"path": 3}],
)
def test_a_submissions_answer_outside_of_the_protocol_ends_the_operation_and_what_follows(
    scripted: ScriptedServer, training: TrainingClient, body: object
) -> None:
    training.optim_step().result(10)
    scripted.faults["save_weights"].append(Fault(reply=Reply.json(body), delay=0.2))
    unknown, queued = training.save_state("a"), training.optim_step()
    with pytest.raises(InvalidAnswerError):
        unknown.result(10)
    # Whether the server took the number is not known, so nothing may be sent after it.
    with pytest.raises(ResumeError, match="from the last checkpoint"):
        queued.result(10)
    with pytest.raises(ResumeError, match="from the last checkpoint"):
        training.optim_step().result(10)
    assert applied(scripted, training) == [(1, "optim_step")]


def test_a_failure_as_the_submissions_answer_is_that_operations_alone(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    body = failed_future_body("disk", category="server", code="disk")
    scripted.faults["save_weights"].append(Fault(reply=Reply.json(body)))
    failed, next_one = training.save_state("a"), training.optim_step()
    with pytest.raises(ServerFaultError, match="disk"):
        failed.result(10)
    next_one.result(10)
    assert applied(scripted, training) == [(2, "optim_step")]


def test_a_result_that_stays_unreadable_is_not_polled_for_ever(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.faults["retrieve_future"].extend([SHORT_JSON] * 1000)
    with pytest.raises(InvalidAnswerError):
        training.optim_step().result(10)
    scripted.faults["retrieve_future"].clear()
    training.optim_step().result(10)


def test_pending_answers_at_once_are_not_asked_in_a_hot_loop(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.op_seconds, scripted.hold = 1.5, 0.0
    training.optim_step().result(10)
    assert 3 <= len(scripted.sent("retrieve_future")) - 1 < 40


def test_retry_after_ms_of_a_pending_answer_is_obeyed(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    pending = {"type": "try_again", "request_id": "x", "queue_state": "active"}
    scripted.faults["retrieve_future"].append(status(200, {**pending, "retry_after_ms": 500}))
    started = time.monotonic()
    training.optim_step().result(10)
    assert time.monotonic() - started >= 0.5


def test_results_may_come_as_the_submissions_answer(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    scripted.faults["save_weights"].append(
        status(200, {"path": "tinker://r/weights/a", "type": "save_weights"})
    )
    assert training.save_state("a").result(10).path == "tinker://r/weights/a"


def test_401_breaks_off_what_follows(scripted: ScriptedServer, training: TrainingClient) -> None:
    scripted.faults["forward_backward"].append(status(401))
    first = training.forward_backward([DATUM], "cross_entropy")
    second = training.optim_step()
    with pytest.raises(RequestError):
        first.result(10)
    with pytest.raises(ResumeError):
        second.result(10)
    assert applied(scripted, training) == []


def test_telling_the_end_of_a_session_never_fails(scripted: ScriptedServer) -> None:
    client = ServiceClient(base_url=scripted.url, retry_config=QUICK)
    client.create_lora_training_client("tiny").result(10)
    scripted.faults["sessions/S1/finish"].append(status(404))
    client.close().result(10)
    client.close().result(10)
    with pytest.raises(ClosedError):
        client.create_lora_training_client("tiny").result(10)


# ---- the negative cases: the tests above can fail ----


def test_the_scripted_server_applies_twice_what_has_two_numbers(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    training.optim_step().result(10)
    training.optim_step().result(10)
    assert applied(scripted, training) == [(1, "optim_step"), (2, "optim_step")]


def test_without_patience_a_single_fault_is_an_error(scripted: ScriptedServer) -> None:
    impatient = RetryConfig(give_up_after=0.0)
    with ServiceClient(base_url=scripted.url, retry_config=impatient) as client:
        training = client.create_lora_training_client("tiny").result(10)
        scripted.faults["optim_step"].append(status(429))
        with pytest.raises(RateLimitedError):
            training.optim_step().result(10)


def test_operations_from_a_dead_server_do_not_hang_other_models(
    scripted: ScriptedServer, client: ServiceClient, training: TrainingClient
) -> None:
    other = client.create_lora_training_client("tiny").result(10)
    release = threading.Event()

    def slow(request: Request, seq: int) -> Reply:
        return (
            Reply.json({"type": "try_again", "request_id": "x", "queue_state": "active"})
            if (not release.is_set() and request.json()["model_id"] == training.model_id)
            else Reply.json({"type": "optim_step"})
        )

    scripted.results["optim_step"] = slow
    stuck = training.optim_step()
    other.optim_step().result(10)
    assert not stuck.done()
    release.set()
    stuck.result(10)
