"""Preloaded processes live and die as those that are started in the usual way."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.preloaded import IS_POSSIBLE, directory, working_pid
from tests.support.processes import wait_until
from tests.support.server import ServerProcess

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="nothing is forked on this system")


@pytest.fixture
def server(tmp_path: Path) -> ServerProcess:
    # Made now, or else with what is changed by a test; what loads the most takes a while.
    wait_until(lambda: (directory() / "worker").exists(), within=120)
    return ServerProcess(tmp_path)


@contextmanager
def started(server: ServerProcess) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """What its server has started, and the worker for which that stands in."""
    command = [sys.executable, "-m", "holdfast.engine.worker"]
    with subprocess.Popen(
        command, env=server.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        wait_until(lambda: working_pid(process.pid) is not None)
        pid = working_pid(process.pid)
        assert pid is not None
        yield process, pid


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_it_ends_when_its_server_closes_the_pipe(server: ServerProcess) -> None:
    with started(server) as (process, pid):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
        assert not alive(pid)


def test_it_dies_when_its_server_kills_what_it_started(server: ServerProcess) -> None:
    with started(server) as (process, pid):
        os.kill(pid, signal.SIGSTOP)  # also when it hangs
        process.kill()
        wait_until(lambda: not alive(pid))


def test_its_death_is_seen_by_its_server(server: ServerProcess) -> None:
    with started(server) as (process, pid):
        os.kill(pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert process.stdout is not None
        assert process.stdout.read() == b""


def test_it_inherits_its_server_s_limits(server: ServerProcess) -> None:
    limit, hard = 1 << 30, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with started(server) as (_, pid):
            wait_until(lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE) == (limit, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_server_stops_and_dies_as_ever(server: ServerProcess) -> None:
    server.start()
    pid = server.pid
    assert b"preloaded" in Path(f"/proc/{pid}/cmdline").read_bytes()
    server.restart()
    assert not alive(pid) and alive(server.pid) and server.pid != pid
    pid, workers = server.pid, server.worker_pids()
    server.kill()
    assert not alive(pid)
    wait_until(lambda: not any(map(alive, workers)))
    assert not server.alive
