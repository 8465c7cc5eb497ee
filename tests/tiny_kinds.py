"""Tiny random models, byte by byte as ``tiny_models.tiny_llama``, that take other paths than a Llama."""

from __future__ import annotations

from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

__all__ = ["headless_model", "hybrid_model", "sliding_model"]


def sliding_model() -> Gemma3ForCausalLM:
    """Two layers with a window of 8 tokens and two without."""
    config = Gemma3TextConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=8, sliding_window_pattern=2,
        eos_token_id=256, pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def hybrid_model() -> Qwen3NextForCausalLM:
    """Three recurrent layers and one of attention."""
    config = Qwen3NextConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        num_experts_per_tok=2, num_experts=4, max_position_embeddings=512, eos_token_id=256,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config).eval()


def headless_model() -> BertModel:
    """An encoder that generates nothing."""
    config = BertConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )  # fmt: skip
    return BertModel(config).eval()
