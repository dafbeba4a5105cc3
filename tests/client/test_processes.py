"""The client and its process: forking, other clients beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from holdfast import ServiceClient, TrainingClient
from holdfast.protocol.errors import failed_future_body, python_failed_future_body
from tests.client.scripted import Reply, Request, ScriptedServer


def test_a_forked_child_is_told_to_make_its_own_client(
    scripted: ScriptedServer, training: TrainingClient
) -> None:
    training.optim_step().result(10)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        told = made = b"?"
        try:
            training.optim_step()
        except RuntimeError as error:
            told = b"told" if b"forked" in str(error).encode() else b"other"
        try:
            with ServiceClient(base_url=scripted.url) as own:
                own.create_lora_training_client("tiny").result(10)
            made = b"made"
        finally:
            os.write(writing, told + b" " + made)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"told made"
    os.waitpid(child, 0)
    training.optim_step().result(10)


def test_the_official_client_shows_the_text_of_a_failed_future(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own shape shows the sentence; the shape for all clients shows it inside of a map."""
    shapes = {1: python_failed_future_body, 2: failed_future_body}

    def fail(request: Request, seq: int) -> Reply:
        return Reply.json(shapes[seq]("the disk is full", category="user", code="disk_full"))

    scripted.results["optim_step"] = fail
    scripted.results["telemetry"] = lambda request, seq: Reply.json({"status": "accepted"})
    code = f"""
        import tinker
        from tinker import types
        service = tinker.ServiceClient(base_url={scripted.url!r}, api_key="tml-x")
        training = service.create_lora_training_client("tiny").result()
        for _ in range(2):
            try:
                training.optim_step(types.AdamParams()).result()
            except tinker.RequestFailedError as error:
                print(error.category, "|", error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    own, shared = done.stdout.splitlines()
    assert "user" in own.split("|")[0].lower()
    assert "the disk is full" in own
    assert "{" not in own
    assert "user" in shared.split("|")[0].lower()
    assert "'message': 'the disk is full'" in shared
