"""A training step through the official SDK and a server, beside a bare transformers + PEFT loop.

Three series, each of forward_backward + optim_step on the same batch with the same threads:

1. Pairs: a step of the bare loop, then one through the SDK. No saves.
2. Steps through the SDK alone, with a save every tenth step that the script does not wait for. The
   clock of the step that follows a save starts before the save is submitted; the step is compared
   with the median of the unsaved steps next to it, four on each side.
3. Steps through the SDK alone, while the server takes snapshots as it sees fit. The step in which
   a state was copied is compared with those next to it, likewise.

Goals: the medium model takes at most 1.10 of the bare loop; the tiny one, where the round trips are
all there is to see, at most 10 ms more; a save, or a snapshot, delays a step by at most 10 %.

    python -m bench.step [--model tiny|medium] [--pairs 20] [--saves 10] [--snapshots 5]
                         [--threads N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tinker import ServiceClient, TrainingClient, types
from transformers import AutoModelForCausalLM

import holdfast
from bench.engine import MODELS, RANK, BareLoop, make_batch
from holdfast.cli.server_process import ServerProcess
from holdfast.engine.base import suitable_threads, usable_processors
from holdfast.engine.payload import Batch

WARM_UP = 3
SAVE_EVERY = 10
MOST_STEPS = 60
"""Steps for each snapshot that is wanted, at most."""
NEIGHBOURS = 4
"""Unsaved steps on each side of one that follows a save; no two saves share one."""
RATIO_GOAL = 1.10
EXTRA_GOAL = 0.010
"""Seconds."""
SAVE_GOAL = 1.10


class SdkLoop:
    """The same training through the official SDK."""

    def __init__(self, client: TrainingClient, batch: Batch) -> None:
        self._client = client
        self._params = types.AdamParams(learning_rate=1e-4, grad_clip_norm=1.0)
        self._data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(datum.tokens.tolist()),
                loss_fn_inputs={
                    name: types.TensorData.from_numpy(value) for name, value in datum.inputs.items()
                },
            )
            for datum in batch.data
        ]

    def step(self) -> None:
        """One step, both of its operations submitted before the first is answered."""
        forward = self._client.forward_backward(self._data, "cross_entropy")
        update = self._client.optim_step(self._params)
        forward.result()
        update.result()

    def save(self, name: str) -> Callable[[], object]:
        """Submit a save; gives what waits for it."""
        return self._client.save_state(name).result


@contextmanager
def connected(url: str) -> Iterator[ServiceClient]:
    """The SDK's client, its session closed at the end."""
    os.environ |= {
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": "tml-bench",
        "TINKER_TELEMETRY": "0",
    }
    service = ServiceClient()
    try:
        yield service
    except BaseException:
        service.close("errored").result(timeout=5)
        raise
    service.close("success").result(timeout=30)


@dataclass(slots=True)
class Series:
    """Seconds of the first series, and of the second."""

    bare: list[float]
    sdk: list[float]
    with_saves: list[float]
    """Every SAVE_EVERY-th, from the index SAVE_EVERY // 2 on, follows a save."""
    with_snapshots: list[float]
    snapshots: list[int]
    """Indexes of those in which a state was copied."""


def measure(model: str, pairs: int, saves: int, snapshots: int, threads: int) -> Series:
    """Run the series for one model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch = make_batch(MODELS[model].vocab_size)
    tokens = torch.from_numpy(np.stack([d.tokens for d in batch.data])).long()
    targets = torch.from_numpy(np.stack([d.inputs["target_tokens"] for d in batch.data]))
    weights = torch.from_numpy(np.stack([d.inputs["weights"] for d in batch.data]))
    series = Series([], [], [], [], [])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        directory = Path(folder) / "model"
        AutoModelForCausalLM.from_config(MODELS[model]).save_pretrained(directory)
        bare = BareLoop(directory)
        options = ["--model", f"{model}={directory}", "--threads", str(threads), "--device", "cpu"]
        with (
            ServerProcess(Path(folder) / "data", *options) as server,
            connected(server.url) as service,
        ):
            client = service.create_lora_training_client(base_model=model, rank=RANK).result()
            ours = SdkLoop(client, batch)
            for pair in range(-WARM_UP, pairs):
                start = time.perf_counter()
                bare.step(tokens, targets, weights)
                middle = time.perf_counter()
                ours.step()
                end = time.perf_counter()
                if pair >= 0:
                    series.bare.append(middle - start)
                    series.sdk.append(end - middle)
            saving = []
            for number in range(saves * SAVE_EVERY):
                begin = time.perf_counter()
                if number % SAVE_EVERY == SAVE_EVERY // 2:
                    saving.append(ours.save(f"bench-{number}"))
                ours.step()
                series.with_saves.append(time.perf_counter() - begin)
            for wait in saving:
                wait()
            if snapshots:
                client = service.create_lora_training_client(base_model=model, rank=RANK).result()
                ours = SdkLoop(client, batch)
                series.with_snapshots, series.snapshots = _until(
                    snapshots, ours, client, server.url
                )
    return series


def _until(
    snapshots: int, ours: SdkLoop, client: TrainingClient, url: str
) -> tuple[list[float], list[int]]:
    """Seconds of steps until there were so many snapshots, and in which they were taken."""
    rest = holdfast.RestClient(base_url=url, api_key="tml-bench")
    seconds: list[float] = []
    positions: set[int] = set()
    while len(seconds) < MOST_STEPS * snapshots and (
        len(positions) < snapshots or len(seconds) <= max(positions) // 2 + NEIGHBOURS
    ):
        begin = time.perf_counter()
        ours.step()
        seconds.append(time.perf_counter() - begin)
        status = rest.get_training_run(client.model_id).result().status
        newest = None if status is None else status.snapshot
        if newest is not None and newest.position // 2 >= NEIGHBOURS and len(positions) < snapshots:
            positions.add(newest.position)
    # Step n has the numbers 2n + 1 and 2n + 2; a state is copied before the number that follows.
    taken = sorted({position // 2 for position in positions})
    return seconds, [n for n in taken if n < len(seconds) - NEIGHBOURS]


def delays(seconds: list[float], steps: Iterable[int]) -> list[float]:
    """Each of these steps over the median of the others next to it."""
    found, apart = [], set(steps)
    for step in sorted(apart):
        near = range(step - NEIGHBOURS, step + NEIGHBOURS + 1)
        others = [seconds[n] for n in near if n not in apart]
        found.append(seconds[step] / statistics.median(others))
    return found


def report(model: str, threads: int, series: Series) -> None:
    """Print the medians with their quartiles, the goals, and whether they are met."""
    ratios = [ours / bare for ours, bare in zip(series.sdk, series.bare, strict=True)]
    extra = [ours - bare for ours, bare in zip(series.sdk, series.bare, strict=True)]
    after_save = delays(
        series.with_saves, range(SAVE_EVERY // 2, len(series.with_saves), SAVE_EVERY)
    )
    with_snapshot = delays(series.with_snapshots, series.snapshots)
    ratio, difference = statistics.median(ratios), statistics.median(extra)
    print(f"{model}, {threads} threads, {len(ratios)} pairs")
    print(f"  bare loop        {_milliseconds(series.bare)}")
    print(f"  SDK and server   {_milliseconds(series.sdk)}")
    goal = f"  goal {1e3 * EXTRA_GOAL:.0f} {_verdict(difference <= EXTRA_GOAL)}"
    print(f"  difference       {_milliseconds(extra)}{goal if model == 'tiny' else ''}")
    goal = f"  goal {RATIO_GOAL:.2f} {_verdict(ratio <= RATIO_GOAL)}"
    print(f"  ratio            {_plain(ratios)}{goal if model == 'medium' else ''}")
    if after_save:
        good = _verdict(statistics.median(after_save) <= SAVE_GOAL)
        print(
            f"{model}, {threads} threads, {len(series.with_saves)} steps, {len(after_save)} saves"
        )
        print(f"  step and save    {_plain(after_save)}  goal {SAVE_GOAL:.2f} {good}")
    if with_snapshot:
        good = _verdict(statistics.median(with_snapshot) <= SAVE_GOAL)
        print(
            f"{model}, {threads} threads, {len(series.with_snapshots)} steps, "
            f"{len(with_snapshot)} snapshots"
        )
        print(f"  and a snapshot   {_plain(with_snapshot)}  goal {SAVE_GOAL:.2f} {good}")


def _verdict(good: bool) -> str:
    return "met" if good else "MISSED"


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):9.1f} ms  {_quartiles(seconds, 1e3, 1)}"


def _plain(values: list[float]) -> str:
    return f"{statistics.median(values):9.3f}     {_quartiles(values, 1, 3)}"


def _quartiles(values: list[float], scale: float, digits: int) -> str:
    if len(values) < 2:
        return ""
    low, _, high = statistics.quantiles(values, n=4)
    return f"(quartiles {scale * low:.{digits}f} to {scale * high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, help="without it, each in turn")
    parser.add_argument("--pairs", type=int, default=20, help="of the first series")
    parser.add_argument("--saves", type=int, default=10, help="of the second series")
    parser.add_argument("--snapshots", type=int, default=5, help="of the third series")
    parser.add_argument("--threads", type=int, help="without it, those that suit the model")
    args = parser.parse_args()
    if args.pairs < 1 or args.saves < 0 or args.snapshots < 0:
        parser.error("--pairs must be at least 1, --saves and --snapshots at least 0")
    for model in [args.model] if args.model else MODELS:
        threads = args.threads or suitable_threads(MODELS[model].hidden_size, usable_processors())
        series = measure(model, args.pairs, args.saves, args.snapshots, threads)
        report(model, threads, series)


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    main()
