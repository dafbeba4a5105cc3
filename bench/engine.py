"""forward_backward + optim_step: a worker process beside a bare transformers + PEFT + AdamW loop.

Interleaved pairs, same batch and threads; the median of the pairs' ratios and their spread. With
`--save-every N` also how long a step takes when a capture precedes it.

    python bench/engine.py [--model tiny|medium] [--pairs 10] [--threads 2] [--save-every 0]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from holdfast.engine.interface import AdamParams, LoraConfig, RunConfig
from holdfast.engine.payload import Array, Batch, Datum
from holdfast.engine.process import WorkerProcess

MODELS = {
    "tiny": Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    ),
    "medium": Qwen3Config(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        max_position_embeddings=1024,
    ),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
RANK, SEQUENCES, LENGTH = 32, 4, 128


class BareLoop:
    """What one would write without a service."""

    def __init__(self, directory: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(directory)
        config = PeftLoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS)
        self.model = get_peft_model(model, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.95), eps=1e-12)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> float:
        logits = self.model(input_ids=tokens).logits
        logprobs = torch.log_softmax(logits.float(), -1).gather(2, targets[..., None])[..., 0]
        loss = -(weights * logprobs).sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def make_batch(vocabulary: int) -> Batch:
    rng = np.random.default_rng(0)
    data = []
    for _ in range(SEQUENCES):
        tokens = rng.integers(0, vocabulary, LENGTH + 1)
        inputs: dict[str, Array] = {
            "target_tokens": tokens[1:].astype(np.int64),
            "weights": np.full(LENGTH, 1 / (SEQUENCES * LENGTH), np.float32),
        }
        data.append(Datum(tokens[:-1].astype(np.int32), inputs))
    return Batch(data, "cross_entropy")


async def measure(model: str, pairs: int, threads: int, save_every: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch = make_batch(MODELS[model].vocab_size)
    body = batch.encode()
    tokens = torch.from_numpy(np.stack([d.tokens for d in batch.data])).long()
    targets = torch.from_numpy(np.stack([d.inputs["target_tokens"] for d in batch.data]))
    weights = torch.from_numpy(np.stack([d.inputs["weights"] for d in batch.data]))
    params = AdamParams(grad_clip_norm=1.0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        directory = Path(folder) / "model"
        AutoModelForCausalLM.from_config(MODELS[model]).save_pretrained(directory)
        bare = BareLoop(directory)
        worker = await WorkerProcess.start(
            name=model, source=str(directory), store=Path(folder) / "store", threads=threads
        )
        await worker.create("run", RunConfig(model, LoraConfig(RANK, 1)))
        ours, theirs, after_save = [], [], []
        for pair in range(-3, pairs):
            start = time.perf_counter()
            bare.step(tokens, targets, weights)
            middle = time.perf_counter()
            saved = save_every and pair % save_every == save_every - 1
            capture = await worker.capture("run") if saved else None
            begin = time.perf_counter()
            first = asyncio.create_task(worker.forward_backward("run", pair, body))
            await asyncio.sleep(0)
            await worker.optim_step("run", params)
            await first
            end = time.perf_counter()
            if capture is not None:
                await capture.written()
                after_save.append(end - middle)
            elif pair >= 0:
                theirs.append(middle - start)
                ours.append(end - begin)
        await worker.close()
    ratios = [o / t for o, t in zip(ours, theirs, strict=True)]
    print(f"{model}, {threads} threads, {len(ratios)} pairs")
    print(f"  bare loop  {_spread(theirs)}\n  worker     {_spread(ours)}")
    print(f"  ratio      {statistics.median(ratios):.3f}   {min(ratios):.3f} to {max(ratios):.3f}")
    if after_save:
        print(f"  worker's step with a capture before it {_spread(after_save)}")


def _spread(seconds: list[float]) -> str:
    median, low, high = statistics.median(seconds), min(seconds), max(seconds)
    return f"{1e3 * median:8.1f} ms   {1e3 * low:.1f} to {1e3 * high:.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="medium")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=0)
    options = parser.parse_args()
    asyncio.run(measure(options.model, options.pairs, options.threads, options.save_every))
