"""From a submission to its answer, durable by then, with eight clients at once, beside an fsync.

python -m bench.journal [--requests 200]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import httpx2

from holdfast.cli.server_process import ServerProcess

CLIENTS = 8
TOKENS = 512


def measure(requests: int) -> None:
    """Print the percentiles and the fsync they are compared with."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fsync = _fsync_seconds(Path(folder) / "probe")
        with ServerProcess(Path(folder) / "data", "--threads", "1", "--device", "cpu") as server:
            # Nothing is computed meanwhile: the first number is missing, and the others wait.
            clients = [_Client(server.url, requests) for _ in range(CLIENTS)]
            threads = [threading.Thread(target=client.run) for client in clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    times = sorted(t for client in clients for t in client.times)
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    goal = 2 * fsync + 0.002
    print(f"{CLIENTS} clients, {len(times)} submissions of {clients[0].size / 1024:.0f} KiB")
    print(f"  fsync of 4 KiB  {1e3 * fsync:6.2f} ms")
    print(f"  p50             {1e3 * p50:6.2f} ms   goal {1e3 * goal:.2f} {_verdict(p50 <= goal)}")
    print(
        f"  p99             {1e3 * p99:6.2f} ms   goal {5e3 * p50:.2f} {_verdict(p99 <= 5 * p50)}"
    )


class _Client:
    def __init__(self, url: str, requests: int) -> None:
        self._http = httpx2.Client(base_url=f"{url}/api/v1/", headers={"x-api-key": "tml-bench"})
        session = self._http.post("create_session", json={"tags": []}).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "holdfast-tiny"}
        self._model = self._http.post("create_model", json=body).json()["model_id"]
        self._requests = requests
        tensor = {"data": [1] * TOKENS, "dtype": "int64"}
        weights = {"data": [1.0] * TOKENS, "dtype": "float32"}
        self._input = {
            "data": [
                {
                    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1] * TOKENS}]},
                    "loss_fn_inputs": {"target_tokens": tensor, "weights": weights},
                }
            ],
            "loss_fn": "cross_entropy",
        }
        self.size = len(str(self._input))
        self.times: list[float] = []

    def run(self) -> None:
        """Submit one after the other; the first number is never sent."""
        for seq in range(2, 2 + self._requests):
            body = {"model_id": self._model, "seq_id": seq, "forward_backward_input": self._input}
            began = time.perf_counter()
            answer = self._http.post("forward_backward", json=body)
            self.times.append(time.perf_counter() - began)
            assert answer.status_code == 200, answer.text


def _fsync_seconds(path: Path) -> float:
    times = []
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 4096)
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _verdict(good: bool) -> str:
    return "met" if good else "MISSED"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    measure(parser.parse_args().requests)
