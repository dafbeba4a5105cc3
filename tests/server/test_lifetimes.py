"""How long a session lives without a sign of its client, and what is left of it then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.raw import RawRun
from tests.support.sdk import WAIT
from tests.support.server import ServerProcess

GRACE = 10.0
KEPT = 2 * 3600.0
LOOKED_AT_EVERY = GRACE / 4
"""Seconds after which a server with that grace looks at its sessions again."""
POLL_HOLD = 4.0


@pytest.fixture
def server(models: dict[str, Path], tmp_path: Path) -> Iterator[ServerProcess]:
    """One whose sessions end sooner than a user may have them end."""
    only = {"small-llama": models["small-llama"]}
    lifetimes = {"session_grace": GRACE, "last_state_kept": KEPT}
    settings = {"lifetimes": lifetimes, "poll_hold": POLL_HOLD}
    with ServerProcess(tmp_path / "server", models=only, settings=settings) as running:
        yield running


@pytest.mark.timeout(240)
def test_a_silent_session_ends_and_its_state_can_be_resumed(server: ServerProcess) -> None:
    """Three others live on: each of their clients gives one of the signs of life, and no other."""
    with (
        RawRun.open(server) as polling,
        RawRun.open(server) as submitting,
        RawRun.open(server) as beating,
        RawRun.open(server) as silent,
        ThreadPoolExecutor() as pool,
    ):
        for run in (polling, submitting, beating, silent):
            run.result(run.forward_backward(1))
            run.result(run.optim_step(2))
        since = time.monotonic()
        waiting = polling.forward_backward(4)  # for number 3, as long as that may come
        polls = pool.submit(polls_until_done, polling, waiting)
        try:
            number = 2
            while f"session={silent.session_id}" not in server.log:
                assert time.monotonic() < since + GRACE + 3 * LOOKED_AT_EVERY + WAIT, server.log
                number += 1
                submitting.forward_backward(number)
                assert beat(beating) == 200
                time.sleep(1.0)
            assert time.monotonic() > since + GRACE
        finally:
            polling.forward_backward(3)
        assert polls.result(WAIT) >= 2
        assert beat(silent) == 410

        ended = last_state(silent)
        assert silent.http.get(f"training_runs/{silent.model_id}").json()["status"]["note"] == (
            f"session {silent.session_id!r} has ended (expired)"
        )
        with RawRun.open(server) as resumed:
            load = {"model_id": resumed.model_id, "seq_id": 1, "path": ended, "optimizer": True}
            resumed.result(resumed.submitted("load_weights", load))
            assert two_steps(resumed, 2) == two_steps(beating, 3)

        submitting.result(submitting.optim_step(number + 1))
        for run in (polling, submitting, beating):
            assert beat(run) == 200
    assert server.log.count("session expired") == 1


def beat(run: RawRun) -> int:
    """The status of the answer to a heartbeat."""
    return run.http.post("session_heartbeat", json={"session_id": run.session_id}).status_code


def polls_until_done(run: RawRun, request_id: str) -> int:
    """Poll for what has no outcome yet, until it has; how often there was none."""
    polls = 0
    while run.poll(request_id).json().get("type") == "try_again":
        polls += 1
    return polls


def last_state(run: RawRun) -> str:
    """The path of what is kept of a run that ended after number 2, and not for ever."""
    shown = run.http.get(f"training_runs/{run.model_id}").json()["last_checkpoint"]
    left = datetime.fromisoformat(shown["expires_at"]) - datetime.now(UTC)
    assert KEPT - WAIT < left.total_seconds() < KEPT
    assert shown["tinker_path"] == f"tinker://{run.model_id}/weights/auto.2"
    return str(shown["tinker_path"])


def two_steps(run: RawRun, seq: int) -> list[dict[str, Any]]:
    """What a run shows of two more steps."""
    results = []
    for number in (seq, seq + 2):
        results.append(run.result(run.forward_backward(number, seed=number - seq + 5)))
        results.append(run.result(run.optim_step(number + 1)))
    return results
