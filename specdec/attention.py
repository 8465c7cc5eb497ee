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
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from specdec.errors import InternalError
from specdec.kv_cache import GroupKey, KVGroup, KVPool
from specdec.query_layout import QueryLayout
from specdec.strict_attention import StrictKeys
from specdec.types import IntArray

__all__ = ["IMPLEMENTATION", "AttentionStep", "StepAttention", "TailMasks", "active", "go_to_call"]

IMPLEMENTATION = "specdec_tree"
# From this many query tokens on, heads stay apart and the mask is shared: packed rows would repeat it per head.
_MAX_PACKED_TOKENS = 32
# Masks up to this many rows (a packed tree) are kept between steps; at 16k keys in float32 one takes at most 16 MiB.
_MAX_KEPT_ROWS = 256


class AttentionStep(Protocol):
    """Computes the attention calls of one forward, told apart by their ordinal."""

    num_calls: int  # of the calls so far; the next one is that of this ordinal

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See ``StepAttention.attend``."""


class TailMasks:
    """Additive masks that are zero but for a few columns, kept between steps so that a context costs nothing.

    Row block r belongs to the r-th request of a batch. Columns that nobody writes stay zero, so a mask for any context
    length is a view that ends at the buffer's right edge. Large masks (prompt chunks) are made afresh: they are rare,
    and keeping one for every row would cost more memory than the KV.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}
        self._dirty: dict[int, list[torch.Tensor]] = {}  # what the last mask wrote

    def view(
        self,
        row: int,
        num_keys: int,
        tail: torch.Tensor,
        head: torch.Tensor | None,
        *,
        repeats: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """An additive mask over context and tree; valid until the row is asked for again.

        Args:
            row: place of the request in the batch.
            num_keys: n: context and query tokens.
            tail: [T, E + T] bool, True = hidden: the last keys.
            head: [T, h] bool, True = hidden: the first keys, or None.
            repeats: the rows of ``tail`` and ``head`` are repeated so many times, one block after the other.
            dtype: of the mask.

        Returns:
            [repeats * T, num_keys].
        """
        num_tokens = tail.shape[0]
        rows = repeats * num_tokens
        if rows > _MAX_KEPT_ROWS:
            mask = torch.zeros(rows, num_keys, dtype=dtype, device=tail.device)
        else:
            buffer = self._buffers.get(row)
            if buffer is None or buffer.shape[0] < rows or buffer.shape[1] < num_keys or buffer.dtype != dtype:
                shape = (1 << (rows - 1).bit_length(), 1 << (num_keys - 1).bit_length())
                buffer = self._buffers[row] = torch.zeros(shape, dtype=dtype, device=tail.device)
                self._dirty[row] = []
            for region in self._dirty[row]:
                region.zero_()
            mask = buffer[:rows, buffer.shape[1] - num_keys :]
        blocks = mask.unflatten(0, (repeats, num_tokens))
        regions = [blocks[..., num_keys - tail.shape[1] :].masked_fill_(tail, float("-inf"))]
        if head is not None:
            regions.append(blocks[..., : head.shape[1]].masked_fill_(head, float("-inf")))
        if rows <= _MAX_KEPT_ROWS:
            self._dirty[row] = regions
        return mask


@dataclass(frozen=True, slots=True, eq=False)
class _Keys:
    """Where one request's keys of one group lie, and which of them each query sees."""

    where: slice | torch.Tensor  # slots
    mask: torch.Tensor | None  # additive; [G * T, n] if packed else [T, n]; None: all visible
    packed: bool


class StepAttention:
    """Attention of one step: writes the new K/V into the pool and attends, call by call.

    Args:
        pool: the KV pool; every layout's query tokens have reserved slots in it.
        layouts: the requests of the step, in flat order.
        num_query_groups: query heads per KV head of each call.
        masks: buffers that live as long as the target, by (mask group, query heads per KV head).
        is_strict: every query's result has the same bits, whatever else is in the step (CPU only).
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
        is_strict: bool = False,
    ) -> None:
        self.pool = pool
        self.is_strict = is_strict
        self.layouts = layouts
        self.num_query_groups = num_query_groups
        self.dtype, self.device = dtype, device
        self.num_calls = 0
        self._slots = {key: self._slots_of(group) for key, group in pool.groups.items()}
        self._keys = {
            (key, per_kv): self._keys_of(pool.groups[key], per_kv, masks.setdefault((key, per_kv), TailMasks()))
            for key, per_kv in dict.fromkeys(zip(pool.group_of_call, num_query_groups, strict=True))
        }

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One attention call of the forward.

        Args:
            query: [1, Hq, T, Dk].
            key: [1, Hkv, T, Dk].
            value: [1, Hkv, T, Dv].
            scaling: factor on the scores; None = Dk ** -0.5.
            softcap: c of c * tanh(scores / c).
            sinks: [Hq] logits that take part in the softmax and carry no value.

        Returns:
            [1, T, Hq, Dv].

        Raises:
            InternalError: the forward makes more calls than the probe saw.
        """
        ordinal = self.num_calls
        self.num_calls += 1
        if ordinal >= len(self.num_query_groups):
            raise InternalError(f"the forward makes more than the {ordinal} attention calls that the probe saw")
        group_key, per_kv = self.pool.group_of_call[ordinal], self.num_query_groups[ordinal]
        group = self.pool.groups[group_key]
        keys, values = group.keys[ordinal], group.values[ordinal]
        slots = self._slots[group_key]
        _put(keys, slots, key[0].transpose(0, 1))
        _put(values, slots, value[0].transpose(0, 1))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        num_query_heads, num_tokens = query.shape[1:3]
        heads = query.view(key.shape[1], per_kv, num_tokens, -1)  # [Hkv, G, T, Dk]
        results = []
        for layout, seen in zip(self.layouts, self._keys[group_key, per_kv], strict=True):
            q = heads if len(self.layouts) == 1 else heads.narrow(2, layout.start, layout.num_tokens)
            if isinstance(seen, StrictKeys):
                result = seen.attend(q, keys, values, scale)
            else:
                k, v = _get(keys, seen.where).transpose(0, 1), _get(values, seen.where).transpose(0, 1)  # [Hkv, n, D]
                if softcap is None and sinks is None:
                    result = _attend_plain(q, k, v, seen, scale)
                else:
                    result = _attend_special(q, k, v, seen, scale, softcap, sinks)
            results.append(result.reshape(num_query_heads, layout.num_tokens, -1).transpose(0, 1))
        return (results[0] if len(results) == 1 else torch.cat(results))[None]

    def keep_rows(self, rows: npt.NDArray[np.int64]) -> None:
        """Go on with some query tokens only, [K] ascending indices in the flat row; at least one of each request.

        K/V of the others is missing from here on, so no kept row may see a dropped one. Not for strict attention.
        """
        index = torch.from_numpy(rows).to(self.device)
        for key, slots in self._slots.items():
            whole = torch.arange(slots.start, slots.stop, device=self.device) if isinstance(slots, slice) else slots
            self._slots[key] = whole[index]
        layouts, local, start = [], [], 0
        for layout in self.layouts:
            first, last = np.searchsorted(rows, [layout.start, layout.start + layout.num_tokens])
            local.append(torch.from_numpy(rows[first:last] - layout.start).to(self.device))
            layouts.append(replace(layout, start=start, num_tokens=int(last - first)))
            start += int(last - first)
        self._keys = {
            (key, per_kv): [
                _kept_keys(seen, mine, layout.num_tokens, per_kv)
                for seen, mine, layout in zip(all_seen, local, self.layouts, strict=True)
            ]
            for (key, per_kv), all_seen in self._keys.items()
        }
        self.layouts = layouts

    def _slots_of(self, group: KVGroup) -> torch.Tensor | slice:
        """Where the query tokens' own K/V go, in flat order."""
        tables = [group.tables[layout.request_id] for layout in self.layouts]
        if len(tables) == 1 and tables[0].is_run:
            start = tables[0].base + tables[0].num_cached + self.layouts[0].num_earlier
            return slice(start, start + self.layouts[0].num_tokens)
        return self._index(
            [table.reserved[layout.num_earlier :] for table, layout in zip(tables, self.layouts, strict=True)]
        )

    def _keys_of(self, group: KVGroup, per_kv: int, masks: TailMasks) -> Sequence[_Keys | StrictKeys]:
        if self.is_strict:
            return [
                StrictKeys(group.key, group.tables[layout.request_id], layout, per_kv, self.dtype)
                for layout in self.layouts
            ]
        found = []
        for row, layout in enumerate(self.layouts):
            table = group.tables[layout.request_id]
            num_keys = len(table)
            run = slice(table.base, table.base + num_keys)
            where = run if table.is_run else self._index([table.slots[:num_keys]])
            packed = layout.num_tokens <= _MAX_PACKED_TOKENS
            mask = None
            if layout.num_tokens + layout.num_earlier > 1:  # a lone token sees all that its table still holds
                tail, head = _hidden(group.key, layout, table.first)
                mask = masks.view(
                    row,
                    num_keys,
                    torch.from_numpy(tail).to(self.device),
                    None if head is None else torch.from_numpy(head).to(self.device),
                    repeats=per_kv if packed else 1,
                    dtype=self.dtype,
                )
            found.append(_Keys(where, mask, packed))
        return found

    def _index(self, slots: Sequence[IntArray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(slots).astype(np.int64)).to(self.device)


def _kept_keys(seen: _Keys | StrictKeys, rows: torch.Tensor, num_tokens: int, per_kv: int) -> _Keys:
    """The same keys for some of a request's query tokens."""
    if isinstance(seen, StrictKeys):
        raise InternalError("strict attention has no mask to cut")
    if seen.mask is None:
        return seen
    if not seen.packed:
        return replace(seen, mask=seen.mask[rows])
    blocks = seen.mask.unflatten(0, (per_kv, num_tokens))
    return replace(seen, mask=blocks[:, rows].flatten(0, 1))


# Rows of a storage [num_slots, Hkv, D]. With an index tensor these two beat `storage[index]`, five times for a gather.
def _get(storage: torch.Tensor, where: slice | torch.Tensor) -> torch.Tensor:
    return storage[where] if isinstance(where, slice) else storage.index_select(0, where)


def _put(storage: torch.Tensor, where: slice | torch.Tensor, rows: torch.Tensor) -> None:
    if isinstance(where, slice):
        storage[where] = rows
    else:
        storage.index_copy_(0, where, rows)


def _hidden(
    key: GroupKey, layout: QueryLayout, first: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_] | None]:
    """Which keys each query must not see: among the tokens after the context [T, E + T], and of its first keys [T, h].

    Every later context key is seen. ``first`` is the position of the first key that the table still holds.
    """
    tail = ~layout.ancestors
    kind, size = key
    if kind == "full":
        return tail, None
    positions = layout.positions[layout.num_earlier :]
    # As first_visible, for every query.
    lows = positions - (size - 1) if kind == "sliding" else positions // size * size  # [T]
    if lows.max() <= first:
        return tail, None
    tail |= layout.positions < lows[:, None]
    num_hidden = np.clip(lows, first, layout.num_cached) - first  # [T]
    return tail, np.arange(num_hidden.max()) < num_hidden[:, None]


def _attend_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: _Keys, scale: float) -> torch.Tensor:
    """[Hkv, G, T, Dv] from q [Hkv, G, T, Dk], k [Hkv, n, Dk], v [Hkv, n, Dv]."""
    if seen.packed:  # the heads of one KV group become rows of one matrix product
        out = scaled_dot_product_attention(q.flatten(1, 2)[None], k[None], v[None], attn_mask=seen.mask, scale=scale)
        return out[0].reshape(*q.shape[:3], -1)
    per_kv = q.shape[1]
    k, v = (x[:, None].expand(-1, per_kv, -1, -1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen.mask, scale=scale)


def _attend_special(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: _Keys,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The same with soft-capped scores and attention sinks, which torch's fused attention does not know."""
    num_kv_heads, per_kv, num_tokens, _ = q.shape
    scores = torch.matmul(q, k[:, None].transpose(2, 3)) * scale  # [Hkv, G, T, n]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if seen.mask is not None:
        mask = seen.mask.unflatten(0, (per_kv, num_tokens)) if seen.packed else seen.mask
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(num_kv_heads, per_kv, 1, 1).expand(-1, -1, num_tokens, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights, v[:, None])


_STEP: ContextVar[AttentionStep | None] = ContextVar("specdec_step", default=None)


@contextmanager
def active(step: AttentionStep) -> Iterator[None]:
    """Make ``step`` the one that attention calls of this context use."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def go_to_call(ordinal: int) -> None:
    """Say which attention call of the running step comes next, for whoever leaves calls out or swaps them.

    Raises:
        InternalError: no step is running.
    """
    step = _STEP.get()
    if step is None:
        raise InternalError("no step is running")
    step.num_calls = ordinal


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
