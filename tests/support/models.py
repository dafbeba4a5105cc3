"""Small base models with random weights from a seed, as directories that a server can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

VOCABULARY = 512
CONTEXT = 256
"""Tokens of the longest sequence that the models take."""

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Weights large enough for the logits to depend on the input visibly.
    "initializer_range": 0.2,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, tie_word_embeddings=True),
}


def save_small_model(kind: str, directory: Path, *, seed: int = 5) -> Path:
    """Write a model of 2 layers and hidden size 64; `kind` is a key of CONFIGS."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(CONFIGS[kind]()).save_pretrained(directory)
    return directory
