"""Attention of a ragged batch of token trees over the KV pool, behind transformers' attention interface.

The batch is one flat row of query tokens: for every request its uncached committed tokens, then its tree. A query sees
its context and its own ancestors. What changes from step to step travels in a ``ContextVar`` that is set around the
forward, because not every model hands keyword arguments down to its attention calls. Calls are told apart by their
ordinal within the forward: some models run one module several times, and ``layer_idx`` then lies.

Source: SpecInfer (arXiv 2305.09781) for the tree mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from specdec.errors import InternalError
from specdec.kv_cache import GroupKey, KVGroup, KVPool
from specdec.types import IntArray

__all__ = ["IMPLEMENTATION", "QueryLayout", "StepAttention", "TailMasks", "active"]

IMPLEMENTATION = "specdec_tree"
# From this many query tokens on, heads stay apart and the mask is shared: packed rows would repeat it per head.
_MAX_PACKED_TOKENS = 32


@dataclass(frozen=True, slots=True, eq=False)
class QueryLayout:
    """One request's query tokens within the flat row of a step.

    Args:
        request_id: whose tokens.
        start: index of the first in the flat row.
        num_tokens: how many.
        num_cached: context length; the position of the first query token.
        parents: [num_tokens] int32 within the chunk; -1: hangs on the context.
        depths: [num_tokens] int32; position = num_cached + depth.
        is_chain: no branches.
    """

    request_id: str
    start: int
    num_tokens: int
    num_cached: int
    parents: IntArray
    depths: IntArray
    is_chain: bool

    def ancestor_mask(self) -> npt.NDArray[np.bool_]:
        """[num_tokens, num_tokens] bool: (i, j) is True if j is i or an ancestor of i."""
        if self.is_chain:
            return np.tri(self.num_tokens, dtype=np.bool_)
        mask = np.eye(self.num_tokens, dtype=np.bool_)
        for node in range(self.num_tokens):
            if self.parents[node] >= 0:
                mask[node] |= mask[self.parents[node]]
        return mask


class TailMasks:
    """Additive masks that are zero but for the last columns, kept between steps so that a context costs nothing.

    Row block r belongs to the r-th request of a batch. Everything left of the tree's columns stays zero, so a mask for
    any context length is a view that ends at the buffer's right edge.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}
        self._dirty: dict[int, int] = {}

    def view(self, row: int, ancestors: torch.Tensor, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, num_keys] additive mask for ``ancestors`` [rows, T] bool over context and tree; valid until reuse."""
        rows, width = ancestors.shape
        buffer = self._buffers.get(row)
        if buffer is None or buffer.shape[0] < rows or buffer.shape[1] < num_keys or buffer.dtype != dtype:
            shape = (1 << (rows - 1).bit_length(), 1 << (num_keys - 1).bit_length())
            buffer = self._buffers[row] = torch.zeros(shape, dtype=dtype, device=ancestors.device)
            self._dirty[row] = 0
        edge = buffer.shape[1]
        buffer[:, edge - max(self._dirty[row], width) :] = 0
        buffer[:rows, edge - width :].masked_fill_(~ancestors, float("-inf"))
        self._dirty[row] = width
        return buffer[:rows, edge - num_keys :]


class _Keys:
    """Where one request's keys of one group lie, and which of them each query sees."""

    __slots__ = ("index", "mask", "packed", "start", "stop")

    def __init__(
        self, start: int, stop: int, index: torch.Tensor | None, mask: torch.Tensor | None, packed: bool
    ) -> None:
        self.start, self.stop = start, stop
        self.index = index  # slots, where they are not one run
        self.mask = mask  # additive; [G * T, n] if packed else [T, n]; None: all visible
        self.packed = packed

    def of(self, storage: torch.Tensor) -> torch.Tensor:
        """[n, Hkv, D] rows of a call's storage."""
        return storage[self.start : self.stop] if self.index is None else storage[self.index]


class StepAttention:
    """Attention of one step: writes the new K/V into the pool and attends, call by call.

    Args:
        pool: the KV pool; every layout's query tokens have reserved slots in it.
        layouts: the requests of the step, in flat order.
        num_query_groups: query heads per KV head of each call.
        masks: buffers that live as long as the target.
    """

    def __init__(
        self,
        pool: KVPool,
        layouts: Sequence[QueryLayout],
        num_query_groups: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        masks: dict[tuple[GroupKey, int], TailMasks],
    ) -> None:
        self.pool = pool
        self.layouts = layouts
        self.num_query_groups = num_query_groups
        self.dtype, self.device = dtype, device
        self.masks = masks
        self.num_calls = 0
        self._keys: dict[tuple[GroupKey, int], list[_Keys]] = {}
        self._slots: dict[GroupKey, torch.Tensor | slice] = {}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the next call of the forward.

        Args:
            query: [1, Hq, T, Dk] of the whole flat row, roped.
            key: [1, Hkv, T, Dk].
            value: [1, Hkv, T, Dv].
            scaling: factor of the scores; None: Dk ** -0.5.
            softcap: scores become ``softcap * tanh(scores / softcap)``; None: off.
            sinks: [Hq] extra logit of each head, without a value; None: none.

        Returns:
            [1, T, Hq, Dv].
        """
        ordinal = self.num_calls
        self.num_calls += 1
        group_key = self.pool.group_of_call[ordinal]
        group = self.pool.groups[group_key]
        keys, values = group.keys[ordinal], group.values[ordinal]
        slots = self._slots_of(group)
        keys[slots] = key[0].transpose(0, 1)
        values[slots] = value[0].transpose(0, 1)
        per_kv = self.num_query_groups[ordinal]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for layout, where in zip(self.layouts, self._keys_of(group, per_kv), strict=True):
            rows = slice(layout.start, layout.start + layout.num_tokens)
            q = query[0, :, rows].unflatten(0, (key.shape[1], per_kv))  # [Hkv, G, T, Dk]
            k, v = where.of(keys).transpose(0, 1), where.of(values).transpose(0, 1)  # [Hkv, n, D]
            if softcap is None and sinks is None:
                result = _attend_plain(q, k, v, where, scale)
            else:
                result = _attend_special(q, k, v, where, scale, softcap, sinks)
            out[0, rows] = result.flatten(0, 1).transpose(0, 1)
        return out

    def _slots_of(self, group: KVGroup) -> torch.Tensor | slice:
        slots = self._slots.get(group.key)
        if slots is None:
            tables = [group.tables[layout.request_id] for layout in self.layouts]
            if len(tables) == 1 and tables[0].is_run:
                start = tables[0].base + tables[0].num_cached
                slots = slice(start, start + tables[0].num_reserved)
            else:
                new = [t.slots[t.num_cached : len(t)] for t in tables]
                slots = torch.from_numpy(np.concatenate(new).astype(np.int64)).to(self.device)
            self._slots[group.key] = slots
        return slots

    def _keys_of(self, group: KVGroup, per_kv: int) -> list[_Keys]:
        found = self._keys.get((group.key, per_kv))
        if found is None:
            buffers = self.masks.setdefault((group.key, per_kv), TailMasks())
            found = [self._locate(group, layout, per_kv, row, buffers) for row, layout in enumerate(self.layouts)]
            self._keys[group.key, per_kv] = found
        return found

    def _locate(self, group: KVGroup, layout: QueryLayout, per_kv: int, row: int, buffers: TailMasks) -> _Keys:
        table = group.tables[layout.request_id]
        num_keys = len(table)
        index = None
        if not table.is_run:
            index = torch.from_numpy(table.slots[:num_keys].astype(np.int64)).to(self.device)
        packed = layout.num_tokens <= _MAX_PACKED_TOKENS
        mask = None
        if layout.num_tokens > 1:
            visible = self._visible(group, layout, table.first)
            shown = torch.from_numpy(visible).to(self.device)
            if packed and per_kv > 1:
                shown = shown.repeat(per_kv, 1)
            mask = buffers.view(row, shown, num_keys, self.dtype)
        return _Keys(table.base, table.base + num_keys, index, mask, packed)

    @staticmethod
    def _visible(group: KVGroup, layout: QueryLayout, first: int) -> npt.NDArray[np.bool_]:
        """[T, w] bool for the last w keys: the tree's own columns, and the context's too where the mask forgets."""
        ancestors = layout.ancestor_mask()
        kind, size = group.key
        if kind == "full":
            return ancestors
        context = np.arange(first, layout.num_cached, dtype=np.int32)
        position = layout.num_cached + layout.depths
        key_position = np.concatenate((context, position))
        see = np.concatenate((np.ones((len(position), len(context)), np.bool_), ancestors), axis=1)
        if kind == "sliding":
            see &= key_position > position[:, None] - size
        else:
            see &= key_position // size == position[:, None] // size
        return see


def _attend_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: _Keys, scale: float) -> torch.Tensor:
    """[Hkv, G, T, Dv] from q [Hkv, G, T, Dk], k [Hkv, n, Dk], v [Hkv, n, Dv]."""
    if where.packed:  # the heads of one KV group become rows of one matrix product
        out = scaled_dot_product_attention(q.flatten(1, 2)[None], k[None], v[None], attn_mask=where.mask, scale=scale)
        return out[0].reshape(*q.shape[:3], -1)
    per_kv = q.shape[1]
    k, v = (x[:, None].expand(-1, per_kv, -1, -1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=where.mask, scale=scale)


def _attend_special(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    where: _Keys,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The same with soft-capped scores and attention sinks, which torch's fused attention does not know."""
    num_kv_heads, per_kv, num_tokens, _ = q.shape
    scores = torch.matmul(q, k[:, None].transpose(2, 3)) * scale  # [Hkv, G, T, n]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if where.mask is not None:
        mask = where.mask.unflatten(0, (per_kv, num_tokens)) if where.packed else where.mask
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(num_kv_heads, per_kv, 1, 1).expand(-1, -1, num_tokens, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights, v[:, None])


_STEP: ContextVar[StepAttention | None] = ContextVar("specdec_step", default=None)


@contextmanager
def active(step: StepAttention) -> Iterator[None]:
    """Make ``step`` the one that attention calls of this context use."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    step = _STEP.get()
    if step is None:
        raise InternalError(f"attention implementation {IMPLEMENTATION!r} was called outside a step of the engine")
    return step.attend(query, key, value, scaling, softcap, s_aux), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
