"""The arithmetic that heads of one to a few decoder layers share, on tensors: norms, rotary embedding, vocabularies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["rms_norm", "rotary_embedding", "rotate", "rotate_pairs", "spread_over_vocabulary"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of [..., D], its scale computed in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [1, heads, T, D], halves apart as in Llama; cos and sin are [1, T, D]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same with neighbours as pairs, as in GPT-J; cos and sin as for ``rotate``."""
    half = x.shape[-1] // 2
    cos, sin = (part[:, None, :, :half].repeat_interleave(2, dim=-1) for part in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def rotary_embedding(
    rope: Mapping[str, object], *, hidden_size: int, num_heads: int, head_dim: int, max_length: int
) -> nn.Module:
    """Cosines and sines by position, with every scaling that transformers knows.

    Args:
        rope: ``rope_parameters`` of transformers.
        hidden_size: H.
        num_heads: query heads.
        head_dim: D.
        max_length: longest text of the training.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = LlamaConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        head_dim=head_dim,
        max_position_embeddings=max_length,
        rope_parameters=dict(rope),
    )
    rotary: nn.Module = LlamaRotaryEmbedding(shape)
    return rotary


def spread_over_vocabulary(logits: Tensor, target_ids: Tensor | None, vocab_size: int) -> Tensor:
    """[..., V] float32 over the target's vocabulary; tokens that the head does not know are at -inf.

    Args:
        logits: [..., D] over the draft vocabulary.
        target_ids: [D] int64: the target's id of every draft id; None: they are the same.
        vocab_size: V.
    """
    logits = logits.float()
    if target_ids is None:
        return logits[..., :vocab_size]
    everything = logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf)
    everything[..., target_ids] = logits
    return everything
