"""What the journal costs: a submission's latency, and training's throughput.

1. From a submission to its answer, durable by then, with eight clients at once, beside an fsync:
   as fast as they can, and each at a pace. Nothing is computed meanwhile. The same bodies to
   `bench.bare_server` show what HTTP and SQLite take of that on this machine.
2. Steps of the medium model on a server whose data directory is on the disk, each beside one on a
   server whose data directory, journal and snapshots and all, is in memory. Two processes of the
   same program differ by some percent in their speed: several pairs of servers are started.

    python -m bench.journal [--requests 200] [--starts 4] [--pairs 10] [--threads 2]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import selectors
import socket
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

import holdfast
from bench.engine import MODELS, RANK, make_batch
from holdfast.cli.server_process import ServerProcess
from holdfast.protocol.batches import BatchRequest
from holdfast.protocol.data import Datum, EncodedText
from holdfast.protocol.tensors import Tensor

CLIENTS = 8
TOKENS = 1024
MODEL = "medium"
MEMORY = Path("/dev/shm")
PACES = (0.0, 0.01, 0.1)
"""Seconds between a client's submissions, at least."""
WARM_UP = 3
LATENCY_GOAL = 0.002
"""Seconds beyond two fsyncs."""
TAIL_GOAL = 5.0
THROUGHPUT_GOAL = 0.98


def measure_latency(requests: int) -> None:
    """Print the percentiles at each pace, and the fsync and the server they are compared with."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ServerProcess(Path(folder) / "data", "--threads", "1", "--device", "cpu") as server,
        _BareServer(Path(folder) / "bare") as bare,
    ):
        fsyncs = _fsync_seconds(Path(folder) / "before")
        runs = []
        for number, pace in enumerate(PACES):
            # The first number is missing, and the others wait.
            clients = [_Client(server.url, requests) for _ in range(CLIENTS)]
            order = [bare, server] if number % 2 else [server, bare]
            series = {to: _submit_all(clients, pace, to.port) for to in order}
            runs.append((series[server], series[bare]))
        fsync = statistics.median(fsyncs + _fsync_seconds(Path(folder) / "after"))
    print(f"{CLIENTS} clients, submissions of {clients[0].size / 1024:.0f} KiB")
    goal = 2 * fsync + LATENCY_GOAL
    print(f"fsync of 4 KiB {1e3 * fsync:.2f} ms, goal of p50 {1e3 * goal:.2f} ms")
    for pace, (ours, least) in zip(PACES, runs, strict=True):
        tail = TAIL_GOAL * ours.p50
        print(
            f"  {f'every {1e3 * pace:.0f} ms' if pace else 'as fast as they can':20}"
            f"{ours.a_second:6.0f}/s"
            f"  p50 {1e3 * ours.p50:6.2f} ms {_verdict(ours.p50 <= goal):10}"
            f"  p99 {1e3 * ours.p99:6.2f} ms, goal {1e3 * tail:.2f} {_verdict(ours.p99 <= tail):10}"
            f"  bare server {least.a_second:.0f}/s, p50 {1e3 * least.p50:.2f} ms"
        )


@dataclass(frozen=True, slots=True)
class _Series:
    """Submissions and their answers."""

    seconds: float
    times: list[float]
    """Seconds of each, ascending."""

    @property
    def a_second(self) -> float:
        return len(self.times) / self.seconds

    @property
    def p50(self) -> float:
        return self.times[len(self.times) // 2]

    @property
    def p99(self) -> float:
        return self.times[int(len(self.times) * 0.99)]


class _BareServer(ServerProcess):
    """A running `bench.bare_server`."""

    def command(self) -> list[str]:
        file = str(self.data_dir / "bare.db")
        return [sys.executable, "-m", "bench.bare_server", str(self.port), file]


class _Client:
    """Submits one after the other, over a connection of its own; its requests are made beforehand.

    It does as little as a client can, and none waits for the interpreter while another has it: what
    is measured is the server.
    """

    def __init__(self, url: str, requests: int) -> None:
        http_ = http.client.HTTPConnection(url.removeprefix("http://"))
        session = _post(http_, "create_session", {"tags": []})["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "holdfast-tiny"}
        model = _post(http_, "create_model", body)["model_id"]
        ones = np.ones(TOKENS, np.int64)
        inputs = {
            "target_tokens": Tensor.from_numpy(ones),
            "weights": Tensor.from_numpy(ones.astype(np.float32)),
        }
        datum = Datum((EncodedText.of([1] * TOKENS),), inputs)
        bodies = [
            BatchRequest(model, seq, [datum], "cross_entropy").to_protobuf()
            for seq in range(2, 2 + requests)
        ]
        http_.close()
        self.size = len(bodies[0])
        self._requests = [_request(body) for body in bodies]

    def begin(self, port: int) -> None:
        """Send them all to this server from now on."""
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = 0.0
        self.times: list[float] = []
        self._received = b""

    @property
    def has_more(self) -> bool:
        return len(self.times) < len(self._requests)

    def send(self) -> None:
        """Send the next request."""
        self.began = time.perf_counter()
        self.socket.sendall(self._requests[len(self.times)])

    def receive(self, now: float) -> bool:
        """Take what has arrived by `now`; whether that completes the answer."""
        self._received += self.socket.recv(1 << 16)
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length is None or len(body) < int(length[1]):
            return False
        assert head.startswith(b"HTTP/1.1 200 "), self._received
        self.times.append(now - self.began)
        self._received = b""
        return True


def _submit_all(clients: list[_Client], pace: float, port: int) -> _Series:
    """Each client's next submission comes after its last answer, and `pace` after its last one."""
    for client in clients:
        client.begin(port)
    began = time.perf_counter()
    due = {client: began + number * pace / CLIENTS for number, client in enumerate(clients)}
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        while selector.get_map():
            now = time.perf_counter()
            for client in [client for client in due if due[client] <= now]:
                del due[client]
                client.send()
            ready = selector.select(max(0.0, min(due.values()) - now) if due else None)
            now = time.perf_counter()
            for key, _ in ready:
                client = key.data
                if not client.receive(now):
                    continue
                if client.has_more:
                    due[client] = max(now, client.began + pace)
                else:
                    selector.unregister(client.socket)
                    client.socket.close()
    seconds = time.perf_counter() - began
    return _Series(seconds, sorted(t for client in clients for t in client.times))


def _post(to: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> Any:
    headers = {"x-api-key": "tml-bench", "content-type": "application/json"}
    to.request("POST", f"/api/v1/{path}", json.dumps(body).encode(), headers)
    answer = to.getresponse()
    content = answer.read()
    assert answer.status == 200, content
    return json.loads(content)


def _request(body: bytes) -> bytes:
    head = (
        "POST /api/v1/forward_backward HTTP/1.1\r\nhost: bench\r\nx-api-key: tml-bench\r\n"
        f"content-type: application/x-protobuf\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def measure_throughput(starts: int, pairs: int, threads: int) -> None:
    """Print the medians of both servers' steps, and the ratio of each pair of servers."""
    if not MEMORY.is_dir():
        print(f"no {MEMORY} here: the journal in memory is not measured")
        return
    print(
        f"{MODEL} model, {threads} threads, {pairs} pairs of steps on each pair of servers, medians"
    )
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        AutoModelForCausalLM.from_config(MODELS[MODEL]).save_pretrained(directory)
        for number in range(starts):
            disk, memory = _steps(directory, pairs, threads, memory_first=number % 2 == 1)
            ratios.append(statistics.median(m / d for m, d in zip(memory, disk, strict=True)))
            print(
                f"  on the disk {1e3 * statistics.median(disk):8.1f} ms"
                f"  in memory {1e3 * statistics.median(memory):8.1f} ms"
                f"  throughput {ratios[-1]:.3f}",
                flush=True,
            )
    ratio = statistics.median(ratios)
    print(f"  throughput {ratio:.3f}  goal {THROUGHPUT_GOAL} {_verdict(ratio >= THROUGHPUT_GOAL)}")


def _steps(
    model: Path, pairs: int, threads: int, *, memory_first: bool
) -> tuple[list[float], list[float]]:
    """Seconds of steps on a new server on the disk, each beside one of a new one in memory."""
    options = ["--model", f"{MODEL}={model}", "--threads", str(threads), "--device", "cpu"]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(dir=MEMORY, ignore_cleanup_errors=True) as memory,
        ExitStack() as running,
    ):
        places = [memory, folder] if memory_first else [folder, memory]
        loops = []
        for place in places:
            server = running.enter_context(ServerProcess(Path(place) / "data", *options))
            loops.append(_Loop(server.url))
        for number in range(WARM_UP + pairs):
            for loop in loops if number % 2 else reversed(loops):
                loop.step()
        for loop in loops:
            loop.close()
    first, second = (loop.times[WARM_UP:] for loop in loops)
    return (second, first) if memory_first else (first, second)


class _Loop:
    def __init__(self, url: str) -> None:
        self._service = holdfast.ServiceClient(base_url=url, api_key="tml-bench")
        self._client = self._service.create_lora_training_client(MODEL, rank=RANK).result()
        self._data = [
            holdfast.Datum(
                holdfast.ModelInput.from_ints(datum.tokens.tolist()),
                {name: value.tolist() for name, value in datum.inputs.items()},
            )
            for datum in make_batch(MODELS[MODEL].vocab_size).data
        ]
        self.times: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        forward = self._client.forward_backward(self._data, "cross_entropy")
        self._client.optim_step(holdfast.AdamParams(learning_rate=1e-4)).result()
        forward.result()
        self.times.append(time.perf_counter() - began)

    def close(self) -> None:
        self._service.close().result(timeout=30)


def _fsync_seconds(path: Path) -> list[float]:
    times = []
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 4096)
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return times


def _verdict(good: bool) -> str:
    return "met" if good else "MISSED"


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200, help="of each client")
    parser.add_argument("--starts", type=int, default=4, help="of a pair of servers")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if min(arguments.requests, arguments.starts, arguments.pairs) < 1:
        parser.error("--requests, --starts and --pairs must be at least 1")
    measure_latency(arguments.requests)
    measure_throughput(arguments.starts, arguments.pairs, arguments.threads)
