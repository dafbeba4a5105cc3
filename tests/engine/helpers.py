"""Small base models, batches, and the plain PEFT + torch loop that the engine must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from holdfast.engine.base import Base, load_base, quiet
from holdfast.engine.core import Core
from holdfast.engine.interface import AdamParams, LoraConfig, RunConfig
from holdfast.engine.payload import Batch, Datum
from holdfast.engine.plan import plan

NAME = "test/small"
VOCAB = 97
BUDGET = 256

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 600,
    "attention_dropout": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**_SHAPE),
    "gemma2": lambda: Gemma2Config(
        **_SHAPE, query_pre_attn_scalar=8, sliding_window=16, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, query_pre_attn_scalar=8, sliding_window=16),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=16),
}


def save_model(kind: str, directory: Path) -> Path:
    """Write a small model with random weights."""
    torch.manual_seed(5)
    with quiet():
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
        model.save_pretrained(directory)
    return directory


def load(directory: Path, budget: int = BUDGET) -> Base:
    return load_base(NAME, str(directory), threads=1, token_budget=budget)


def run_config(
    rank: int = 8,
    *,
    seed: int = 3,
    attn: bool = True,
    mlp: bool = True,
    unembed: bool = True,
    alpha: float = 32.0,
) -> RunConfig:
    return RunConfig(NAME, LoraConfig(rank, seed, alpha, attn, mlp, unembed))


def make_batch(seed: int, lengths: tuple[int, ...] = (40, 24, 40, 13), wide: int = 0) -> Batch:
    """A cross_entropy batch with weights of both signs and zeros."""
    rng = np.random.default_rng(seed)
    data = []
    for n in lengths:
        shape = (n, wide) if wide else (n,)
        weights = rng.normal(size=shape).astype(np.float32)
        weights[rng.random(shape) < 0.2] = 0
        data.append(
            Datum(
                rng.integers(0, VOCAB, n).astype(np.int32),
                {
                    "target_tokens": rng.integers(0, VOCAB, shape).astype(np.int64),
                    "weights": weights,
                },
            )
        )
    return Batch(data, "cross_entropy")


class PlainLoop:
    """transformers + PEFT + torch.optim, as one would write it, with the engine's plan."""

    def __init__(self, directory: Path, config: RunConfig, budget: int = BUDGET) -> None:
        lora = config.lora
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(directory).eval()
            targets = [
                *(["q_proj", "k_proj", "v_proj", "o_proj"] if lora.train_attn else []),
                *(["gate_proj", "up_proj", "down_proj"] if lora.train_mlp else []),
                *(["lm_head"] if lora.train_unembed else []),
            ]
            self.model = get_peft_model(
                model,
                PeftLoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=targets),
            )
        self.budget = budget
        named = {
            name.replace(".default", ""): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.parameters = {name: named[name] for name in sorted(named)}
        self.optimizer: torch.optim.AdamW | None = None

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        assert tensors.keys() == self.parameters.keys()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def forward_backward(self, batch: Batch) -> tuple[list[Tensor], float]:
        """One operation: its micro-batches' gradients are summed, then added to those before."""
        before = {name: p.grad for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        logprobs: dict[int, Tensor] = {}
        total = 0.0
        for part in plan([len(d.tokens) for d in batch.data], self.budget):
            rows = [batch.data[i] for i in part.indices]
            tokens = torch.zeros(len(rows), part.width, dtype=torch.int64)
            for row, datum in enumerate(rows):
                tokens[row, : len(datum.tokens)] = torch.from_numpy(datum.tokens)
            logits = self.model(input_ids=tokens, use_cache=False).logits
            real = torch.cat([logits[i, :n] for i, n in enumerate(part.lengths)])
            targets = torch.cat([torch.from_numpy(d.inputs["target_tokens"]) for d in rows])
            weights = torch.cat([torch.from_numpy(d.inputs["weights"]) for d in rows])
            columns = targets.view(len(targets), -1)
            found = torch.log_softmax(real, -1).gather(1, columns).view(targets.shape)
            loss = -(weights * found).sum()
            torch.autograd.backward(loss)
            total += loss.item()
            for index, piece in zip(
                part.indices, torch.split(found, list(part.lengths)), strict=True
            ):
                logprobs[index] = piece.detach()
        for name, parameter in self.parameters.items():
            earlier = before[name]
            if earlier is not None:
                parameter.grad = earlier + parameter.grad
        return [logprobs[i] for i in range(len(batch.data))], total

    def optim_step(self, params: AdamParams) -> float:
        parameters = list(self.parameters.values())
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameters, foreach=False, fused=False)
        for group in self.optimizer.param_groups:
            group["lr"] = params.learning_rate
            group["betas"] = (params.beta1, params.beta2)
            group["eps"] = params.eps
            group["weight_decay"] = params.weight_decay
        limit = params.grad_clip_norm or float("inf")
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if params.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def named_weights(core: Core, run: str) -> dict[str, Tensor]:
    """A run's LoRA weights by PEFT's names; views."""
    state = core._runs[run]
    return dict(zip(state.layout.names, state.layout.views(state.weights), strict=True))
