"""Attention of a ragged batch of token trees over a paged KV cache of page size 1.

Queries are one flat row: for every request its uncached prompt tokens or its tree. A query sees its request's context
and its own ancestors. Rows of a tile are tokens times the query heads of one KV head, so K and V are read once for all
of them; the keys are cut into splits that run side by side and are merged by a second launch (flash-decoding). The
ancestors come as bits, read in the blocks that touch the tree only.

For trees and decoding. On NVIDIA, a product of float32 runs as three of TF32, whose sum has float32's precision.

Source: SpecInfer (arXiv 2305.09781) for the tree mask; FlashAttention-2 (arXiv 2307.08691) for the online softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.launch import Backend, check_tensor, uses_triton
from specdec.kernels.tree_attention_reference import tree_attention_reference
from specdec.kernels.tree_batch import TreeBatch

__all__ = ["AttentionKind", "tree_attention"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What one attention call of a model computes.

    Args:
        scale: factor on the scores.
        window: W: a key is visible iff ``query position - W < key position``; 0: off.
        chunk: C: a key is visible iff ``key position // C == query position // C``; 0: off.
        softcap: c of ``c * tanh(scores / c)``; 0: off.
    """

    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: TreeBatch,
    kind: AttentionKind,
    *,
    sinks: Tensor | None = None,
    num_splits: int = 8,
    backend: Backend = "auto",
) -> Tensor:
    """Attend; the step's own keys and values are already in the cache.

    Args:
        query: [T, Hq, D].
        keys: [num_slots, Hkv, D]: all slots of one layer.
        values: [num_slots, Hkv, Dv].
        batch: who sees what.
        kind: mask and score rules.
        sinks: [Hq] float32 logits that take part in the softmax and carry no value.
        num_splits: pieces of the key sequence that run side by side.
        backend: see ``uses_triton``.

    Returns:
        [T, Hq, Dv] in the query's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(query, keys, values, batch, kind, sinks, num_splits)
    if not uses_triton(backend, query.device):
        return tree_attention_reference(query, keys, values, batch, kind, sinks)
    num_tokens, num_heads, width = query.shape
    num_kv, value_width = keys.shape[1], values.shape[2]
    out = torch.empty(num_tokens, num_heads, value_width, dtype=query.dtype, device=query.device)
    if not num_tokens:
        return out
    part = torch.empty(num_splits, num_tokens, num_heads, value_width, dtype=torch.float32, device=query.device)
    # Maximum and sum of every row of every split, in two planes.
    stats = torch.empty(2, num_splits, num_tokens, num_heads, dtype=torch.float32, device=query.device)
    shape = _tiling(num_heads // num_kv, width, value_width, query.dtype)
    tiles = batch.tiles(shape["BM"] // shape["G"])
    _attend[(len(tiles), num_kv, num_splits)](
        query, keys, values, part, stats, tiles, batch.cu_queries, batch.contexts, batch.firsts, batch.slots,
        batch.positions, batch.ancestors, stats if sinks is None else sinks,
        kind.scale, kind.softcap, kind.window, kind.chunk,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        batch.slots.stride(0), batch.ancestors.stride(0), num_tokens * num_heads, num_heads,
        SPLITS=num_splits, WINDOW=kind.window > 0, CHUNK=kind.chunk > 0, CAP=kind.softcap > 0, SINK=sinks is not None,
        **shape,
    )  # fmt: skip
    _merge[(num_tokens, num_heads)](
        part, stats, out, num_tokens * num_heads, num_heads, SPLITS=num_splits,
        BS=triton.next_power_of_2(num_splits), DV=value_width, BDV=shape["BDV"], num_warps=1,
    )  # fmt: skip
    return out


def _tiling(num_groups: int, width: int, value_width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes and launch options. A tile holds at least one token with all query heads of its KV head."""
    rows = max(16, triton.next_power_of_2(num_groups))
    wide = max(width, value_width) > 128
    exact = dtype == torch.float32
    return {
        "G": num_groups,
        "D": width,
        "DV": value_width,
        "BD": max(triton.next_power_of_2(width), 16),
        "BDV": max(triton.next_power_of_2(value_width), 16),
        "BM": rows,
        "BN": 32 if wide or exact else 64,
        "PRECISION": "tf32x3" if exact and torch.version.hip is None else "ieee",
        "num_warps": 8 if exact and wide else 4,
        "num_stages": 2 if exact else 3,
    }


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: TreeBatch,
    kind: AttentionKind,
    sinks: Tensor | None,
    splits: int,
) -> None:
    device, dtype = query.device, (query.dtype,)
    check_tensor("query", query, (batch.num_queries, None, None), _FLOATS, device)
    num_heads, width = query.shape[1:]
    check_tensor("keys", keys, (None, None, width), dtype, device)
    check_tensor("values", values, (keys.shape[0], keys.shape[1], None), dtype, device)
    if num_heads % keys.shape[1]:
        raise ValueError(f"query heads must be a multiple of the KV heads, got {num_heads} and {keys.shape[1]}")
    if max(width, values.shape[2]) > 256:
        raise ValueError(f"heads must be at most 256 wide, got {width} and {values.shape[2]}")
    if sinks is not None:
        check_tensor("sinks", sinks, (num_heads,), (torch.float32,), device)
    if kind.window < 0 or kind.chunk < 0 or kind.softcap < 0 or (kind.window and kind.chunk):
        raise ValueError(f"window, chunk and softcap must be >= 0 and not both window and chunk be given, got {kind}")
    if splits < 1:
        raise ValueError(f"num_splits must be >= 1, got {splits}")
    if batch.slots.device != device:
        raise ValueError(f"the batch must be on {device}, got {batch.slots.device}")
    batch.check_slots(keys.shape[0])


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    Q, K, V, Part, Stats, Tiles, CuQueries, Contexts, Firsts, Slots, Positions, Ancestors, Sinks,
    scale, softcap, window, chunk, sq_t, sq_h, sk_s, sk_h, sv_s, sv_h, s_slots, s_words, rows_all, num_heads,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAP: tl.constexpr,
    SINK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = tl.load(Tiles + 2 * tile)
    if request < 0:  # padding of a fixed grid
        return
    q0 = tl.load(CuQueries + request)
    num = tl.load(CuQueries + request + 1) - q0
    context, first = tl.load(Contexts + request), tl.load(Firsts + request)
    row = tl.arange(0, BM)
    token = tl.load(Tiles + 2 * tile + 1) + row // G
    head = kv_head * G + row % G
    live = (row < (BM // G) * G) & (token < num)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    at = (q0 + token).to(tl.int64)
    q = tl.load(
        Q + at[:, None] * sq_t + head[:, None] * sq_h + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
    )
    position = tl.load(Positions + at, mask=live, other=0)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SINK:  # one more logit, without a value; one split owns it
        m = tl.where(split == 0, tl.load(Sinks + head, mask=live, other=0.0), m)
        total += tl.where(split == 0, 1.0, 0.0)
    acc = tl.zeros([BM, BDV], tl.float32)
    # Keys by their place in the request's slot row; place p of the context has position first + p.
    low = 0
    if WINDOW:
        low = tl.maximum(context + first + 1 - window - first, 0) // BN * BN
    if CHUNK:
        low = tl.maximum((context + first) // chunk * chunk - first, 0) // BN * BN
    end = context + num
    per = tl.cdiv(tl.cdiv(end - low, BN), SPLITS) * BN
    begin = low + split * per
    for start in range(begin, tl.minimum(begin + per, end), BN):
        place = start + tl.arange(0, BN)
        inside = place < tl.minimum(begin + per, end)
        slot = tl.load(Slots + request.to(tl.int64) * s_slots + place, mask=inside, other=0).to(tl.int64)
        k = tl.load(
            K + slot[None, :] * sk_s + kv_head * sk_h + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0
        )
        x = tl.dot(q, k, input_precision=PRECISION) * scale
        if CAP:
            e = tl.exp(-2.0 * tl.abs(x / softcap))
            x = softcap * tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        visible = live[:, None] & inside[None, :]
        node = place - context
        if start + BN > context:  # the block touches the tree
            word = tl.load(
                Ancestors + at[:, None] * s_words + (node // 32)[None, :],
                mask=live[:, None] & (inside & (node >= 0))[None, :], other=0,
            )  # fmt: skip
            visible = visible & ((node < 0)[None, :] | (((word >> (node % 32)[None, :]) & 1) != 0))
        if WINDOW or CHUNK:
            own = tl.load(Positions + q0 + node, mask=inside & (node >= 0), other=0)
            where = tl.where(node >= 0, own, place + first)
            if WINDOW:
                visible = visible & (where[None, :] > position[:, None] - window)
            else:
                visible = visible & (where[None, :] >= (position // chunk * chunk)[:, None])
        x = tl.where(visible, x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 1))
        finite = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp(x - finite[:, None])
        fade = tl.exp(m - finite)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(
            V + slot[:, None] * sv_s + kv_head * sv_h + dv[None, :],
            mask=inside[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        m = top
    at = split * rows_all + at * num_heads + head
    tl.store(Part + at[:, None] * DV + dv[None, :], acc, mask=live[:, None] & (dv < DV)[None, :])
    tl.store(Stats + at, m, mask=live)
    tl.store(Stats + SPLITS * rows_all + at, total, mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    Part, Stats, Out, rows_all, num_heads,
    SPLITS: tl.constexpr, BS: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    s, dv = tl.arange(0, BS), tl.arange(0, BDV)
    live = s < SPLITS
    m = tl.load(Stats + s * rows_all + row, mask=live, other=float("-inf"))
    total = tl.load(Stats + (SPLITS + s) * rows_all + row, mask=live, other=0.0)
    top = tl.max(m, 0)
    weight = tl.exp(m - tl.where(top == float("-inf"), 0.0, top))
    part = tl.load(
        Part + (s[:, None] * rows_all + row) * DV + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0.0
    )
    out = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(Out + row * DV + dv, out.to(Out.dtype.element_ty), mask=dv < DV)
