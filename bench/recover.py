"""SIGKILL of everything to the next answered step, beside the bare import of the libraries.

A client trains on the shipped model; server and worker are killed and the server is started again.
The time runs from the kill until the step that was sent next is answered. What of it is replay is
what the run's information counts, at the median time of a step before the kill. The second series
damages the newest recovery point before each start, so that the one before it is used.

Goals: the import, three seconds and the replay; a replay of no more than the bound and the longest
operation, twice that when the newest recovery point is damaged.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import holdfast
from holdfast.cli.dates import DateTask
from holdfast.cli.server_process import ServerProcess
from holdfast.runs.publishing import REPLAY_BOUND
from holdfast.store import open_store

IMPORT = "import torch, transformers, peft"
STEPS_BETWEEN = 40
GOAL = 3.0
"""Seconds beyond the import and the replayed compute."""


@dataclass(slots=True)
class Rounds:
    """Seconds, of each round."""

    took: list[float] = field(default_factory=list)
    imports: list[float] = field(default_factory=list)
    replays: list[float] = field(default_factory=list)
    longest: float = 0.0
    """The longest step: an operation is shorter."""


class Script:
    """Trains, and asks how much was replayed."""

    def __init__(self, url: str) -> None:
        self._task = DateTask(0)
        self._service = holdfast.ServiceClient(base_url=url, api_key="tml-bench")
        self._client = self._service.create_lora_training_client(
            "holdfast-tiny", rank=16, seed=0
        ).result()
        self._rest = holdfast.RestClient(base_url=url, api_key="tml-bench")
        self._number = 0

    @property
    def run(self) -> str:
        return self._client.model_id

    def step(self) -> float:
        """The seconds it took."""
        began = time.monotonic()
        data = []
        for example in self._task.batch(self._number, 16):
            tokens, targets, weights = example.tokens()
            inputs = {"target_tokens": targets, "weights": weights}
            data.append(holdfast.Datum(holdfast.ModelInput.from_ints(tokens), inputs))
        self._client.forward_backward(data, "cross_entropy")
        self._client.optim_step(holdfast.AdamParams(learning_rate=1e-3)).result()
        self._number += 1
        return time.monotonic() - began

    def replayed(self) -> int:
        """Operations that were executed again, in all recoveries so far."""
        status = self._rest.get_training_run(self.run).result().status
        assert status is not None
        return status.replayed

    def close(self) -> None:
        self._service.close().result(timeout=30)


@contextmanager
def training(server: ServerProcess) -> Iterator[Script]:
    with server:
        script = Script(server.url)
        yield script
        script.close()


def measure(rounds: int, threads: int, *, damage: bool) -> Rounds:
    """Kill and start again that many times."""
    found = Rounds()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = ServerProcess(Path(folder), "--threads", str(threads), "--device", "cpu")
        with training(server) as script:
            for _ in range(rounds):
                began = time.monotonic()
                subprocess.run([sys.executable, "-c", IMPORT], check=True)
                found.imports.append(time.monotonic() - began)
                steps = [script.step() for _ in range(STEPS_BETWEEN)]
                found.longest = max(found.longest, *steps)
                before = script.replayed()
                workers = _children(server.pid)
                began = time.monotonic()
                for pid in workers:
                    os.kill(pid, signal.SIGKILL)
                server.kill()
                if damage:
                    _damage_newest(Path(folder) / "store", script.run)
                server.start()
                script.step()
                found.took.append(time.monotonic() - began)
                operations = script.replayed() - before
                found.replays.append(operations / 2 * statistics.median(steps))
    return found


def _damage_newest(directory: Path, run: str) -> None:
    """Flip a bit of the newest recovery point, in what the one before it does not share."""
    with open_store(directory) as store:
        newest, before = sorted((m for _, m in store.unnamed(run)), key=lambda m: -m.seq)[:2]
    shared = {blob.hash for blob in before.files.values()}
    changed = next(blob for blob in newest.files.values() if blob.hash not in shared)
    with (directory / "blobs" / changed.hash).open("r+b") as file:
        file.seek(changed.size // 2)
        byte = file.read(1)[0]
        file.seek(changed.size // 2)
        file.write(bytes([byte ^ 1]))


def report(found: Rounds, *, damage: bool) -> None:
    """Print the medians, the goals, and whether they are met."""
    total, bare, replay = map(statistics.median, (found.took, found.imports, found.replays))
    name = "newest recovery point damaged" if damage else "intact"
    print(f"{name}, {len(found.took)} rounds of {STEPS_BETWEEN} steps, medians")
    spread = f"({min(found.took):.2f} to {max(found.took):.2f})"
    print(f"  kill to the next answered step  {total:6.2f} s  {spread}")
    print(f"  bare {IMPORT:<26}  {bare:6.2f} s")
    print(f"  replayed compute                {replay:6.2f} s")
    left = total - bare - replay
    print(f"  left                            {left:6.2f} s  goal {GOAL} {_verdict(left <= GOAL)}")
    bound = (REPLAY_BOUND + found.longest) * (2 if damage else 1)
    most = max(found.replays)
    print(
        f"  longest replay                  {most:6.2f} s  goal {bound:.1f} "
        f"{_verdict(most <= bound)}"
    )


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _verdict(good: bool) -> str:
    return "met" if good else "MISSED"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(f"shipped model, {arguments.threads} threads")
    for damage in (False, True):
        report(measure(arguments.rounds, arguments.threads, damage=damage), damage=damage)
