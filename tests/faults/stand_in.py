"""A worker that a server has started, while `tests.faults.preloaded` forks the one that works.

It does nothing but live and die with it: whoever ends this process ends that one, and the status
with which that one ends is this one's. Imports little, for it starts as often as a worker does.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket

LIMIT = resource.RLIMIT_FSIZE
"""Handed on: what `no_room_for_files` sets, a worker inherits from its server."""


def stand_in(address: str) -> None:
    """Have a worker forked with this process's pipes, environment and limits; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a worker
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        told = {"pid": os.getpid(), "environment": dict(os.environ)}
        message = json.dumps({**told, "limit": resource.getrlimit(LIMIT)}).encode()
        socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(message)
        nothing = os.open(os.devnull, os.O_RDWR)
        for pipe in (0, 1):  # their other ends are to see that worker's end
            os.dup2(nothing, pipe)
        answer = connection.recv(16)
    status = int(answer or -signal.SIGKILL)
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)
