"""SIGTERM: a server answers while it stops, ends in time, and the next one goes on.

One server is stopped four times, each time held up by something else; starting one is what takes
the time here. A run trains through all of it.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.raw import RawRun, http_client
from tests.support.sdk import WAIT, batch, service_client
from tests.support.server import ServerProcess

pytestmark = pytest.mark.timeout(240)  # the first test waits for all that is done to the server

SLACK = 1.0
"""Seconds that starting and ending threads and processes takes besides."""


@dataclass
class Stop:
    """A stop as it was seen from outside."""

    within: float
    """Seconds that it may take."""
    seconds: float = 0.0
    exit_code: int | None = None
    log: str = ""
    closed: float = 0.0
    """Seconds until no new connection was taken any more."""
    answers: dict[str, httpx2.Response] = field(default_factory=dict)
    """To requests that came while it stopped, each on a new connection."""
    polls: list[httpx2.Response] = field(default_factory=list)
    """Answers to polls: one that came before the signal, and one that came after it."""
    newcomer: Future[float] | None = None
    """A client of the official SDK that came while it stopped: the loss of its first batch."""


@dataclass
class Seen:
    """What became of a server that was stopped again and again."""

    hung: Stop
    locked: Stop
    unfinished: Stop
    hurried: Stop
    newcomer: float
    steps: list[dict[str, Any]]
    undisturbed: list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    settings = {"stop_within": 12.0}
    server = ServerProcess(
        tmp_path_factory.mktemp("stops"),
        models={"small-llama": models["small-llama"]},
        settings=settings,
    )
    with server, RawRun.open(server) as run:
        steps = [run.result(run.forward_backward(1)), run.result(run.optim_step(2))]
        suspend(server)
        pending = run.forward_backward(3)
        time.sleep(0.3)
        hung = stopped_while_asked(server, run, pending)

        settings["stop_within"] = 2.0
        server.start()
        steps += [run.result(pending), run.result(run.optim_step(4))]
        assert hung.newcomer is not None
        newcomer = hung.newcomer.result(WAIT)
        worker = suspend(server)
        pending = run.forward_backward(5)
        with locked_catalog(server):
            os.kill(worker, signal.SIGCONT)  # its outcome cannot be recorded
            time.sleep(0.5)
            locked = stopped(server)

        settings["stop_within"] = 4.0
        server.start()
        unfinished = stopped_before_an_answer(server)

        settings["stop_within"] = 60.0
        server.start()
        also_pending = run.optim_step(6)
        suspend(server)  # while it loads the base model
        hurried = stopped(server, 0.2)

        server.start()
        steps += [run.result(pending), run.result(also_pending)]
        with RawRun.open(server) as other:
            undisturbed = []
            for seq in (1, 3, 5):
                undisturbed.append(other.result(other.forward_backward(seq)))
                undisturbed.append(other.result(other.optim_step(seq + 1)))
    return Seen(hung, locked, unfinished, hurried, newcomer, steps, undisturbed)


# --- What is done to it ---------------------------------------------------------------------


def suspend(server: ServerProcess) -> int:
    """Let its worker do nothing more, once there is one."""
    while not (workers := server.worker_pids()):
        time.sleep(0.01)
    (worker,) = workers
    os.kill(worker, signal.SIGSTOP)
    return worker


@contextmanager
def locked_catalog(server: ServerProcess) -> Iterator[None]:
    lock = sqlite3.connect(server.data_dir / "catalog.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        lock.execute("ROLLBACK")
        lock.close()


def stopped(
    server: ServerProcess, *pauses: float, meanwhile: Callable[[Stop], None] | None = None
) -> Stop:
    """Send SIGTERM, and again after each of the pauses; wait for the end."""
    process = server._process
    assert process is not None and server.settings is not None
    stop = Stop(within=server.settings["stop_within"])
    before, began = len(server.log), time.monotonic()
    process.terminate()
    for pause in pauses:
        time.sleep(pause)
        process.terminate()
    if meanwhile is not None:
        meanwhile(stop)
    try:
        stop.exit_code = process.wait(30)
    except subprocess.TimeoutExpired:
        pass
    stop.seconds = time.monotonic() - began
    stop.log = server.log[before:]
    server.kill()
    return stop


def stopped_while_asked(server: ServerProcess, run: RawRun, pending: str) -> Stop:
    """Stop it, and send everything that there is to be sent, each on a new connection."""

    def ask(method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        return http.request(method, path, json=body, headers={"connection": "close"})

    def poll() -> httpx2.Response:
        return ask("POST", "retrieve_future", {"request_id": pending})

    def meanwhile(stop: Stop) -> None:
        began = time.monotonic()
        while ask("GET", "healthz").status_code == 200:
            time.sleep(0.005)
        polls.append(pool.submit(poll))
        stop.newcomer = newcomers.submit(train_anew, server)
        session, model = {"session_id": run.session_id}, {"model_id": run.model_id}
        create = {**session, "base_model": "small-llama", "lora_config": {"rank": 1}}
        sampler = {**session, "sampling_session_seq_id": 1, "base_model": "small-llama"}
        for method, path, body in (
            ("GET", "healthz", None),
            ("POST", "create_session", {"tags": [], "sdk_version": "0"}),
            ("POST", "create_model", {**create, "model_seq_id": 1}),
            ("POST", "create_sampling_session", sampler),
            ("POST", "forward_backward", run.batch(4)),
            ("POST", "forward_backward?refused", {**model, "seq_id": 4}),
            ("POST", "optim_step", {**model, "seq_id": 4, "adam_params": {}}),
            ("POST", "optim_step?refused", {**model, "seq_id": 4, "adam_params": "none"}),
            ("POST", "save_weights", {**model, "seq_id": 4, "path": "a"}),
            ("POST", "unload_model", model),
            ("POST", "session_heartbeat", session),
            ("POST", "get_info", model),
            ("GET", "sessions", None),
            ("GET", f"training_runs/{run.model_id}", None),
        ):
            stop.answers[path] = ask(method, path, body)
        while True:
            try:
                ask("GET", "healthz")
            except httpx2.TransportError:
                break
            time.sleep(0.02)
        stop.closed = time.monotonic() - began
        stop.polls = [each.result() for each in polls]

    newcomers = ThreadPoolExecutor()  # which outlast the stop
    with http_client(server) as http, ThreadPoolExecutor() as pool:
        polls = [pool.submit(poll)]
        time.sleep(0.1)
        return stopped(server, meanwhile=meanwhile)


def stopped_before_an_answer(server: ServerProcess) -> Stop:
    """Stop it while a request waits for the database, which is locked."""

    def meanwhile(stop: Stop) -> None:
        stop.answers["finish"] = late.result()

    with http_client(server) as http, ThreadPoolExecutor() as pool:
        session = http.post("create_session", json={"tags": [], "sdk_version": "0"}).json()
        with locked_catalog(server):
            path = f"sessions/{session['session_id']}/finish"
            late = pool.submit(http.post, path, json={"reason": {"type": "success"}})
            time.sleep(0.3)
            return stopped(server, meanwhile=meanwhile)


def train_anew(server: ServerProcess) -> float:
    """What a script does that knows nothing of a stop."""
    with service_client(server) as service:
        client = service.create_lora_training_client("small-llama", rank=1, seed=1)
        return client.forward_backward(batch(1), "cross_entropy").result(WAIT).metrics["loss:sum"]


# --- What is promised -----------------------------------------------------------------------


def test_what_comes_while_a_server_stops_is_told_to_come_again(seen: Seen) -> None:
    refused = {path: a for path, a in seen.hung.answers.items() if a.status_code != 200}
    assert set(refused) == {
        "healthz",
        "create_session",
        "create_model",
        "create_sampling_session",
        "forward_backward",
        "forward_backward?refused",
        "optim_step",
        "optim_step?refused",
        "save_weights",
        "unload_model",
    }
    for path, answer in refused.items():
        assert answer.status_code == 503, (path, answer.text)
        assert "retry-after" not in answer.headers  # see test_failures
        assert answer.json()["code"] == "stopping"
        assert answer.json()["category"] == "server"


def test_a_client_that_comes_while_a_server_stops_trains_on_the_next_one(seen: Seen) -> None:
    assert seen.newcomer > 0.0


def test_new_connections_are_taken_until_the_runs_have_stopped(seen: Seen) -> None:
    """The worker hangs, so that the runs need most of the time there is."""
    assert seen.hung.closed > 1.0


def test_a_poll_is_held_while_the_server_stops_and_never_fails(seen: Seen) -> None:
    assert len(seen.hung.polls) == 2
    for answer in seen.hung.polls:
        assert answer.status_code == 200
        assert answer.json()["type"] == "try_again"
        assert answer.elapsed.total_seconds() > 0.5, "it will be asked again at once"


@pytest.mark.parametrize("held_up", ["hung", "locked", "unfinished"])
def test_a_stop_ends_in_time_whatever_holds_it_up(seen: Seen, held_up: str) -> None:
    stop: Stop = getattr(seen, held_up)
    assert stop.exit_code == 0
    assert stop.seconds < stop.within + SLACK


def test_a_request_that_is_not_finished_in_time_is_told_to_come_again(seen: Seen) -> None:
    stop = seen.unfinished
    assert stop.answers["finish"].status_code == 503
    assert stop.answers["finish"].json()["code"] == "stopping"
    assert "Traceback" not in stop.log, stop.log


def test_a_worker_that_hangs_is_given_up_in_good_order(seen: Seen) -> None:
    assert "before everything was kept" not in seen.hung.log


def test_a_second_signal_hurries_a_stop(seen: Seen) -> None:
    assert seen.hurried.exit_code == 0
    assert 1.0 < seen.hurried.seconds < 1.2 + SLACK < 0.1 * seen.hurried.within
    assert "before everything was kept" in seen.hurried.log


def test_nothing_is_lost_and_nothing_done_twice(seen: Seen) -> None:
    assert [step["metrics"] for step in seen.steps] == [
        step["metrics"] for step in seen.undisturbed
    ]
    assert len({str(step["metrics"]) for step in seen.steps}) == 6
