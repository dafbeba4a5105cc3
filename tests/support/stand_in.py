"""What a test has started, while `tests.support.preloaded` forks the process that does the work.

It does nothing but live and die with it: whoever ends this process ends that one, and the status
with which that one ends is this one's. Imports little, for it starts as often as that one does.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Sequence

PRELOADED = {
    "holdfast.engine.worker": "worker",
    "holdfast.cli": "server",
    "tests.support.serve_with": "server",
}
"""The modules that are run, and the sockets of those who have loaded what they import."""
LIMIT = resource.RLIMIT_FSIZE
"""Handed on: what `no_room_for_files` sets, a worker inherits from its server."""
_LOADING = 120.0


def stand_in(directory: str, module: str, arguments: Sequence[str]) -> None:
    """Have `python -m module` forked with this process's standard files, environment and limits.

    Never returns.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that one is told, too
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        _connect(connection, f"{directory}/{PRELOADED[module]}")
        order = {
            "pid": os.getpid(),
            "module": module,
            "arguments": arguments,
            "environment": dict(os.environ),
            "directory": os.getcwd(),  # noqa: PTH109
            "limit": resource.getrlimit(LIMIT),
        }
        message = json.dumps(order).encode()
        socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(message)
        nothing = os.open(os.devnull, os.O_RDWR)
        for file in (0, 1):  # the other ends of pipes are to see that one's end
            os.dup2(nothing, file)
        answer = connection.recv(16)
    status = int(answer or -signal.SIGKILL)
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


def _connect(connection: socket.socket, address: str) -> None:
    end = time.monotonic() + _LOADING
    while True:
        try:
            connection.connect(address)
            return
        except FileNotFoundError:  # it is still loading
            if time.monotonic() > end or not os.path.isdir(os.path.dirname(address)):  # noqa: PTH112, PTH120
                raise
        time.sleep(0.02)
