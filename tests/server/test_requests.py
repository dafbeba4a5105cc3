"""Requests as they come over the wire: unreadable, repeated, out of order, missing, Elixir's."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
import pytest

from holdfast.protocol.batches import BatchResult
from holdfast.runs.journal import Outcome
from holdfast.runs.service import ELIXIR as ELIXIR_FAMILY
from holdfast.server.routes.futures import render
from tests.support.raw import ELIXIR, PYTHON, RawRun, assert_refused, http_client, json_datum
from tests.support.server import ServerProcess

PROTOBUF = {"content-type": "application/x-protobuf"}


@pytest.fixture
def run(server: ServerProcess) -> Iterator[RawRun]:
    with RawRun.open(server) as opened:
        yield opened


@pytest.fixture
def elixir(server: ServerProcess) -> Iterator[RawRun]:
    with RawRun.open(server, agent=ELIXIR) as opened:
        yield opened


@dataclass
class Waited:
    """A run whose request waited for a number that never came: its answer, and the seconds."""

    run: RawRun
    answer: Future[tuple[dict[str, Any], float]]


@pytest.fixture(scope="module")
def gaps(server: ServerProcess) -> Iterator[list[Waited]]:
    """Runs in which number 2 is missing, and number 1; they wait side by side."""
    with ExitStack() as stack:
        runs = [stack.enter_context(RawRun.open(server, agent=ELIXIR)) for _ in range(2)]
        pool = stack.enter_context(ThreadPoolExecutor())
        runs[0].result(runs[0].forward_backward(1))

        def wait(run: RawRun, seq: int) -> tuple[dict[str, Any], float]:
            started = time.monotonic()
            return run.result(run.optim_step(seq)), time.monotonic() - started

        yield [
            Waited(run, pool.submit(wait, run, seq)) for run, seq in zip(runs, (3, 2), strict=True)
        ]


def trained(server: ServerProcess, *seeds: int) -> str:
    """The weights after one undisturbed step on the batches of these seeds."""
    with RawRun.open(server) as plain:
        for seq, seed in enumerate(seeds, 1):
            plain.result(plain.forward_backward(seq, seed))
        plain.result(plain.optim_step(len(seeds) + 1))
        return plain.save(len(seeds) + 2)


# --- Duplicates ----------------------------------------------------------------------------------


def test_the_same_request_again_gets_the_same_id_and_is_executed_once(
    server: ServerProcess, run: RawRun
) -> None:
    first = run.forward_backward(1, 1)
    assert run.forward_backward(1, 1) == first  # while it is executed
    result = run.result(first)
    assert run.forward_backward(1, 1) == first  # when it is settled
    assert run.result(first) == result
    run.result(run.optim_step(2))
    assert run.forward_backward(1, 1) == first  # when it is long past
    assert run.optim_step(2) == run.optim_step(2)
    assert run.save(3) == trained(server, 1)


def test_another_request_under_a_used_number_is_refused_and_the_first_stands(
    server: ServerProcess, run: RawRun
) -> None:
    first = run.forward_backward(1, 1)
    answer = run.refused("forward_backward", run.batch(1, seed=2))
    assert answer.status_code == 400
    assert "number 1" in answer.json()["message"]
    run.result(first)
    assert run.refused("forward_backward", run.batch(1, seed=2)).status_code == 400
    run.refused("optim_step", {"model_id": run.model_id, "seq_id": 1})
    assert run.result(first)["metrics"]
    run.result(run.optim_step(2))
    assert run.save(3) == trained(server, 1)


def test_a_repeated_create_model_gives_the_same_model(run: RawRun) -> None:
    assert run.create()["model_id"] == run.model_id
    run.result(run.forward_backward(1))
    assert run.create()["model_id"] == run.model_id, "and it is not begun anew"
    run.result(run.optim_step(2))
    body = {
        "session_id": run.session_id,
        "model_seq_id": 0,
        "base_model": "small-qwen3",
        "lora_config": {"rank": 4},
    }
    answer = run.refused("create_model", body)
    assert answer.status_code == 400
    assert run.model_id in answer.json()["message"]


# --- Order and gaps ------------------------------------------------------------------------------


def test_chunks_that_arrive_out_of_order_are_executed_in_order(
    server: ServerProcess, run: RawRun
) -> None:
    ids = {seq: run.forward_backward(seq, seed=seq) for seq in (2, 3, 1)}
    ids[4] = run.optim_step(4)
    for seq in (3, 1, 4, 2):
        run.result(ids[seq])
    assert run.save(5) == trained(server, 1, 2, 3)


def test_a_refused_number_is_not_waited_for(run: RawRun) -> None:
    later = run.optim_step(2)
    started = time.monotonic()
    body = {**run.batch(1), "forward_backward_input": {"data": 5, "loss_fn": "cross_entropy"}}
    run.refused("forward_backward", body)
    assert "forward_backward 1" in run.failure(later), "the step lacks the refused gradients"
    assert time.monotonic() - started < 3


# --- Long polls ----------------------------------------------------------------------------------


def test_a_poll_is_held_and_wakes_when_the_result_is_there(run: RawRun) -> None:
    second = run.forward_backward(2)
    answered: list[float] = []

    def poll() -> None:
        answer = run.poll(second)
        answered.append(time.monotonic())
        assert "loss:sum" in answer.json()["metrics"]

    waiting = threading.Thread(target=poll)
    waiting.start()
    time.sleep(1.0)
    assert not answered, "the poll is held"
    first = run.forward_backward(1)
    waiting.join(30)
    assert not waiting.is_alive()
    finished = time.monotonic()
    run.result(first)
    assert finished - answered[0] < 0.5


def test_a_poll_wakes_within_milliseconds(run: RawRun) -> None:
    """A step on little data, from its submission to its result, many times in a row."""
    run.result(run.forward_backward(1))
    times = []
    for seq in range(2, 22):
        started = time.monotonic()
        run.result(run.optim_step(seq))
        times.append(time.monotonic() - started)
    assert sorted(times)[10] < 0.2, times


def test_a_poll_says_try_again_after_the_hold(
    models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("short-hold")
    with (
        ServerProcess(directory, models=models, settings={"poll_hold": 1.0}) as server,
        RawRun.open(server, agent=ELIXIR) as run,
    ):
        run.result(run.forward_backward(1))
        waiting = run.optim_step(3)
        started = time.monotonic()
        answer = run.poll(waiting)
        held = time.monotonic() - started
        assert 0.9 < held < 3
        body = answer.json()
        assert answer.status_code == 200
        assert body["type"] == "try_again"
        assert body["request_id"] == waiting
        assert body["queue_state"] == "active"
        assert re.fullmatch(
            r"waiting for request 2, at most \d+ s more", body["queue_state_reason"]
        )
        assert isinstance(body["retry_after_ms"], int)
        run.result(run.forward_backward(2))
        assert run.result(waiting)["metrics"]["step"] == 1


def test_a_result_can_be_polled_by_several_and_again(run: RawRun) -> None:
    request_id = run.forward_backward(1)
    assert run.result(request_id) == run.result(request_id)


def test_a_result_comes_in_the_encoding_that_is_asked_for(run: RawRun) -> None:
    request_id = run.forward_backward(1)
    as_json = run.result(request_id)
    assert set(as_json["loss_fn_outputs"][0]) == {"logprobs"}
    answer = run.poll(request_id, accept="application/x-protobuf")
    assert answer.headers["content-type"] == "application/x-protobuf"
    assert b"loss:sum" in answer.content


@pytest.mark.parametrize("agent", [PYTHON, ELIXIR])
def test_a_model_that_has_diverged_shows_it(server: ServerProcess, agent: str) -> None:
    with RawRun.open(server, agent=agent) as run:
        finite = run.result(run.forward_backward(1))["loss_fn_outputs"][0]["logprobs"]["data"]
        assert None not in finite
        run.result(run.optim_step(2, learning_rate=1e30))
        request_id = run.forward_backward(3)
        result = run.result(request_id)
        assert result["loss_fn_outputs"][0]["logprobs"]["data"] == [None] * len(finite)
        assert "loss:sum" not in result["metrics"]
        answer = run.poll(request_id, accept="application/x-protobuf")
        (first, _) = BatchResult.from_protobuf(answer.content).outputs
        assert np.isnan(first["logprobs"].values()).all()
        failed = run.answer(run.optim_step(4))
        assert "finite" in str(failed["error"]), "and its gradients are refused, as ever"


@pytest.mark.parametrize(
    ("family", "category"), [("python", "server"), ("other", "server"), (ELIXIR_FAMILY, "user")]
)
@pytest.mark.parametrize("accept", ["application/json", "application/x-protobuf"])
def test_a_result_that_cannot_be_written_is_a_failed_future(
    family: str, category: str, accept: str
) -> None:
    """Whatever the defect: a client polls again at once, and for ever, when it is answered 5xx."""
    damaged = Outcome("forward_backward", result=b"no result")
    answer = render(damaged, "s:train:0:1", accept, family)
    assert answer.status_code == 200
    body = json.loads(bytes(answer.body))
    assert (body["code"], body["category"]) == ("internal_error", category)
    assert "s:train:0:1" in str(body["error"])


# --- The Elixir client ---------------------------------------------------------------------------


def test_elixirs_requests_are_taken_as_they_are(server: ServerProcess) -> None:
    """Explicit nulls, no `type`, `forward_input`, flat tensors without a shape."""
    with http_client(server, agent=ELIXIR) as http:

        def ok(path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            found = answer.json()
            assert isinstance(found, dict)
            return found

        def result(submitted: dict[str, Any]) -> dict[str, Any]:
            found = ok("retrieve_future", {"request_id": submitted["request_id"]})
            # Without one of these, the client does not take it for a result.
            assert "type" in found or "loss_fn_output_type" in found, found
            assert found.get("status") != "failed", found
            return found

        session = ok(
            "create_session",
            {
                "tags": ["tinkex-elixir"],
                "sdk_version": "0.15.0",
                "user_metadata": None,
                "project_id": None,
                "type": "create_session",
            },
        )["session_id"]
        ok("session_heartbeat", {"session_id": session})
        model = ok(
            "create_model",
            {
                "base_model": "small-llama",
                "lora_config": {
                    "rank": 4,
                    "seed": None,
                    "train_attn": True,
                    "train_mlp": True,
                    "train_unembed": True,
                },
                "model_seq_id": 0,
                "session_id": session,
                "type": "create_model",
                "user_metadata": None,
            },
        )["model_id"]
        batch = {"data": [json_datum(1)], "loss_fn": "cross_entropy", "loss_fn_config": None}
        forward = ok("forward", {"forward_input": batch, "model_id": model, "seq_id": 1})
        assert result(forward)["metrics"]["loss:sum"] > 0
        first = ok(
            "forward_backward",
            {
                "forward_backward_input": {"data": [], "loss_fn": "cross_entropy"},
                "model_id": model,
                "seq_id": 2,
            },
        )
        assert result(first)["loss_fn_outputs"] == []
        second = ok(
            "forward_backward", {"forward_backward_input": batch, "model_id": model, "seq_id": 3}
        )
        assert result(second)["metrics"] == result(forward)["metrics"]
        adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
        stepped = ok("optim_step", {"adam_params": adam, "model_id": model, "seq_id": 4})
        assert result(stepped)["type"] == "optim_step"
        saved = result(
            ok(
                "save_weights",
                {"model_id": model, "path": "ex", "seq_id": 5, "ttl_seconds": None},
            )
        )
        path = f"tinker://{model}/weights/ex"
        assert saved["path"] == path
        loaded = ok(
            "load_weights",
            {
                "model_id": model,
                "path": path,
                "seq_id": 6,
                "optimizer": True,
                "type": "load_weights",
            },
        )
        assert result(loaded)["path"] == path
        info = ok("weights_info", {"tinker_path": path})
        assert (info["base_model"], info["is_lora"]) == ("small-llama", True)
        sampler = result(
            ok(
                "save_weights_for_sampler",
                {
                    "model_id": model,
                    "path": "ex",
                    "sampling_session_seq_id": None,
                    "seq_id": 7,
                    "ttl_seconds": None,
                    "type": "save_weights_for_sampler",
                },
            )
        )
        sampling = ok(
            "create_sampling_session",
            {
                "base_model": None,
                "model_path": sampler["path"],
                "sampling_session_seq_id": 0,
                "session_id": session,
                "type": "create_sampling_session",
            },
        )["sampling_session_id"]
        answer = http.get(f"samplers/{sampling.replace(':', '%3A')}")
        assert answer.json()["base_model"] == "small-llama"
        sampled = ok(
            "asample",
            {
                "num_samples": 1,
                "prompt": {"chunks": [{"tokens": [5, 6], "type": "encoded_text"}]},
                "sampling_params": {"max_tokens": 3, "temperature": 1.0, "stop": []},
                "sampling_session_id": sampling,
                "seq_id": 0,
            },
        )
        assert len(result(sampled)["sequences"][0]["tokens"]) == 3
        unloaded = ok("unload_model", {"model_id": model, "type": "unload_model"})
        assert unloaded["model_id"] == model
        assert ok("unload_model", {"model_id": model})["model_id"] == model, "idempotent"


def test_elixir_hears_of_failures_in_its_own_form(elixir: RawRun) -> None:
    outside = json_datum(1)
    outside["loss_fn_inputs"]["target_tokens"]["data"][3] = 7777
    failed = elixir.answer(elixir.forward_backward(1, data=[outside]))
    assert failed["status"] == "failed"
    assert failed["error"]["category"] == "user"
    assert "7777" in failed["error"]["message"]
    assert "type" not in failed


def test_elixir_may_use_a_model_number_again_after_a_failed_creation(elixir: RawRun) -> None:
    """It creates from a state with three requests, and counts on only when all succeeded."""
    elixir.result(elixir.forward_backward(1, seed=5))
    elixir.result(elixir.optim_step(2))
    weights = elixir.save(3, "good")
    good = f"tinker://{elixir.model_id}/weights/good"

    def attempt(path: str) -> tuple[str, dict[str, Any]]:
        headers = {"x-idempotency-key": path}
        answer = elixir.http.post(
            "create_model",
            json={
                "session_id": elixir.session_id,
                "model_seq_id": 1,
                "base_model": "small-llama",
                "lora_config": {"rank": 4, "seed": None},
            },
            headers=headers,
        )
        assert answer.status_code == 200, answer.text
        model = answer.json()["model_id"]
        body = {"model_id": model, "path": path, "seq_id": 1, "optimizer": True}
        return model, elixir.answer(elixir.submitted("load_weights", body))

    model, failed = attempt(f"tinker://{elixir.model_id}/weights/none")
    assert failed["status"] == "failed"
    again, loaded = attempt(good)
    assert again == model
    assert loaded["path"] == good
    elixir.model_id = model
    assert elixir.save(2) == weights
    elixir.result(elixir.forward_backward(3))


# --- Unreadable requests -------------------------------------------------------------------------

UNREADABLE: dict[str, tuple[bytes, dict[str, str]]] = {
    "garbage as protobuf": (b"\xff\xfe\x00garbage", PROTOBUF),
    "truncated protobuf": (b"\x0a\xff\xff\xff\x7fabc", PROTOBUF),
    "empty protobuf": (b"", PROTOBUF),
    "garbage as JSON": (b"{not json", {"content-type": "application/json"}),
    "empty JSON": (b"", {"content-type": "application/json"}),
    "a list": (b"[1, 2]", {"content-type": "application/json"}),
    "text that is not UTF-8": (b'{"model_id": "\xff"}', {"content-type": "application/json"}),
    "deep nesting": (b"[" * 200_000, {"content-type": "application/json"}),
    "unknown compression": (b"\x28\xb5\x2f\xfd", {**PROTOBUF, "content-encoding": "zstd"}),
}


@pytest.mark.parametrize("path", ["forward_backward", "optim_step", "retrieve_future"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_body_is_refused(run: RawRun, path: str, kind: str) -> None:
    content, headers = UNREADABLE[kind]
    answer = run.http.post(path, content=content, headers=headers)
    assert_refused(answer)
    assert answer.status_code in (400, 422)
    run.result(run.forward_backward(1))


def test_a_body_just_above_the_limit_is_refused(run: RawRun) -> None:
    """In one piece and without its length: nothing follows that the server could wait for."""
    piece = bytes((128 << 20) + 1)
    answer = run.http.post("forward_backward", content=iter([piece]), headers=PROTOBUF)
    assert assert_refused(answer).status_code == 413


def test_after_an_unreadable_body_its_number_is_waited_for_a_little_only(run: RawRun) -> None:
    """Nobody can tell which number it was, so the gap that it leaves closes after 5 s."""
    assert_refused(run.http.post("forward_backward", content=b"\xff\xfe", headers=PROTOBUF))
    started = time.monotonic()
    assert run.result(run.optim_step(2))["metrics"]["step"] == 0
    assert 3 < time.monotonic() - started < 15


def body_of_300_mb() -> Iterator[bytes]:
    for _ in range(300):
        yield bytes(1 << 20)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
@pytest.mark.parametrize("path", ["forward_backward", "save_weights"])
def test_a_body_of_300_mb_is_refused(run: RawRun, path: str, declared: bool) -> None:
    headers = {**PROTOBUF, "content-length": str(300 << 20)} if declared else PROTOBUF
    answer = run.http.post(path, content=body_of_300_mb(), headers=headers)
    assert_refused(answer)
    assert answer.status_code == 413
    assert "bytes" in answer.json()["message"]
    run.result(run.forward_backward(1))


WRONG: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...]]] = {
    "unknown model": (
        "optim_step",
        {"model_id": "no-such-model", "seq_id": 1},
        404,
        ("'no-such-model'", "not found"),
    ),
    "unknown session": (
        "create_model",
        {"session_id": "no-such-session", "model_seq_id": 0, "base_model": "small-llama"},
        404,
        ("'no-such-session'",),
    ),
    "unknown request": (
        "retrieve_future",
        {"request_id": "no-such-request"},
        404,
        ("'no-such-request'", "not found"),
    ),
    "unknown request of a model": (
        "retrieve_future",
        {"request_id": "MODEL:17"},
        404,
        (":17",),
    ),
    "a request beyond 64 bits": (
        "retrieve_future",
        {"request_id": f"MODEL:{1 << 63}"},
        404,
        (f":{1 << 63}",),
    ),
    "seq_id 0": ("optim_step", {"model_id": "MODEL", "seq_id": 0}, 422, ("seq_id", "0")),
    "seq_id as text": ("optim_step", {"model_id": "MODEL", "seq_id": "1"}, 422, ("seq_id", "'1'")),
    "seq_id beyond 64 bits": (
        "optim_step",
        {"model_id": "MODEL", "seq_id": 1 << 70},
        422,
        ("seq_id",),
    ),
    "no seq_id": ("save_weights", {"model_id": "MODEL", "path": "x"}, 422, ("seq_id is missing",)),
    "an empty batch": (
        "forward_backward",
        {
            "model_id": "MODEL",
            "seq_id": 1,
            "forward_backward_input": {"data": [], "loss_fn": "cross_entropy"},
        },
        400,
        ("no data", "at least one datum"),
    ),
    "a batch that is none": (
        "forward_backward",
        {"model_id": "MODEL", "seq_id": 1, "forward_backward_input": 7},
        400,
        ("forward_backward_input",),
    ),
    "a tensor of a wrong dtype": (
        "forward_backward",
        {
            "model_id": "MODEL",
            "seq_id": 1,
            "forward_backward_input": {
                "data": [
                    {
                        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5]}]},
                        "loss_fn_inputs": {"weights": {"data": [1], "dtype": "complex64"}},
                    }
                ],
                "loss_fn": "cross_entropy",
            },
        },
        400,
        ("datum 0", "complex64"),
    ),
    "all train flags false": (
        "create_model",
        {
            "session_id": "SESSION",
            "model_seq_id": 1,
            "base_model": "small-llama",
            "lora_config": {"train_attn": False, "train_mlp": False, "train_unembed": False},
        },
        400,
        ("train_attn", "train_mlp", "train_unembed"),
    ),
    "load without an address": (
        "load_weights",
        {"path": "tinker://r/weights/x", "optimizer": False},
        422,
        ("model_id", "session_id"),
    ),
    "no such endpoint": ("no_such_endpoint", {}, 404, ("/api/v1/no_such_endpoint",)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_request_is_refused_with_its_reason(run: RawRun, mistake: str) -> None:
    path, body, status, words = WRONG[mistake]
    body = {
        key: value.replace("MODEL", run.model_id).replace("SESSION", run.session_id)
        if isinstance(value, str)
        else value
        for key, value in body.items()
    }
    answer = run.refused(path, body)
    assert answer.status_code == status, answer.text
    for word in words:
        assert word in answer.json()["message"], answer.text
    started = time.monotonic()
    settled = "batch" in mistake or "tensor" in mistake
    run.result(run.forward_backward(2 if settled else 1))
    assert time.monotonic() - started < 3, "the run waits for nothing"


def test_a_wrong_method_is_refused(server: ServerProcess) -> None:
    with http_client(server) as http:
        assert http.get("create_session").status_code == 405
        assert http.get("healthz/").status_code == 404, "no redirect: clients take it for an answer"


def test_operations_after_a_failed_creation_say_why(run: RawRun) -> None:
    created = run.create(rank=60_000, model_seq_id=1)
    assert "60000" in run.failure(created["request_id"])
    for seq in (1, 2):
        answer = run.http.post("optim_step", json={"model_id": created["model_id"], "seq_id": seq})
        assert answer.status_code in (400, 404, 410)
        assert "60000" in answer.json()["message"]


def test_a_finished_session_is_gone_and_says_so(server: ServerProcess) -> None:
    with RawRun.open(server) as run:
        run.result(run.forward_backward(1))
        finish = f"sessions/{run.session_id}/finish"
        for _ in range(2):
            answer = run.http.post(finish, json={"reason": {"type": "success"}})
            assert answer.status_code == 204
        beat = run.http.post("session_heartbeat", json={"session_id": run.session_id})
        assert beat.status_code == 410
        deadline = time.monotonic() + 10
        while True:
            answer = run.http.post("optim_step", json={"model_id": run.model_id, "seq_id": 2})
            if answer.status_code == 400:  # 410 would have it sent again
                break
            assert time.monotonic() < deadline
        assert "ended" in answer.json()["message"]
        created = run.http.post(
            "create_model",
            json={
                "session_id": run.session_id,
                "model_seq_id": 1,
                "base_model": "small-llama",
            },
        )
        assert created.status_code in (400, 404, 410)
        assert run.session_id in created.json()["message"]


def test_the_server_stays_responsive_while_large_bodies_arrive(
    server: ServerProcess, run: RawRun
) -> None:
    """A large batch is read beside other requests, which are answered meanwhile."""
    data = [json_datum(i, 200) for i in range(1500)]
    body = run.batch(1, data=data)
    sending = threading.Thread(target=lambda: run.ok("forward_backward", body))
    slowest = 0.0
    with httpx2.Client(base_url=server.url, headers={"user-agent": PYTHON}) as other:
        sending.start()
        while sending.is_alive():
            started = time.monotonic()
            assert other.get("/healthz").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
    sending.join()
    assert slowest < 2.0


# --- Gaps that are given up ----------------------------------------------------------------------


def test_elixirs_missing_numbers_are_skipped(gaps: list[Waited]) -> None:
    result, waited = gaps[0].answer.result(60)
    assert result["metrics"]["step"] == 1
    assert 8 < waited < 20, f"waited {waited:.1f} s; the lease is 10 s"


def test_a_request_that_comes_after_its_number_was_skipped_fails_and_spoils_the_step(
    gaps: list[Waited],
) -> None:
    elixir = gaps[1].run
    gaps[1].answer.result(60)
    late = elixir.answer(elixir.forward_backward(1))
    assert late["status"] == "failed"
    assert late["error"]["category"] == "user"
    assert "stopped waiting" in late["error"]["message"]
    spoiled = elixir.answer(elixir.optim_step(3))
    assert "request 1 " in spoiled["error"]["message"]
    elixir.result(elixir.forward_backward(4))
    assert elixir.result(elixir.optim_step(5))["metrics"]["step"] == 1


def test_an_idempotency_key_that_no_index_would_take_is_refused(server: ServerProcess) -> None:
    with http_client(server) as http:
        for length, status in ((1000, 200), (1001, 400)):
            headers = {"x-idempotency-key": length * "k"}
            body = {"tags": [], "sdk_version": "0"}
            answer = http.post("create_session", json=body, headers=headers)
            assert answer.status_code == status, answer.text
        assert "1001 characters; at most 1000" in answer.json()["detail"]
