"""Architectures beyond the main ones: they train, and PEFT reloads what they saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    GraniteConfig,
    MixtralConfig,
    OPTConfig,
)

from holdfast.engine.base import load_base, quiet
from holdfast.engine.core import Core
from holdfast.engine.interface import AdamParams
from holdfast.engine.payload import Batch, ForwardOutput, SampleOutput, SampleRequest
from tests.engine.helpers import BUDGET, NAME, VOCAB, make_batch, run_config

_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MODELS: dict[str, Any] = {
    # Convolutions instead of linear layers, learned positions, another name of the trunk.
    "gpt2": lambda: GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2
    ),
    # A head that cannot be run apart from the trunk.
    "opt": lambda: OPTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        vocab_size=VOCAB,
        word_embed_proj_dim=16,
    ),
    # Logits scaled after the last product.
    "cohere": lambda: CohereConfig(**_SHAPE, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**_SHAPE, logits_scaling=3.0),
    # Experts.
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=3),
}


@pytest.mark.parametrize("kind", MODELS)
def test_train_save_reload_sample(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    with quiet():
        AutoModelForCausalLM.from_config(MODELS[kind]()).save_pretrained(tmp_path)
    base = load_base(NAME, str(tmp_path), threads=1, token_budget=BUDGET)
    core = Core(base, lambda blob, what: b"", BUDGET)
    assert core._network.splits == (kind != "opt")
    core.create("run", run_config(4, mlp=kind != "mixtral"))
    losses = []
    for i in range(4):
        output = core.forward_backward("run", i, make_batch(0).encode())
        losses.append(ForwardOutput.decode(output).metrics["loss:sum"])
        core.optim_step("run", AdamParams(1e-2))
    assert losses[-1] < losses[0] - 1
    (tmp_path / "adapter").mkdir()
    for name, parts in core.copy_state("run", optimizer=False).files.items():
        (tmp_path / "adapter" / name).write_bytes(b"".join(parts))
    datum = make_batch(5).data[0]
    tokens = torch.from_numpy(datum.tokens).long()[None]
    with quiet(), torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        logprobs = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[0], -1)
    wanted = logprobs.gather(1, torch.from_numpy(datum.inputs["target_tokens"])[:, None])[:, 0]
    body = Batch([datum], "cross_entropy").encode()
    ours = ForwardOutput.decode(core.forward("run", body)).outputs[0]["logprobs"]
    assert ours.tobytes() == wanted.numpy().tobytes()

    prompt = datum.tokens[:20]
    request = SampleRequest(prompt, num_samples=2, max_tokens=5, stop=[], temperature=0.0)
    sequences = SampleOutput.decode(core.sample(None, request.encode())).sequences
    seen = prompt.tolist()
    core._slots.activate(None)
    for token, logprob in zip(sequences[0].tokens, sequences[0].logprobs, strict=True):
        with torch.no_grad():
            logits = core._network.whole(torch.tensor([seen]))[0, -1]
        full = torch.log_softmax(logits, -1)
        assert int(full.argmax()) == token
        assert abs(float(full[token]) - logprob) < 1e-5
        seen.append(int(token))
    assert np.array_equal(sequences[0].tokens, sequences[1].tokens)
