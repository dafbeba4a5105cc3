"""Training through the official SDK: batches from a seed, and all that a training shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.support.models import VOCABULARY
from tests.support.server import ServerProcess

API_KEY = "tml-test"

ADAM = types.AdamParams(learning_rate=5e-3, weight_decay=0.1, grad_clip_norm=0.5)
"""With weight decay and a clipping that bites, so that both are part of every comparison."""

WAIT = 100.0
"""Seconds for any result: far more than one takes, also on a machine that is busy otherwise."""

PROBE = 1000
"""The seed of the batch that traces end with."""


@contextmanager
def sdk_environment(
    server: ServerProcess, *, telemetry: bool = False
) -> Iterator[pytest.MonkeyPatch]:
    """The environment of a user of the SDK: address and key, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_BASE_URL", server.url)
        patch.setenv("TINKER_API_KEY", API_KEY)
        patch.setenv("TINKER_TELEMETRY", "1" if telemetry else "0")
        yield patch


@contextmanager
def service_client(
    server: ServerProcess, *, telemetry: bool = False
) -> Iterator[tinker.ServiceClient]:
    """A ServiceClient that ends its session as a user's script would."""
    with sdk_environment(server, telemetry=telemetry), tinker.ServiceClient() as client:
        yield client


def datum(tokens: Sequence[int], weights: Sequence[float] | None = None) -> types.Datum:
    """Predict each token from those before it; `weights` is one for each prediction."""
    return raw_datum(
        tokens[:-1],
        target_tokens=list(tokens[1:]),
        weights=[1.0] * (len(tokens) - 1) if weights is None else list(weights),
    )


def raw_datum(tokens: Sequence[int], **loss_fn_inputs: Any) -> types.Datum:
    """A datum of any inputs, as a user writes it: the SDK makes tensors of lists."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs=loss_fn_inputs
    )


def batch(seed: int, lengths: Sequence[int] = (24, 16, 31)) -> list[types.Datum]:
    """Random sequences with real weights; equal seeds give equal batches."""
    rng = np.random.default_rng(seed)
    return [
        datum(
            [int(t) for t in rng.integers(3, min(VOCABULARY, 250), n + 1)],
            [float(w) for w in rng.normal(1, 0.5, n).astype(np.float32)],
        )
        for n in lengths
    ]


@dataclass(frozen=True)
class Trace:
    """Everything that a stretch of training shows. Equal traces are equal to the last bit."""

    losses: tuple[float, ...]
    logprobs: tuple[bytes, ...]
    """Of every datum of every step and of the probe at the end, float32."""
    blobs: tuple[tuple[str, str], ...]
    """Files of a checkpoint saved at the end, with the hashes of their bytes."""

    @property
    def files(self) -> dict[str, str]:
        return dict(self.blobs)


def step(
    client: tinker.TrainingClient, seed: int, adam: types.AdamParams = ADAM
) -> types.ForwardBackwardOutput:
    """One forward_backward and optim_step, sent without waiting in between."""
    gradients = client.forward_backward(batch(seed), "cross_entropy")
    applied = client.optim_step(adam)
    output = gradients.result(timeout=WAIT)
    applied.result(timeout=WAIT)
    return output


def trace(
    server: ServerProcess,
    client: tinker.TrainingClient,
    steps: Sequence[int],
    *,
    adam: types.AdamParams = ADAM,
    name: str = "end",
    finish_step: bool = False,
) -> Trace:
    """Train a step on the batch of each seed, probe, save, and note all that can be seen.

    With `finish_step` the first thing is an optim_step, for gradients that are there already.
    """
    losses: list[float] = []
    logprobs: list[bytes] = []

    def note(output: types.ForwardBackwardOutput) -> None:
        losses.append(output.metrics["loss:sum"])
        logprobs.extend(
            np.asarray(item["logprobs"].data, dtype=np.float32).tobytes()
            for item in output.loss_fn_outputs
        )

    if finish_step:
        client.optim_step(adam).result(timeout=WAIT)
    for seed in steps:
        note(step(client, seed, adam))
    note(client.forward(batch(PROBE), "cross_entropy").result(timeout=WAIT))
    saved = client.save_state(name).result(timeout=WAIT)
    files = server.manifest(saved.path).files
    return Trace(
        tuple(losses),
        tuple(logprobs),
        tuple(sorted((file, blob.hash) for file, blob in files.items())),
    )
