"""The processed scores of one block of a node's tokens; see ``specdec.kernels.node_laws``."""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.node_laws import NUM_FIELDS, NUM_TABLES

__all__ = ["node_scores"]

_FIELDS, _TABLES = tl.constexpr(NUM_FIELDS), tl.constexpr(NUM_TABLES)


@triton.jit  # type: ignore[untyped-decorator]
def _divided(x, number, RECIPROCAL: tl.constexpr):  # type: ignore[no-untyped-def]
    if RECIPROCAL:  # noqa: SIM108 -- each branch is compiled alone
        x = x * tl.math.div_rn(1.0, number)
    else:
        x = tl.math.div_rn(x, tl.zeros_like(x) + number)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def node_scores(  # type: ignore[no-untyped-def]
    Logits, Nodes, Numbers, Addresses, node, start, num_nodes, vocab_size, stride,
    BLOCK: tl.constexpr, TABLES: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK] of one node's tokens from ``start`` on, before any truncation; -inf behind the vocabulary."""
    v = start + tl.arange(0, BLOCK)
    inside = v < vocab_size
    law = tl.load(Nodes + 3 * num_nodes + node)
    x = tl.load(Logits + tl.load(Nodes + node) * stride + v, mask=inside, other=float("-inf")).to(tl.float32)
    if TABLES:
        bias = tl.load(Addresses + law * _TABLES + 2)
        if bias != 0:
            x += tl.load(bias.to(tl.pointer_type(tl.float32)) + v, mask=inside, other=0.0)
        seen = tl.load(Addresses + law * _TABLES)
        counts = tl.load(Addresses + law * _TABLES + 1)
        is_seen = tl.zeros([BLOCK], tl.int32)
        count = tl.zeros([BLOCK], tl.float32)
        if (seen != 0) | (counts != 0):
            walker = node.to(tl.int64)
            parent = tl.load(Nodes + 5 * num_nodes + walker)
            while parent >= 0:
                is_here = v == tl.load(Nodes + 4 * num_nodes + walker)
                is_seen |= is_here.to(tl.int32)
                count += is_here.to(tl.float32)
                walker = parent
                parent = tl.load(Nodes + 5 * num_nodes + walker)
        if seen != 0:
            is_seen |= tl.load(seen.to(tl.pointer_type(tl.int8)) + v, mask=inside, other=0).to(tl.int32)
            penalty = tl.load(Numbers + law * _FIELDS + 2).to(tl.float32)
            x = tl.where(is_seen != 0, tl.where(x < 0, x * penalty, _divided(x, penalty, RECIPROCAL)), x)
        if counts != 0:
            count += tl.load(counts.to(tl.pointer_type(tl.float32)) + v, mask=inside, other=0.0)
            frequency = tl.load(Numbers + law * _FIELDS + 3).to(tl.float32)
            presence = tl.load(Numbers + law * _FIELDS + 4).to(tl.float32)
            x = (x - frequency * count) - tl.where(count > 0, presence, 0.0)
    return _divided(x, tl.load(Numbers + law * _FIELDS).to(tl.float32), RECIPROCAL)
