"""SIGTERM: a server ends in time, whatever holds it up, and the next one goes on."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

from tests.support.raw import RawRun
from tests.support.server import ServerProcess

WITHIN = 5.0


def serving(directory: Path, models: dict[str, Path], within: float) -> ServerProcess:
    return ServerProcess(
        directory,
        models={"small-llama": models["small-llama"]},
        settings={"stop_within": within},
    )


def ended_after(server: ServerProcess, *pauses: float) -> float:
    """Seconds until it ended, with a SIGTERM at once and after each of the pauses."""
    process = server._process
    assert process is not None
    began = time.monotonic()
    process.terminate()
    for pause in pauses:
        time.sleep(pause)
        process.terminate()
    process.wait(30)
    server.kill()
    return time.monotonic() - began


def suspend_the_worker(server: ServerProcess) -> None:
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGSTOP)


def test_an_operation_without_end_does_not_hold_up_a_stop(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    with serving(tmp_path, models, WITHIN) as server:
        with RawRun.open(server) as run:
            run.result(run.forward_backward(1))
            first = run.result(run.optim_step(2))
            suspend_the_worker(server)
            pending = run.forward_backward(3)
            time.sleep(0.3)
            assert ended_after(server) < WITHIN + 0.5
            assert "before everything was kept" not in server.log
            server.start()
            run.result(pending)
            second = run.result(run.optim_step(4))
        with RawRun.open(server) as undisturbed:
            undisturbed.result(undisturbed.forward_backward(1))
            assert undisturbed.result(undisturbed.optim_step(2)) == first
            undisturbed.result(undisturbed.forward_backward(3))
            assert undisturbed.result(undisturbed.optim_step(4)) == second


def test_a_second_signal_hurries_a_stop(tmp_path: Path, models: dict[str, Path]) -> None:
    with serving(tmp_path, models, 60.0) as server, RawRun.open(server) as run:
        run.result(run.forward_backward(1))
        suspend_the_worker(server)
        pending = run.forward_backward(2)
        time.sleep(0.3)
        assert 1.0 < ended_after(server, 0.5) < 3.0
        assert "before everything was kept" in server.log
        server.start()
        run.result(pending)


def test_a_locked_database_does_not_hold_up_a_stop(tmp_path: Path, models: dict[str, Path]) -> None:
    with serving(tmp_path, models, WITHIN) as server, RawRun.open(server) as run:
        run.result(run.forward_backward(1))
        suspend_the_worker(server)
        pending = run.optim_step(2)
        locked = sqlite3.connect(server.data_dir / "catalog.db", isolation_level=None)
        locked.execute("BEGIN IMMEDIATE")
        (worker,) = server.worker_pids()
        os.kill(worker, signal.SIGCONT)  # its outcome cannot be recorded
        time.sleep(0.5)
        assert ended_after(server) < WITHIN + 0.5
        locked.execute("ROLLBACK")
        locked.close()
        server.start()
        assert run.result(pending)["metrics"]["step"] == 1.0
