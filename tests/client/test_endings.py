"""The end of a client: of its block, of its process, with a server that is there or gone."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from holdfast import RetryConfig, ServiceClient, TrainingClient
from holdfast.client import session
from holdfast.errors import ClosedError, ConnectionFailedError
from holdfast.protocol.errors import failed_future_body
from tests.client.conftest import QUICK
from tests.client.scripted import Fault, Reply, ScriptedServer

FINISH = "sessions/S1/finish"


class OwnError(Exception):
    """The script's own."""


@contextmanager
def soon() -> Iterator[None]:
    """Far less than what must not be waited for takes, on a busy machine too."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 20.0


@contextmanager
def training_in(
    scripted: ScriptedServer, retry: RetryConfig = QUICK
) -> Iterator[tuple[ServiceClient, TrainingClient]]:
    """A block of both clients; left early by what is raised in it."""
    with ServiceClient(base_url=scripted.url, retry_config=retry) as service:
        yield service, service.create_lora_training_client("tiny").result(10)


def applied(scripted: ScriptedServer) -> list[str]:
    (model,) = scripted.models.values()
    return [kind for _, kind in model.applied]


# ---- the end of a block ----


def test_a_block_waits_for_what_was_called_in_it(scripted: ScriptedServer) -> None:
    scripted.op_seconds = 0.2
    with training_in(scripted) as (_, training):
        training.optim_step()
        saved = training.save_state("a")
    assert applied(scripted) == ["optim_step", "save_weights"]
    assert saved.done()
    assert saved.result().path.endswith("/a")
    assert scripted.requests[-1].path == FINISH
    assert scripted.requests[-1].json()["reason"]["type"] == "success"


def test_a_block_waits_for_what_was_called_while_the_server_restarts(
    scripted: ScriptedServer,
) -> None:
    with training_in(scripted) as (_, training):
        training.optim_step().result(10)
        scripted.down()
        saved = training.save_state("a")
        threading.Timer(0.5, scripted.up).start()
    assert saved.done()
    assert applied(scripted) == ["optim_step", "save_weights"]
    assert len(scripted.sent(FINISH)) == 1


def test_a_models_block_waits_for_what_was_called_in_it(
    scripted: ScriptedServer, client: ServiceClient
) -> None:
    scripted.op_seconds = 0.2
    with client.create_lora_training_client("tiny").result(10) as training:
        saved = training.save_state("a")
    assert saved.done()
    assert applied(scripted) == ["save_weights"]
    assert scripted.alive == []


def test_a_block_that_fails_gives_up_what_waits(scripted: ScriptedServer) -> None:
    scripted.op_seconds = 60.0
    with pytest.raises(OwnError), soon(), training_in(scripted) as (_, training):
        waiting = training.optim_step()
        while not scripted.sent("retrieve_future")[1:]:
            time.sleep(0.01)
        raise OwnError
    with pytest.raises(ClosedError):
        waiting.result(1)
    (finish,) = scripted.sent(FINISH)
    assert finish.json()["reason"]["type"] == "errored"


def test_a_models_block_that_fails_gives_up_what_waits(
    scripted: ScriptedServer, client: ServiceClient
) -> None:
    scripted.op_seconds = 60.0
    training = client.create_lora_training_client("tiny").result(10)
    with pytest.raises(OwnError), soon(), training:
        waiting = training.optim_step()
        raise OwnError
    with pytest.raises(ClosedError):
        waiting.result(1)
    assert scripted.alive == []


@pytest.mark.parametrize("reason", [OwnError, KeyboardInterrupt])
def test_a_block_that_fails_ends_at_once_when_the_server_is_gone(
    scripted: ScriptedServer, reason: type[BaseException]
) -> None:
    with pytest.raises(reason), soon(), training_in(scripted, RetryConfig()) as made:
        service, training = made
        with service.create_lora_training_client("tiny").result(10):
            training.optim_step()
            scripted.down()
            training.optim_step()
            raise reason
    scripted.up()
    assert scripted.sent(FINISH) == []


def test_a_block_that_fails_does_not_wait_long_for_an_answer(scripted: ScriptedServer) -> None:
    scripted.faults[FINISH].append(Fault(delay=60))
    with pytest.raises(OwnError), soon(), training_in(scripted, RetryConfig()):
        raise OwnError
    assert len(scripted.sent(FINISH)) == 1


def test_a_block_that_fails_before_there_is_a_session_ends_soon(scripted: ScriptedServer) -> None:
    scripted.faults["client/config"].append(Fault(delay=60))
    with pytest.raises(OwnError), soon(), ServiceClient(base_url=scripted.url) as service:
        making = service.create_lora_training_client("tiny")
        while not scripted.sent("client/config"):
            time.sleep(0.01)
        raise OwnError
    assert making.exception(5) is not None


def test_a_block_ends_soon_and_says_so_when_the_server_is_gone(
    scripted: ScriptedServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_END_SECONDS", 0.5)
    with soon(), training_in(scripted, RetryConfig()) as (service, training):
        made = service.create_lora_training_client("tiny").result(10)
        training.optim_step().result(10)
        scripted.down()
        made.close()
    scripted.up()
    model, ended = (record.getMessage() for record in caplog.records)
    assert model.startswith("model S1:train:1 was not ended at the server")
    assert ended.startswith("session S1 was not ended at the server")


def test_what_fails_while_a_block_ends_is_said(
    scripted: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    full = failed_future_body("the disk is full", category="user", code="disk_full")
    scripted.results["save_weights"] = lambda request, seq: Reply.json(full)
    scripted.op_seconds = 0.2
    with training_in(scripted) as (_, training):
        training.optim_step()
        training.save_state("a")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "1 operations that were under way" in record.getMessage()
    assert "save_weights: " in record.getMessage()
    assert "the disk is full" in record.getMessage()


def test_what_was_called_is_waited_for_as_long_as_its_future_would_be(
    scripted: ScriptedServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_END_SECONDS", 0.1)
    patience = RetryConfig(give_up_after=0.5, first_delay=0.01, max_delay=0.05)
    with soon(), training_in(scripted, patience) as (_, training):
        training.optim_step().result(10)
        scripted.down()
        lost = training.save_state("a")
    scripted.up()
    assert isinstance(lost.exception(1), ConnectionFailedError)
    assert "save_weights: no answer" in caplog.records[0].getMessage()


# ---- the end of a process ----

START = """
import asyncio, os, signal, sys, threading, time
from holdfast import ServiceClient

# Ignored where the tests are started in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)
service = ServiceClient(base_url=sys.argv[1])
training = service.create_lora_training_client("tiny").result(10)
training.optim_step().result(10)
print("ready", flush=True)
sys.stdin.readline()
"""


def run(
    scripted: ScriptedServer,
    body: str,
    *,
    op_seconds: float = 0.1,
    gone: bool = False,
    interrupt_after: str | None = None,
    again_after: float | None = None,
) -> tuple[int, str]:
    """A script's exit status and what it wrote to stderr; the server is as it is from `body` on.

    It gets SIGINT when the server has had a request of that path, and once more after so long.
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", START + body, scripted.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        scripted.requests.clear()
        scripted.op_seconds = op_seconds
        if gone:
            scripted.down()
        process.stdin.write("\n")
        process.stdin.flush()
        if interrupt_after is not None:
            while not scripted.sent(interrupt_after):
                time.sleep(0.02)
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        if again_after is not None:
            time.sleep(again_after)
            process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=40)
        finally:
            process.kill()
    if gone:
        scripted.up()
    return process.returncode, stderr


PATIENT = """
from holdfast.client import runtime, session
runtime._EXIT_SECONDS = session._END_SECONDS = 60.0
"""
PENDING = "futures = [training.optim_step() for _ in range(5)] + [training.save_state('a')]\n"

SCRIPTS = {
    "left open": "",
    "with operations under way": PENDING,
    "closed, without waiting for it": PENDING + "service.close()",
    "two clients": PENDING
    + textwrap.dedent("""
        other = ServiceClient(base_url=sys.argv[1])
        making = other.create_lora_training_client("tiny")
        """),
    "with a waiting thread": PENDING
    + "threading.Thread(target=futures[-1].result, daemon=True).start()",
    "forked": PENDING
    + textwrap.dedent("""
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
        else:
            try:
                training.optim_step()
            except RuntimeError:
                sys.exit()
            sys.exit("a child may not use its parent's connections")
        """),
    "async": textwrap.dedent("""
        async def main():
            async def wait():
                await training.optim_step()
            tasks = [asyncio.create_task(wait()) for _ in range(3)]
            await asyncio.sleep(0.1)
        asyncio.run(main())
        """),
    "async, and the loop is closed before there is a result": textwrap.dedent("""
        future = training.optim_step()
        async def main():
            await asyncio.wait([asyncio.ensure_future(future._wait())], timeout=0.1)
        asyncio.run(main())
        future.exception(2)
        """),
}


@pytest.mark.parametrize("body", SCRIPTS.values(), ids=SCRIPTS)
def test_a_process_ends_without_a_word(scripted: ScriptedServer, body: str) -> None:
    assert run(scripted, PATIENT + body) == (0, "")
    (finish,) = scripted.sent(FINISH)
    assert finish.json()["reason"]["type"] == "success"
    if "save_state" in body:  # nobody waited for it, and it was not lost
        assert scripted.models["S1:train:0"].applied[-1][1] == "save_weights"


def test_a_process_that_ends_leaves_to_the_server_what_takes_longer(
    scripted: ScriptedServer,
) -> None:
    with soon():
        assert run(scripted, PENDING, op_seconds=60.0) == (0, "")
    # All of it was taken in, and a session that is not finished executes it.
    assert applied(scripted)[1:] == ["optim_step"] * 5 + ["save_weights"]
    assert scripted.sent(FINISH) == []


@pytest.mark.parametrize("body", ["", "service.close()"], ids=["left open", "closed"])
def test_a_process_ends_without_a_word_when_the_server_is_gone(
    scripted: ScriptedServer, body: str
) -> None:
    with soon():
        assert run(scripted, body, gone=True) == (0, "")


def test_a_process_that_ends_says_what_the_server_has_not_taken_in(
    scripted: ScriptedServer,
) -> None:
    body = SCRIPTS["two clients"] + SCRIPTS["with a waiting thread"]
    with soon():
        status, stderr = run(scripted, body, gone=True)
    assert status == 0
    (line,) = stderr.splitlines()
    assert "has confirmed 12 operations, which may be lost; the first of them: optim_step." in line


@pytest.mark.parametrize(
    ("body", "reason", "error"),
    [
        ("raise ValueError('x')", "errored", "ValueError: x"),
        ("raise KeyboardInterrupt", "interrupted", "KeyboardInterrupt"),
    ],
)
def test_a_process_that_fails_tells_the_server_and_shows_its_own_error_alone(
    scripted: ScriptedServer, body: str, reason: str, error: str
) -> None:
    status, stderr = run(scripted, PENDING + body, op_seconds=60.0)
    assert status != 0
    assert own_traceback_alone(stderr, error)
    (finish,) = scripted.sent(FINISH)
    assert finish.json()["reason"]["type"] == reason


WAITS = {
    "a wait": PENDING + "futures[-1].result()",
    "a wait in a block": "with service:\n    training.optim_step().result()",
    "the end of a block": "with service:\n    training.optim_step()",
    "async code": textwrap.dedent("""
        async def main():
            async with service:
                await training.optim_step()
        asyncio.run(main())
        """),
}


@pytest.mark.parametrize("body", WAITS.values(), ids=WAITS)
def test_an_interrupted_process_ends_at_once_and_tells_the_server(
    scripted: ScriptedServer, body: str
) -> None:
    with soon():
        status, stderr = run(scripted, body, op_seconds=60.0, interrupt_after="retrieve_future")
    assert status == -signal.SIGINT
    assert own_traceback_alone(stderr, "KeyboardInterrupt")
    (finish,) = scripted.sent(FINISH)
    assert finish.json()["reason"]["type"] == "interrupted"


def test_interrupting_the_end_of_a_process_hurries_it(scripted: ScriptedServer) -> None:
    scripted.faults[FINISH].append(Fault(delay=60))
    with soon():
        assert run(scripted, PATIENT, interrupt_after=FINISH) == (0, "")


def test_nothing_is_taken_in_once_the_process_is_at_its_end(scripted: ScriptedServer) -> None:
    body = textwrap.dedent("""
        import atexit, holdfast.client.runtime as runtime
        from holdfast.errors import ClosedError
        atexit.unregister(runtime._current.shut_down)

        def late():
            assert threading.active_count() == 1
            try:
                service.get_server_capabilities()
            except ClosedError as error:
                assert "the interpreter ends" in str(error)
            else:
                assert False, "it was taken in"

        atexit.register(late)
        atexit.register(runtime._current.shut_down)
        """)
    assert run(scripted, body) == (0, "")
    assert applied(scripted) == ["optim_step"]


def test_whoever_waits_once_the_process_is_at_its_end_is_told(scripted: ScriptedServer) -> None:
    body = textwrap.dedent("""
        import atexit, holdfast.client.runtime as runtime
        from holdfast.errors import ClosedError
        atexit.unregister(runtime._current.shut_down)
        future = training.optim_step()

        def late():
            for wait in (future.result, future.exception, lambda: asyncio.run(future._wait())):
                try:
                    wait()
                except ClosedError as error:
                    assert "the interpreter ends" in str(error)
                else:
                    assert False, "it is not done"

        atexit.register(late)
        atexit.register(runtime._current.shut_down)
        """)
    with soon():
        assert run(scripted, body, op_seconds=60.0) == (0, "")


def test_a_signals_handler_may_use_the_client_wherever_the_program_is(
    scripted: ScriptedServer,
) -> None:
    body = textwrap.dedent("""
        futures, asked = [], False

        def submit(*_):
            global asked
            if not asked:  # not within itself
                asked = True
                futures.append(training.optim_step())
                asked = False

        signal.signal(signal.SIGALRM, submit)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            training._outbox.append()
            training._runtime.soon(int)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert len(futures) > 100
        service.close("errored")
        """)
    with soon():
        assert run(scripted, body, op_seconds=0.0) == (0, "")


def own_traceback_alone(stderr: str, error: str) -> bool:
    """Whether there are tracebacks of that error and nothing else, be it raised from within."""
    lines = stderr.splitlines()
    return (
        lines[0] == "Traceback (most recent call last):"
        and lines[-1] == error
        and "ignored" not in stderr
        and "Task" not in stderr
        and "Warning" not in stderr
    )


# ---- the negative cases: the tests above can fail ----


def test_a_loop_that_is_only_stopped_complains(scripted: ScriptedServer) -> None:
    careless = textwrap.dedent("""
        import atexit, gc, holdfast.client.runtime as runtime
        atexit.unregister(runtime._current.shut_down)
        loop, thread = runtime._current.loop, runtime._current._thread
        waiting = runtime._current.start(asyncio.sleep(60))
        time.sleep(0.1)

        def stop():
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            globals().pop("waiting")
            runtime._current = None
            gc.collect()

        atexit.register(stop)
        """)
    _, stderr = run(scripted, careless)
    assert "Task was destroyed but it is pending!" in stderr
    assert not own_traceback_alone(stderr, "KeyboardInterrupt")
