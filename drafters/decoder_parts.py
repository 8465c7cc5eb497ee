"""The arithmetic that heads of one to a few decoder layers share, on tensors: norms, rotary embedding, vocabularies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specdec.fused_norm import can_fuse, fused_rms_norm

__all__ = ["gated", "rms_norm", "rotary_embedding", "rotate", "rotate_pairs", "spread_over_vocabulary"]

_BY_LENGTH = ("dynamic", "longrope")  # scalings that follow the length of the text


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of [..., D], its scale computed in float32."""
    if weight.dim() == 1 and weight.dtype == torch.float32 and can_fuse(x):
        return fused_rms_norm(x, weight, eps)
    wide = x.float()  # torch's own rms_norm takes several times as long for the few rows of a draft on a CPU
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``; without gradients in one tensor less, whose memory would cost more than the product."""
    opened = nn.functional.silu(gate)
    return opened * up if torch.is_grad_enabled() else opened.mul_(up)


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
    return (
        rotary if rope.get("rope_type", "default") in _BY_LENGTH else _RotaryTable(rotary, rows=min(max_length, 4096))
    )


class _RotaryTable(nn.Module):
    """Cosines and sines looked up by position: a level of a draft is so small that computing them is felt."""

    def __init__(self, rotary: nn.Module, *, rows: int) -> None:
        super().__init__()
        self._rotary, self._rows = rotary, rows
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[1, T, D] each, in the dtype of x, for positions [1, T] int64."""
        last, tables = int(positions.max()), self._tables
        if tables is None or len(tables[0]) <= last or (tables[0].dtype, tables[0].device) != (x.dtype, x.device):
            self._rows = max(self._rows, 2 * last)
            cos, sin = self._rotary(x, torch.arange(self._rows, device=x.device)[None])
            tables = self._tables = cos[0], sin[0]
        return tables[0][positions], tables[1][positions]


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
