"""A thousand open runs on one worker: memory, and what it costs to come back to one.

Each run trains one step, then each again in another order, with room in the worker for a few of
them, then everything is killed and each trains a third step. All runs are alike, so that all must
see the same losses, whichever left the memory how often.

    python -m bench.open_runs [--runs 1000] [--adapter-memory 32]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import holdfast
from holdfast.cli.dates import DateTask
from holdfast.cli.server_process import ServerProcess

AT_ONCE = 8
RANK = 16


class Run:
    """One open run."""

    def __init__(self, service: holdfast.ServiceClient) -> None:
        self._client = service.create_lora_training_client(
            "holdfast-tiny", rank=RANK, seed=0
        ).result()

    def step(self, number: int) -> tuple[float, float]:
        """Train a step; its loss, and the seconds until it was answered."""
        began = time.monotonic()
        data = []
        for example in DateTask(0).batch(number, 4):
            tokens, targets, weights = example.tokens()
            inputs = {"target_tokens": targets, "weights": weights}
            data.append(holdfast.Datum(holdfast.ModelInput.from_ints(tokens), inputs))
        forward = self._client.forward_backward(data, "cross_entropy")
        self._client.optim_step(holdfast.AdamParams(learning_rate=1e-3)).result()
        return forward.result().metrics["loss:sum"], time.monotonic() - began


def measure(count: int, adapter_memory: int) -> bool:
    """Print what each round took; whether all runs saw the same losses."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ServerProcess(
            Path(folder) / "data",
            *("--adapter-memory", str(adapter_memory), "--threads", "1", "--device", "cpu"),
        ) as server,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        service = holdfast.ServiceClient(base_url=server.url, api_key="tml-bench")
        began = time.monotonic()
        runs = [Run(service)]
        runs[0].step(0)
        _print_memory(server.pid, "with one run")
        runs += pool.map(lambda _: Run(service), range(count - 1))
        print(f"{count} runs made in {time.monotonic() - began:.0f} s")
        alike = _round(pool, runs[1:], 0)
        runs[0].step(1)
        _print_memory(server.pid, f"with {count} runs")
        alike &= _round(pool, runs[1:], 1)
        _print_memory(server.pid, "when each had come back")
        began = time.monotonic()
        for pid in (*_workers(server.pid), server.pid):
            os.kill(pid, signal.SIGKILL)
        server.kill()
        started = server.start()
        print(f"killed; answered after {started:.2f} s", end="")
        runs[0].step(2)
        print(f", trained a step after {time.monotonic() - began:.2f} s")
        alike &= _round(pool, runs[1:], 2)
        _print_memory(server.pid, "when each had been recovered")
        service.close().result(timeout=120)
    return alike


def _round(pool: ThreadPoolExecutor, runs: list[Run], number: int) -> bool:
    """A step of each in random order; whether all saw the same."""
    began = time.monotonic()
    order = random.Random(number).sample(runs, len(runs))
    losses, times = zip(*pool.map(lambda run: run.step(number), order), strict=True)
    total = time.monotonic() - began
    different = len(set(losses)) - 1
    print(
        f"step {number} of each, {AT_ONCE} at once: {1e3 * total / len(runs):.0f} ms a run; "
        f"median {1e3 * statistics.median(times):.0f} ms, longest {1e3 * max(times):.0f} ms; "
        + ("all alike" if not different else f"{different} OTHER LOSSES")
    )
    return not different


def _workers(server: int) -> list[int]:
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return [int(pid) for pid in children]


def _print_memory(server: int, when: str) -> None:
    sizes = [_resident(pid) for pid in (server, *_workers(server))]
    print(f"  {when}: server {sizes[0]:.0f} MiB, worker {sum(sizes[1:]):.0f} MiB")


def _resident(pid: int) -> float:
    """MiB of a process that are in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--adapter-memory", type=int, default=32, help="of the worker, in MiB")
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error("--runs must be at least 2")
    raise SystemExit(0 if measure(arguments.runs, arguments.adapter_memory) else 1)
