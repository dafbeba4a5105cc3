"""The script that is disturbed: two tenants that accumulate, save, load and resume, unaware.

It is written for the official SDK as a user would write it: no retries, no error handling. What it
saw is returned, so that a disturbed run can be compared with an undisturbed one to the last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import tinker
from tinker import types

from tests.support.sdk import batch, service_client
from tests.support.server import ServerProcess

WAIT = 240.0
"""Seconds for any one answer: far above what a restart takes, so that a hang fails the test."""

Progress = Callable[[], None]


@dataclass(slots=True)
class Seen:
    """All that a tenant's script can see."""

    losses: list[float] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    """The step numbers that optim_step answered."""
    blobs: dict[str, str] = field(default_factory=dict)
    """Files of the checkpoints saved on the way, with the hashes of their bytes."""


class Tenant:
    """One tenant's training, deterministic in its seed."""

    def __init__(self, server: ServerProcess, seed: int, steps: int, progress: Progress) -> None:
        self._server = server
        self._seed = seed
        self._steps = steps
        self._progress = progress
        self.seen = Seen()

    def run(self, service: tinker.ServiceClient) -> Seen:
        """Train to the end; whatever goes wrong is raised."""
        client = service.create_lora_training_client(
            base_model="small-llama", rank=4 + self._seed, seed=self._seed
        ).result(timeout=WAIT)
        half = self._steps // 2
        for step in range(half):
            self._step(client, step)
            if step % 5 == 4:
                self._save(client, "latest", overwrite=True)
            if step % 11 == 10:
                self._save(client, f"step-{step}")
        path = self._save(client, "half")
        self._step(client, 1_000)  # thrown away by the load
        client.load_state_with_optimizer(path).result(timeout=WAIT)
        for step in range(half, half + half // 2):
            self._step(client, step)
        # Gradients that are not applied yet are part of the state.
        self._accumulate(client, 2_000)
        path = self._save(client, "unfinished")
        client = service.create_training_client_from_state_with_optimizer(path).result(timeout=WAIT)
        for step in range(half + half // 2, self._steps):
            self._step(client, step)
        self._save(client, "end")
        return self.seen

    def _step(self, client: tinker.TrainingClient, step: int) -> None:
        pending = [self._forward_backward(client, step)]
        if step % 3 == 0:
            pending.append(self._forward_backward(client, step + 500))
        update = client.optim_step(types.AdamParams(learning_rate=1e-3, weight_decay=0.1))
        for future in pending:
            self._note(future.result(timeout=WAIT))
        metrics = update.result(timeout=WAIT).metrics
        assert metrics is not None
        self.seen.steps.append(metrics["step"])
        self._progress()

    def _accumulate(self, client: tinker.TrainingClient, step: int) -> None:
        self._note(self._forward_backward(client, step).result(timeout=WAIT))

    def _forward_backward(
        self, client: tinker.TrainingClient, step: int
    ) -> tinker.APIFuture[types.ForwardBackwardOutput]:
        data = batch(10_000 * self._seed + step, lengths=(12, 20))
        return client.forward_backward(data, "cross_entropy")

    def _note(self, output: types.ForwardBackwardOutput) -> None:
        self.seen.losses.append(output.metrics["loss:sum"])
        self.seen.logprobs.extend(
            np.asarray(item["logprobs"].data, dtype=np.float32).tobytes()
            for item in output.loss_fn_outputs
        )

    def _save(self, client: tinker.TrainingClient, name: str, *, overwrite: bool = False) -> str:
        path = client.save_state(name, overwrite=overwrite).result(timeout=WAIT).path
        for file, blob in self._server.manifest(path).files.items():
            self.seen.blobs[f"{name}@{len(self.seen.steps)}/{file}"] = blob.hash
        return path


def run_script(server: ServerProcess, steps: int, progress: Progress) -> list[Seen]:
    """Both tenants side by side; what each of them saw."""
    lock = threading.Lock()

    def counted() -> None:
        with lock:
            progress()

    with service_client(server) as service, ThreadPoolExecutor(2) as pool:
        tenants = [Tenant(server, seed, steps, counted) for seed in (1, 2)]
        return [future.result() for future in [pool.submit(t.run, service) for t in tenants]]
