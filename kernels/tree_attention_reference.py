"""Tree attention in plain torch operations, request by request: what the kernel must agree with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.kernels.tree_batch import TreeBatch

if TYPE_CHECKING:
    from specdec.kernels.tree_attention import AttentionKind

__all__ = ["tree_attention_reference"]


def tree_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, batch: TreeBatch, kind: AttentionKind, sinks: Tensor | None = None
) -> Tensor:
    """[T, Hq, Dv] in the dtype of the arguments, float64 included; see ``tree_attention`` for the arguments."""
    num_groups = query.shape[1] // keys.shape[1]
    out = query.new_zeros(query.shape[0], query.shape[1], values.shape[2])
    start = first_key = 0
    for request, (num, num_keys, first, context) in enumerate(batch.sizes()):
        if num:
            own = slice(start, start + num)
            slots = batch.slots[int(batch.rows[request]), first : context + num_keys].long()
            k, v = (x[slots].repeat_interleave(num_groups, dim=1) for x in (keys, values))  # [n, Hq, D]
            scores = torch.einsum("thd,nhd->htn", query[own], k) * kind.scale
            if kind.softcap:
                scores = torch.tanh(scores / kind.softcap) * kind.softcap
            positions = batch.positions[first_key : first_key + num_keys]
            visible = _visible(batch.ancestors[own], positions, torch.arange(first, context).to(positions), kind)
            scores = scores.masked_fill(~visible, float("-inf"))
            if sinks is not None:
                column = sinks.to(scores.dtype)[:, None, None].expand(-1, num, 1)
                scores = torch.cat((scores, column), dim=-1)
            weights = scores.softmax(-1)[..., : len(slots)]
            out[own] = torch.einsum("htn,nhd->thd", weights, v)
        start, first_key = start + num, first_key + num_keys
    return out


def _visible(words: Tensor, positions: Tensor, context: Tensor, kind: AttentionKind) -> Tensor:
    """[T_r, n] bool from ancestor words [T_r, W], positions of the tree keys [K_r] and of the cached keys."""
    node = torch.arange(len(positions), device=words.device)
    bits = (words[:, node // 32] >> (node % 32)) & 1
    visible = torch.cat((torch.ones(len(words), len(context), dtype=torch.bool, device=words.device), bits.bool()), 1)
    own = positions[len(positions) - len(words) :]
    where = torch.cat((context, positions))
    if kind.window:
        visible &= where[None] > own[:, None] - kind.window
    if kind.chunk:
        visible &= where[None] // kind.chunk == own[:, None] // kind.chunk
    return visible
