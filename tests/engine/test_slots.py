"""Which layers of which models are adapted, and what PEFT is told of them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MixtralConfig, OPTConfig

from holdfast.engine.base import quiet
from holdfast.engine.slots import Layout, find_targets
from tests.engine.helpers import CONFIGS

ATTN = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def leaves(modules: tuple[str, ...]) -> set[str]:
    return {module.rsplit(".", 1)[-1] for module in modules}


def model_of(config: Any) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_linear_layers_are_attention_mlp_or_head(kind: str) -> None:
    targets = find_targets(model_of(CONFIGS[kind]()))
    assert leaves(targets.attn) == ATTN and len(targets.attn) == 8
    assert leaves(targets.mlp) == MLP and len(targets.mlp) == 6
    assert targets.unembed == ("lm_head",)
    assert targets.others == ()
    assert targets.short(targets.attn) == sorted(ATTN)


OTHERS: dict[str, tuple[Any, set[str], set[str], str]] = {
    "gpt2": (
        GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50),
        {"c_attn", "c_proj"},
        {"c_fc", "c_proj"},
        "lm_head",
    ),
    "gpt_neox": (
        GPTNeoXConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=50,
        ),
        {"query_key_value", "dense"},
        {"dense_h_to_4h", "dense_4h_to_h"},
        "lm_head",
    ),
    "opt": (
        OPTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            ffn_dim=32,
            vocab_size=50,
            word_embed_proj_dim=16,
        ),
        {"q_proj", "k_proj", "v_proj", "out_proj"},
        {"fc1", "fc2"},
        "lm_head",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind: str) -> None:
    config, attn, mlp, head = OTHERS[kind]
    targets = find_targets(model_of(config))
    assert (leaves(targets.attn), leaves(targets.mlp)) == (attn, mlp)
    assert len(targets.attn) == 3 * len(attn) and len(targets.mlp) == 3 * len(mlp)
    assert [name.rsplit(".", 1)[-1] for name in targets.unembed] == [head]


def test_routers_of_experts_are_left_alone() -> None:
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        vocab_size=50,
    )
    targets = find_targets(model_of(config))
    assert leaves(targets.attn) == ATTN
    assert not leaves(targets.mlp) & {"gate", "router"}


def test_a_name_that_means_other_layers_too_is_written_in_full() -> None:
    """GPT-2 has a c_proj in its attention and another in its MLP."""
    targets = find_targets(model_of(OTHERS["gpt2"][0]))
    assert targets.short(targets.attn) == list(targets.attn)
    both = tuple(sorted((*targets.attn, *targets.mlp)))
    assert targets.short(both) == ["c_attn", "c_fc", "c_proj"]


def test_parameters_of_a_buffer_begin_at_64_bytes_and_do_not_overlap() -> None:
    layout = Layout(("a", "b", "c"), ((1, 3), (5, 7), (16, 1)))
    assert layout.offsets == (0, 16, 64, 80) and layout.size == 80
