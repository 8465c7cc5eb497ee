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
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[2])
    start = 0
    for row, (num, context) in enumerate(batch.lengths):
        own = slice(start, start + num)
        slots = batch.slots[row, : context + num].long()
        k, v = (x[slots].repeat_interleave(num_groups, dim=1) for x in (keys, values))  # [n, Hq, D]
        scores = torch.einsum("thd,nhd->htn", query[own], k) * kind.scale
        if kind.softcap:
            scores = torch.tanh(scores / kind.softcap) * kind.softcap
        scores = scores.masked_fill(~_visible(batch, row, own, kind), float("-inf"))
        if sinks is not None:
            column = sinks.to(scores.dtype)[:, None, None].expand(-1, num, 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = scores.softmax(-1)[..., : context + num]
        out[own] = torch.einsum("htn,nhd->thd", weights, v)
        start += num
    return out


def _visible(batch: TreeBatch, row: int, own: slice, kind: AttentionKind) -> Tensor:
    """[T_r, context + T_r] bool."""
    num, context = batch.lengths[row]
    device = batch.positions.device
    node = torch.arange(num, device=device)
    bits = (batch.ancestors[own][:, node // 32] >> (node % 32)) & 1
    visible = torch.cat((torch.ones(num, context, dtype=torch.bool, device=device), bits.bool()), dim=1)
    positions = batch.positions[own]
    where = torch.cat((torch.arange(context, device=device) + batch.firsts[row], positions))
    if kind.window:
        visible &= where[None] > positions[:, None] - kind.window
    if kind.chunk:
        visible &= where[None] // kind.chunk == positions[:, None] // kind.chunk
    return visible
