"""The attentions of a group of layers that read one input, as one batched product for each of Q, K, V and O.

A group of n layers launches a fifth or so of the operations that it launches layer by layer. That pays where launching
is what costs: small draft models on a GPU without graphs. Weights are stacked, so those of the group are held twice.

Source: EasySpec (Wu et al. 2025, arXiv 2502.02493), section 3.2, for what is computed; the form for one device is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.attention import IMPLEMENTATION, go_to_call
from specdec.drafters.decoder_parts import rotate
from specdec.errors import UnsupportedError

__all__ = ["BatchedAttention"]

_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


class BatchedAttention:
    """Attentions of neighbouring layers, with their input norms.

    Args:
        layers: the decoder layers of a group.
        first: index of the first one.

    Raises:
        UnsupportedError: they are not alike, or no plain projections.
    """

    def __init__(self, layers: Sequence[nn.Module], first: int) -> None:
        blocks: Sequence[Any] = layers
        self._first, self._attentions = first, [block.self_attn for block in blocks]
        self._norms = [block.input_layernorm for block in blocks]
        for attention in self._attentions:
            if not all(type(getattr(attention, part, None)) is nn.Linear for part in _PARTS):
                raise UnsupportedError(
                    f"{type(attention).__name__} has no plain linear layers {', '.join(_PARTS)}: its layers cannot be "
                    "batched"
                )
        shapes = {tuple(getattr(one, part).weight.shape for part in _PARTS) for one in self._attentions}
        if len(shapes) > 1:
            raise UnsupportedError("layers of different shapes cannot be batched")
        self._weights = {
            part: torch.stack([self._of(one, part).weight.mT for one in self._attentions]) for part in _PARTS
        }
        self._biases = {
            part: torch.stack([self._of(one, part).bias for one in self._attentions])[:, None]
            for part in _PARTS
            if self._of(self._attentions[0], part).bias is not None
        }
        self._head_dim: int = self._attentions[0].head_dim

    @staticmethod
    def _of(attention: Any, part: str) -> nn.Linear:
        layer: nn.Linear = getattr(attention, part)
        return layer

    def __call__(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """[N, T, H]: what each attention adds, from their one input x [1, T, H]; K and V are written as usual."""
        # The norms' hooks would replace the input once more.
        normed = torch.stack([norm.forward(x)[0] for norm in self._norms])  # [N, T, H]
        query, key, value = (
            self._product(part, normed).unflatten(-1, (-1, self._head_dim)) for part in ("q_proj", "k_proj", "v_proj")
        )
        if hasattr(self._attentions[0], "q_norm"):
            query = torch.stack([one.q_norm(part) for one, part in zip(self._attentions, query, strict=True)])
            key = torch.stack([one.k_norm(part) for one, part in zip(self._attentions, key, strict=True)])
        cos, sin = position_embeddings
        query, key = rotate(query.transpose(1, 2), cos, sin), rotate(key.transpose(1, 2), cos, sin)  # [N, heads, T, D]
        value = value.transpose(1, 2)
        attend: Any = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
        outs = []
        for place, one in enumerate(self._attentions):
            go_to_call(self._first + place)
            part = slice(place, place + 1)
            outs.append(attend(one, query[part], key[part], value[part], None, scaling=one.scaling)[0])
        return self._product("o_proj", torch.cat(outs).flatten(2))

    def _product(self, part: str, x: Tensor) -> Tensor:
        if part in self._biases:
            return torch.baddbmm(self._biases[part], x, self._weights[part])
        return torch.bmm(x, self._weights[part])
