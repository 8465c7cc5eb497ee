"""Attention of a ragged batch of token trees over a paged KV cache of page size 1.

Queries are one flat row: for every request its uncached prompt tokens or its tree. A query sees its request's context
and its own ancestors. Rows of a tile are tokens times the query heads of one KV head, so K and V are read once for all
of them; the keys are cut into splits that run side by side and are merged by a second launch (flash-decoding). The
ancestors come as bits, read in the blocks that touch the tree only. The larger the trees, the taller the tiles.

Strict attention gives a query the same bits whatever else is in the batch: tiles of one height, blocks and splits that
begin at fixed positions, and every query's own path laid out as if it had been decoded token by token.

On NVIDIA, a product of float32 runs as three of TF32, whose sum has float32's precision.

Source: SpecInfer (arXiv 2305.09781) for the tree mask; FlashAttention-2 (arXiv 2307.08691) for the online softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from specdec.kernels.launch import Backend, check_tensor, on_own_device, uses_triton
from specdec.kernels.tree_attention_reference import tree_attention_reference
from specdec.kernels.tree_attention_triton import attend, merge
from specdec.kernels.tree_batch import TreeBatch

__all__ = ["AttentionKind", "tree_attention"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_STRICT_SPLIT = 2048  # keys of one split in strict attention, a multiple of every block
_LEAST_SPLIT = 256  # fewer keys than this are not worth a split of their own
_WAVES = 4  # programs per multiprocessor that the splits aim at
_MAX_SPLITS = 64
AMD_ROWS = 32  # of the tallest tile there


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


@on_own_device
def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: TreeBatch,
    kind: AttentionKind,
    *,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    is_strict: bool = False,
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
        num_splits: pieces of the key sequence that run side by side; None: enough to fill the device. Strict attention
            has its own.
        is_strict: a query's bits depend on its own path only; needs ``batch.paths``, and holds for Triton alone.
        backend: see ``uses_triton``.

    Returns:
        [T, Hq, Dv] in the query's dtype; zero for tokens of nobody.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(query, keys, values, batch, kind, sinks, num_splits, is_strict)
    if not uses_triton(backend, query.device):
        return tree_attention_reference(query, keys, values, batch, kind, sinks)
    num_tokens, num_heads, width = query.shape
    num_kv, value_width = keys.shape[1], values.shape[2]
    out = torch.empty(num_tokens, num_heads, value_width, dtype=query.dtype, device=query.device)
    if not num_tokens:
        return out
    shape = _tiling(
        num_heads // num_kv, width, value_width, query.dtype,
        num_queries=1 if is_strict else num_tokens, is_strict=is_strict,
    )  # fmt: skip
    tokens = shape["BM"] // shape["G"]
    if is_strict:
        splits = -(-batch.max_columns // _STRICT_SPLIT)
    else:
        # Not of the grid's tiles: in fixed buffers most of those are fillers.
        splits = num_splits or _num_splits((num_tokens // tokens + 1) * num_kv, batch.max_columns, query.device)
    part = torch.empty(splits, num_tokens, num_heads, value_width, dtype=torch.float32, device=query.device)
    # Maximum and sum of every row of every split, in two planes.
    stats = torch.empty(2, splits, num_tokens, num_heads, dtype=torch.float32, device=query.device)
    paths = batch.ancestors if batch.paths is None else batch.paths  # read by strict attention only
    attend[(batch.num_tiles(tokens), num_kv, splits)](
        query, keys, values, part, stats, batch.cu_queries, batch.cu_keys, batch.contexts, batch.firsts, batch.rows,
        batch.slots, batch.positions, batch.ancestors, paths, stats if sinks is None else sinks,
        kind.scale, kind.softcap, kind.window, kind.chunk, batch.num_requests,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        batch.slots.stride(0), batch.ancestors.stride(0), paths.stride(0), num_tokens * num_heads, num_heads,
        RB=max(16, triton.next_power_of_2(batch.num_requests)), SPLIT_KEYS=_STRICT_SPLIT if is_strict else 0,
        WINDOW=kind.window > 0, CHUNK=kind.chunk > 0, CAP=kind.softcap > 0, SINK=sinks is not None, **shape,
    )  # fmt: skip
    merge[(num_tokens, num_heads)](
        part, stats, out, batch.cu_queries, batch.num_requests, num_tokens * num_heads, num_heads, splits,
        BS=_MAX_SPLITS if is_strict else triton.next_power_of_2(min(splits, _MAX_SPLITS)),
        DV=value_width, BDV=shape["BDV"], num_warps=4,
    )  # fmt: skip
    return out


def _num_splits(num_programs: int, num_columns: int, device: torch.device) -> int:
    """Enough pieces of the keys to keep every multiprocessor busy, none of them tiny."""
    if device.type != "cuda":
        return 2  # interpreted: enough to have something to merge
    wanted = -(-_WAVES * torch.cuda.get_device_properties(device).multi_processor_count // num_programs)
    return max(1, min(wanted, -(-num_columns // _LEAST_SPLIT), _MAX_SPLITS))


def _tiling(
    num_groups: int, width: int, value_width: int, dtype: torch.dtype, *, num_queries: int = 1, is_strict: bool = False
) -> dict[str, Any]:
    """Block sizes and launch options. A tile holds at least one token with all query heads of its KV head.

    Args:
        num_groups: query heads per KV head.
        width: of keys.
        value_width: of values.
        dtype: of all three.
        num_queries: of the largest request, or more: queries of one tile share the keys that it reads.
        is_strict: always the same shape, and two loops that need registers.
    """
    wide = max(width, value_width) > 128
    exact = dtype == torch.float32
    # AMD's registers hold half of the tall tile.
    tallest = 16 if exact or wide else 64 if torch.version.hip is None else AMD_ROWS
    rows = max(16, triton.next_power_of_2(num_groups))
    rows = max(rows, min(tallest, triton.next_power_of_2(num_groups * num_queries)))
    return {
        "G": num_groups,
        "D": width,
        "DV": value_width,
        "BD": max(triton.next_power_of_2(width), 16),
        "BDV": max(triton.next_power_of_2(value_width), 16),
        "BM": rows,
        "BN": 32 if wide or exact else 64,
        "PRECISION": "tf32x3" if exact and torch.version.hip is None else "ieee",
        "num_warps": 8 if (exact and (wide or is_strict)) or rows >= 64 else 4,
        "num_stages": 2 if exact else 3,
    }


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: TreeBatch,
    kind: AttentionKind,
    sinks: Tensor | None,
    splits: int | None,
    is_strict: bool,
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
    if is_strict and batch.paths is None:
        raise ValueError("strict attention needs the batch's paths")
    if splits is not None and splits < 1:
        raise ValueError(f"num_splits must be >= 1, got {splits}")
    if batch.slots.device != device:
        raise ValueError(f"the batch must be on {device}, got {batch.slots.device}")
    batch.check(keys.shape[0])
