"""Servers and workers that start in a fraction of the time: forked from what has loaded libraries.

`python -m tests.support.preloaded DIRECTORY server|worker` is such a process, and ends with the
one that has started it. All of Holdfast is imported by each fork anew, and it runs as ever: its
pipes, its environment, its death by any signal. What a test or a server has started stands in for
it, see `tests.support.stand_in`.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

from tests.support.limits import change_limits
from tests.support.stand_in import LIMIT, PRELOADED

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).with_name("site")
"""To be found by the processes of a server under test before what is installed."""
IS_POSSIBLE = sys.platform == "linux"
"""Elsewhere everything starts as a user's does."""
_PR_SET_PDEATHSIG = 1
_making = Lock()


def directory() -> Path:
    """Where servers and workers are forked: TESTS_PRELOADED of those that stand in for them.

    The same one as long as this process lives.
    """
    with _making:
        made, processes = _preloaded()
        assert all(process.poll() is None for process in processes), "nothing is preloaded any more"
        return made


def quick_starts() -> dict[str, str]:
    """The environment of those whose servers and workers are forked, where that is possible."""
    if not IS_POSSIBLE:
        return {"PYTHONPATH": python_path()}
    return {"PYTHONPATH": python_path(), "TESTS_PRELOADED": str(directory())}


def python_path() -> str:
    """Where the processes of a server under test find `sitecustomize`, and these tests."""
    return os.pathsep.join([str(SITE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@cache
def _preloaded() -> tuple[Path, list[subprocess.Popen[bytes]]]:
    made = Path(tempfile.mkdtemp(prefix="preloaded-"))  # a socket's address is short
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    processes = []
    for name in sorted(set(PRELOADED.values())):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.preloaded", str(made), name],
            env=_environment(),
            stdin=subprocess.PIPE,
        )
        atexit.register(process.wait)
        atexit.register(process.kill)  # and with it what it has forked
        processes.append(process)
    return made, processes


def _environment() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
    # numpy's own threads would not survive a fork, and nothing here needs them. Those whose clock
    # is to be wrong find it so.
    return {
        **ours,
        "PYTHONPATH": python_path(),
        "OPENBLAS_NUM_THREADS": "1",
        "FAULTS_CLOCK": os.devnull,
    }


def working_pid(stand_in: int) -> int | None:
    """The process for which another one stands in; None while there is none yet, or no more."""
    with suppress(FileNotFoundError):
        return int(_pid_file(directory(), stand_in).read_text())
    return None


def _pid_file(directory: Path, stand_in: int) -> Path:
    return directory / f"{stand_in}.pid"


@dataclass(slots=True)
class _Forked:
    pid: int
    connection: socket.socket
    pid_file: Path


class _Preloaded:
    """Forks on demand, ends what nobody stands in for any more, and tells how each one ended."""

    def __init__(self, address: Path) -> None:
        self._address = address
        self._forked: dict[int, _Forked] = {}
        """By the file descriptor of the connection to whoever stands in."""
        self._selector = selectors.DefaultSelector()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        ended, wakeup = socket.socketpair()
        for end in (ended, wakeup):
            end.setblocking(False)
        self._ended = ended
        signal.set_wakeup_fd(wakeup.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._open = [self._listening, ended, wakeup]

    def serve(self) -> NoReturn:
        new = self._address.with_suffix(".new")
        self._listening.bind(str(new))
        self._listening.listen(64)
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._ended, selectors.EVENT_READ)
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        new.rename(self._address)
        while True:
            # One at a time: what is done for one may close the file of the next.
            key, _ = self._selector.select()[0]
            if key.fileobj is self._listening:
                self._fork(self._listening.accept()[0])
            elif key.fileobj is self._ended:
                self._reap()
            elif key.fileobj is sys.stdin:  # whoever started this is gone
                shutil.rmtree(self._address.parent, ignore_errors=True)
                os._exit(0)
            else:  # whoever stood in was killed
                self._selector.unregister(key.fileobj)
                os.kill(self._forked[key.fd].pid, signal.SIGKILL)

    def _fork(self, connection: socket.socket) -> None:
        size, pipes, _, _ = socket.recv_fds(connection, 4, 3)
        told = b""
        while received := connection.recv(1 << 20):
            told += received
            if len(told) == int.from_bytes(size, "big"):
                break
        else:  # it was killed while it said so
            connection.close()
            for pipe in pipes:
                os.close(pipe)
            return
        order = json.loads(told)
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            for opened in (*self._open, *(f.connection for f in self._forked.values()), connection):
                opened.close()
            _become(order, pipes)
        for pipe in pipes:
            os.close(pipe)
        pid_file = _pid_file(self._address.parent, order["pid"])
        new = pid_file.with_suffix(".new")
        new.write_text(str(pid))
        new.rename(pid_file)
        self._forked[connection.fileno()] = _Forked(pid, connection, pid_file)
        self._selector.register(connection, selectors.EVENT_READ)

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            while self._ended.recv(4096):
                pass
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                pid, status = ended
                fd = next(fd for fd, forked in self._forked.items() if forked.pid == pid)
                forked = self._forked.pop(fd)
                forked.pid_file.unlink()
                with suppress(KeyError):
                    self._selector.unregister(forked.connection)
                with suppress(BrokenPipeError):
                    forked.connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                forked.connection.close()


def _become(order: Mapping[str, Any], files: list[int]) -> NoReturn:
    """In the fork: what it would be if it had been started by itself."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["directory"])
    resource.setrlimit(LIMIT, tuple(order["limit"]))
    sys.argv[1:] = order["arguments"]
    change_limits()
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    sys.exit()


def _load_for_a_worker() -> None:
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    transformers.AutoModelForCausalLM  # noqa: B018  imported when it is asked for
    transformers.AutoTokenizer  # noqa: B018


def _load_for_a_server() -> None:
    import blake3  # noqa: F401
    import click  # noqa: F401
    import fastapi.responses  # noqa: F401
    import google.protobuf.message  # noqa: F401
    import numpy  # noqa: F401
    import safetensors  # noqa: F401
    import sqlalchemy.dialects.sqlite  # noqa: F401
    import structlog  # noqa: F401
    import uvicorn.lifespan.on
    import uvicorn.loops.auto
    import uvicorn.protocols.http.auto
    import uvicorn.protocols.websockets.auto  # noqa: F401


def main(directory: str, name: str) -> NoReturn:
    """Serve until killed."""
    {"worker": _load_for_a_worker, "server": _load_for_a_server}[name]()
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"what is forked loses the threads {threads}"
    assert not any(name.startswith("holdfast") for name in sys.modules), "not ours"
    gc.collect()
    gc.freeze()
    _Preloaded(Path(directory, name)).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
