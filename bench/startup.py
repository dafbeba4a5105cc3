"""How long a server takes to start: until it answers, and until a first step is done.

Each round starts `holdfast serve` on an empty data directory and measures, from the start of the
process, the first answer of healthz, the creation of a client of the shipped model through the
official SDK, and its first forward_backward and optim_step. The client's own imports are done
before. The processor time of the server's own process until it answers is shown too: unlike the
others it hardly depends on what else the machine is doing.

    python bench/startup.py [--rounds 5] [--threads 0]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
import tinker
from tinker import types

MODEL = "holdfast-tiny"
GOALS = {"healthz": 1.5, "healthz, CPU": None, "created": None, "first step": 10.0}
"""Seconds."""


@dataclass(frozen=True)
class Round:
    """Seconds from the start of the process."""

    healthz: float
    healthz_cpu: float
    """Processor time, not time of the clock."""
    created: float
    stepped: float


def measure(directory: Path, threads: int) -> Round:
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    os.environ.update(TINKER_BASE_URL=url, TINKER_API_KEY="tml-local", TINKER_TELEMETRY="0")
    command = [
        str(Path(sys.executable).with_name("holdfast")),
        "serve",
        f"--data-dir={directory / 'data'}",
        f"--port={port}",
        f"--threads={threads}",
        "--device=cpu",
    ]
    with (directory / "server.log").open("wb") as log:
        started = time.monotonic()
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(f"{url}/healthz", server)
        healthz = time.monotonic() - started
        healthz_cpu = _cpu_seconds(server.pid)
        service = tinker.ServiceClient()
        client = service.create_lora_training_client(MODEL, rank=8, seed=1).result(timeout=120)
        created = time.monotonic() - started
        gradients = client.forward_backward([_datum()], "cross_entropy")
        applied = client.optim_step(types.AdamParams(learning_rate=1e-4))
        gradients.result(timeout=120)
        applied.result(timeout=120)
        stepped = time.monotonic() - started
        service.close("success").result(timeout=30)
        return Round(healthz, healthz_cpu, created, stepped)
    finally:
        server.terminate()
        server.wait(60)


def _datum() -> types.Datum:
    text = list(b"The quick brown fox jumps over the lazy dog.")
    inputs: dict[str, list[int] | list[float]] = {
        "target_tokens": text[1:],
        "weights": [1.0] * (len(text) - 1),
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(text[:-1]),
        loss_fn_inputs=inputs,  # type: ignore[arg-type]
    )


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    with httpx2.Client(timeout=5) as http:
        while True:
            if server.poll() is not None:
                raise SystemExit(f"the server ended with status {server.returncode}")
            try:
                if http.get(url).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.01)


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, without its children's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    args = parser.parse_args()
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as directory:
            rounds.append(measure(Path(directory), args.threads))
    series = {
        "healthz": [r.healthz for r in rounds],
        "healthz, CPU": [r.healthz_cpu for r in rounds],
        "created": [r.created for r in rounds],
        "first step": [r.stepped for r in rounds],
    }
    print(f"{'seconds from start':<20}{'median':>8}{'min':>8}{'max':>8}{'goal':>8}")
    for name, values in series.items():
        goal = GOALS[name]
        print(
            f"{name:<20}{statistics.median(values):>8.2f}{min(values):>8.2f}{max(values):>8.2f}"
            + ("" if goal is None else f"{goal:>8.1f}")
        )
    print(f"{args.rounds} rounds, load average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
