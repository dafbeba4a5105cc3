"""SIGKILL of everything to the next answered step, beside the bare import of the libraries.

A client trains on the shipped model; server and worker are killed and the server is started again.
The time runs from the kill until the step that was sent next is answered.

    python -m bench.recover [--rounds 10] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import holdfast
from holdfast.cli.dates import DateTask
from holdfast.cli.server_process import ServerProcess

IMPORT = "import torch, transformers, peft"
STEPS_BETWEEN = 20
GOAL = 3.0
"""Seconds beyond the import and the replayed compute."""


def measure(rounds: int, threads: int) -> None:
    """Print the medians."""
    task = DateTask(0)
    took, imports, replayed = [], [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = ServerProcess(Path(folder), "--threads", str(threads), "--device", "cpu")
        server.start()
        service = holdfast.ServiceClient(base_url=server.url, api_key="tml-bench")
        client = service.create_lora_training_client("holdfast-tiny", rank=16, seed=0).result()

        def step(number: int) -> float:
            began = time.monotonic()
            data = []
            for example in task.batch(number, 16):
                tokens, targets, weights = example.tokens()
                inputs = {"target_tokens": targets, "weights": weights}
                data.append(holdfast.Datum(holdfast.ModelInput.from_ints(tokens), inputs))
            client.forward_backward(data, "cross_entropy")
            client.optim_step(holdfast.AdamParams(learning_rate=1e-3)).result()
            return time.monotonic() - began

        number = 0
        for _ in range(rounds):
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", IMPORT], check=True)
            imports.append(time.monotonic() - began)
            compute = 0.0
            for _ in range(STEPS_BETWEEN):
                compute += step(number)
                number += 1
            replayed.append(compute)
            workers = _children(server.pid)
            began = time.monotonic()
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            server.kill()
            server.start()
            step(number)
            number += 1
            took.append(time.monotonic() - began)
        service.close().result(timeout=30)
        server.stop()
    total, bare, replay = map(statistics.median, (took, imports, replayed))
    print(f"shipped model, {threads} threads, {rounds} rounds of {STEPS_BETWEEN} steps, medians")
    print(f"  kill to the next answered step  {total:6.2f} s  ({min(took):.2f} to {max(took):.2f})")
    print(f"  bare {IMPORT:<26}  {bare:6.2f} s")
    print(f"  compute to replay, at most      {replay:6.2f} s")
    left = total - bare - replay
    print(f"  left                            {left:6.2f} s  goal {GOAL} {_verdict(left <= GOAL)}")


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _verdict(good: bool) -> str:
    return "met" if good else "MISSED"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    measure(arguments.rounds, arguments.threads)
