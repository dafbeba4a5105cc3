"""A training step through the official SDK and a server, beside a bare transformers + PEFT loop.

Interleaved pairs of forward_backward + optim_step: the same batch, the same threads, one run. The
second series saves a checkpoint every tenth step and shows what that costs the step after it.

    python -m bench.step [--model tiny|medium] [--pairs 20] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tinker import ServiceClient, types
from transformers import AutoModelForCausalLM

from bench.engine import MODELS, RANK, BareLoop, make_batch
from holdfast.cli.server_process import ServerProcess
from holdfast.engine.payload import Batch

WARM_UP = 3
SAVE_EVERY = 10


def sdk_step(url: str, model: str, batch: Batch) -> tuple[Callable[[], float], Callable[[], str]]:
    """A training step and a save through the official SDK."""
    os.environ |= {
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": "tml-bench",
        "TINKER_TELEMETRY": "0",
    }
    client = ServiceClient().create_lora_training_client(base_model=model, rank=RANK).result()
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(datum.tokens.tolist()),
            loss_fn_inputs={
                name: types.TensorData.from_numpy(value) for name, value in datum.inputs.items()
            },
        )
        for datum in batch.data
    ]
    params = types.AdamParams(learning_rate=1e-4, grad_clip_norm=1.0)
    saved = iter(range(1 << 30))

    def step() -> float:
        forward = client.forward_backward(data, "cross_entropy")
        update = client.optim_step(params)
        loss = forward.result().metrics["loss:sum"]
        update.result()
        return float(loss)

    def save() -> str:
        client.save_state(f"bench-{next(saved)}")  # not waited for: the training goes on
        return "saving"

    return step, save


def measure(name: str, pairs: int, threads: int) -> None:
    """Print both series for one model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch = make_batch(MODELS[name].vocab_size)
    tokens = torch.from_numpy(np.stack([d.tokens for d in batch.data])).long()
    targets = torch.from_numpy(np.stack([d.inputs["target_tokens"] for d in batch.data]))
    weights = torch.from_numpy(np.stack([d.inputs["weights"] for d in batch.data]))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(directory)
        bare = BareLoop(directory)
        options = ["--model", f"{name}={directory}", "--threads", str(threads), "--device", "cpu"]
        with ServerProcess(Path(folder) / "data", *options) as server:
            step, save = sdk_step(server.url, name, batch)
            theirs, ours, after_save = [], [], []
            total = pairs + pairs // SAVE_EVERY
            for pair in range(-WARM_UP, 2 * total):
                saving = pair >= total and pair % SAVE_EVERY == 0
                start = time.perf_counter()
                bare.step(tokens, targets, weights)
                middle = time.perf_counter()
                if saving:
                    save()
                begin = time.perf_counter()
                step()
                end = time.perf_counter()
                if pair < 0:
                    continue
                if saving:
                    after_save.append((end - begin) / (middle - start))
                else:
                    theirs.append(middle - start)
                    ours.append(end - begin)
    ratios = [o / t for o, t in zip(ours, theirs, strict=True)]
    extra = [o - t for o, t in zip(ours, theirs, strict=True)]
    print(f"{name}, {threads} threads, {len(ratios)} pairs")
    print(f"  bare loop        {_milliseconds(theirs)}")
    print(f"  SDK and server   {_milliseconds(ours)}")
    print(f"  difference       {_milliseconds(extra)}")
    print(f"  ratio            {_plain(ratios)}")
    print(f"  step with a save {_plain(after_save)}   as a ratio, {len(after_save)} saves")


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):9.1f} ms  {_quartiles(seconds, 1e3, 1)}"


def _plain(values: list[float]) -> str:
    return f"{statistics.median(values):9.3f}     {_quartiles(values, 1, 3)}"


def _quartiles(values: list[float], scale: float, digits: int) -> str:
    if len(values) < 2:
        return ""
    low, _, high = statistics.quantiles(values, n=4)
    return f"(quartiles {scale * low:.{digits}f} to {scale * high:.{digits}f})"


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="medium")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    measure(arguments.model, arguments.pairs, arguments.threads)
