"""Trains the base model that ships with Holdfast and writes its directory.

    scripts/train-base-model                                  # the shipped model
    scripts/train-base-model --steps 200 --out /tmp/sketch    # a quick sketch of it

The same seed, steps and thread count on the same machine and library versions give the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tools.base_model import card, corpus, tokenizer

OUT = Path(__file__).parents[2] / "src/holdfast/engine/models/holdfast-tiny"
BATCH, WINDOW = 4, 512
HELD_OUT_SEED = 1_000_003


def config() -> LlamaConfig:
    """The shape of the shipped model: 1.8 million parameters."""
    return LlamaConfig(
        vocab_size=tokenizer.VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.BOS,
        eos_token_id=tokenizer.EOS,
        pad_token_id=tokenizer.PAD,
    )


def windows(seed: int) -> Iterator[torch.Tensor]:
    """Batches of token ids, int64 [BATCH, WINDOW], cut from one stream of documents."""
    stream: list[int] = []
    size = BATCH * WINDOW
    for document in corpus.documents(seed):
        stream += [tokenizer.BOS, *document.encode(), tokenizer.EOS]
        while len(stream) >= size:
            yield torch.tensor(stream[:size]).view(BATCH, WINDOW)
            del stream[:size]


def schedule(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: warm-up over 3 % of the steps, then a cosine to 5 %."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    Muon (Keller Jordan, 2024) reaches the loss of AdamW in about a quarter of the steps here.
    """
    inside: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (inside if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(inside, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(steps: int, seed: int) -> LlamaForCausalLM:
    """A model after ``steps`` steps on `BATCH` windows of text each; prints its loss in nats."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config()).train()
    pair = optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
        for optimizer in pair
    ]
    start, seen = time.monotonic(), 0.0
    for step, tokens in zip(range(1, steps + 1), windows(seed), strict=False):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(pair, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
        seen += loss.item()
        if step % 50 == 0:
            passed = time.monotonic() - start
            print(f"step {step:5d}  loss {seen / 50:.4f}  {passed:6.0f} s", flush=True)
            seen = 0.0
    return model.eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM) -> float:
    """Mean loss per token, in nats, on ten batches of documents the training never drew."""
    batches = zip(range(10), windows(HELD_OUT_SEED), strict=False)
    losses = [float(model(input_ids=tokens, labels=tokens).loss) for _, tokens in batches]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()
    model = train(args.steps, args.seed)
    minutes = (time.monotonic() - start) / 60
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    GenerationConfig(
        bos_token_id=tokenizer.BOS, eos_token_id=tokenizer.EOS, pad_token_id=tokenizer.PAD
    ).save_pretrained(args.out)
    tokenizer.write(args.out, longest=WINDOW)
    facts = card.Facts(
        parameters=model.num_parameters(),
        window=WINDOW,
        steps=args.steps,
        seed=args.seed,
        threads=args.threads,
        tokens=args.steps * BATCH * WINDOW,
        loss=held_out_loss(model),
        minutes=minutes,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        reference_sha256=hashlib.sha256(corpus.reference().encode()).hexdigest(),
    )
    card.write(args.out, facts)
    print(f"wrote {args.out}: held-out loss {facts.loss:.4f} after {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
