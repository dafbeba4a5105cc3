"""Workers that start in a tenth of the time: forked from a process that has imported torch.

`python -m tests.faults.preloaded SOCKET` is that process. All of Holdfast is imported by each
worker anew, and it runs as ever: its pipes, its environment, its death by any signal. The process
that its server has started stands in for it, see `tests.faults.stand_in`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.faults.stand_in import LIMIT

_STARTUP = 120.0
_PR_SET_PDEATHSIG = 1


@contextmanager
def preloaded_workers(directory: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """The socket at which servers find their workers (FAULTS_WORKERS), and which pids they have.

    `environment` is what a worker would start with.
    """
    address = directory / "workers"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.preloaded", str(address)],
        # numpy's own threads would not survive a fork, and nothing here needs them.
        env={**environment, "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
    ) as process:
        try:
            end = time.monotonic() + _STARTUP
            while not address.exists():
                assert process.poll() is None and time.monotonic() < end, "nothing was preloaded"
                time.sleep(0.02)
            yield address
        finally:
            process.kill()  # and with it the workers


def working_pid(address: Path, stand_in: int) -> int | None:
    """The worker for which a process stands in; None while it is still to be forked."""
    with suppress(FileNotFoundError):
        return int(_pid_file(address, stand_in).read_text())
    return None


def _pid_file(address: Path, stand_in: int) -> Path:
    return address.with_name(f"{address.name}.{stand_in}")


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
        new.rename(self._address)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listening:
                    self._fork(self._listening.accept()[0])
                elif key.fileobj is self._ended:
                    self._reap()
                else:  # whoever stood in was killed
                    self._selector.unregister(key.fileobj)
                    forked = self._forked.get(key.fd)
                    if forked is not None:
                        os.kill(forked.pid, signal.SIGKILL)

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
            for opened in (*self._open, *(f.connection for f in self._forked.values()), connection):
                opened.close()
            _become_worker(order, pipes)
        for pipe in pipes:
            os.close(pipe)
        pid_file = _pid_file(self._address, order["pid"])
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


def _become_worker(order: Mapping[str, Any], pipes: list[int]) -> NoReturn:
    """In the fork: what it would be if its server had started it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, pipe in enumerate(pipes):
        os.dup2(pipe, number)
        os.close(pipe)
    os.environ.clear()
    os.environ.update(order["environment"])
    resource.setrlimit(LIMIT, tuple(order["limit"]))
    try:
        runpy.run_module("holdfast.engine.worker", run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _import_libraries() -> None:
    """What a worker imports that is not ours, as far as it starts no threads."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    transformers.AutoModelForCausalLM  # noqa: B018  imported when it is asked for
    transformers.AutoTokenizer  # noqa: B018


def main(address: str) -> NoReturn:
    """Serve until killed."""
    _import_libraries()
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"what is forked loses the threads {threads}"
    assert not any(name.startswith("holdfast") for name in sys.modules), "not ours"
    gc.collect()
    gc.freeze()
    _Preloaded(Path(address)).serve()


if __name__ == "__main__":
    main(sys.argv[1])
