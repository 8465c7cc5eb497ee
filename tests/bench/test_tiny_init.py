from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from specdec.bench.tiny_init import CircuitSpec, init_induction

torch.set_num_threads(1)


def small_model(mimetic: bool) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=160,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).eval()
    if mimetic:
        init_induction(model, seed=0, spec=CircuitSpec(code_dims=16))
    return model


def copy_accuracy(model: Qwen3ForCausalLM) -> float:
    """Share of tokens of a random span's second occurrence that greedy prediction gets right."""
    span = torch.randint(0, 300, (4, 60), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([span, span], dim=1)
    with torch.no_grad():
        predicted = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    return (predicted[:, 64:-1] == ids[:, 65:]).float().mean().item()


def test_the_circuit_copies_a_repeated_span_before_any_training():
    assert copy_accuracy(small_model(mimetic=True)) > 0.9


def test_a_plain_start_does_not_copy():
    assert copy_accuracy(small_model(mimetic=False)) < 0.05


def test_the_seed_decides_the_weights():
    first, second = small_model(True).state_dict(), small_model(True).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_circuit_layers_attend_sharply(layer):
    model = small_model(mimetic=True)
    attention = model.model.layers[layer].self_attn
    assert attention.q_norm.weight.min().item() > 2.0  # QK-norm caps the score at q * k * sqrt(head_dim)
