"""Top-k, top-p and min-p of drawn tokens without sorting, without probabilities in memory, without the host.

What stays is an upper end of a row's scores, so a threshold says it, or a single question about one token:

- ``find_floors`` finds the k-th largest score (a bound from the largest scores of 4096 groups, then a search by
  halves) and what min-p asks for; the drawing kernel passes over all scores below.
- Top-p needs no threshold: ``keep_in_nucleus`` takes the token that won among all, and asks for the mass behind it. If
  the token is outside, so are all behind it, and the next candidate is the winner among those before it. Few rounds
  do: each draws from what is left.

Masses are whole multiples of 2^-44 of the likeliest token's: their sum does not depend on its order. They may differ
from torch's sums in the last bit, and with them the edge where a mass equals the limit up to 1e-7.

Source: the idea of judging drawn candidates in place of sorting is FlashInfer's (sampling.cuh, "rejection sampling").
"""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.keyed_noise import add_noise
from specdec.kernels.node_laws import NUM_FIELDS
from specdec.kernels.node_scores import node_scores

__all__ = ["find_floors", "keep_in_nucleus"]

_ONE = tl.constexpr(2.0**44)  # the mass of the likeliest token; 2^18 of them fit into int64
_NEVER = tl.constexpr(2147483647)
_FIELDS = tl.constexpr(NUM_FIELDS)


@triton.jit
def _between(low, high):  # type: ignore[no-untyped-def]
    """A float32 in [low, high) half-way in the order of all float32 numbers; low < high."""
    a, b = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    a, b = a ^ ((a >> 31) & 0x7FFFFFFF), b ^ ((b >> 31) & 0x7FFFFFFF)
    middle = a + ((b.to(tl.int64) - a.to(tl.int64)) >> 1).to(tl.int32)
    return (middle ^ ((middle >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _rounded_up(x):  # type: ignore[no-untyped-def]
    """The least float32 that is at least the float64 ``x``."""
    near = x.to(tl.float32)
    bits = near.to(tl.int32, bitcast=True)
    above = tl.where(near == 0.0, 1, tl.where(near > 0.0, bits + 1, bits - 1)).to(tl.float32, bitcast=True)
    return tl.where((near.to(tl.float64) < x) & (near > float("-inf")), above, near)


@triton.jit
def _mass(x, top):  # type: ignore[no-untyped-def]
    return (tl.exp(x - top).to(tl.float64) * _ONE).to(tl.int64)


@triton.jit(do_not_specialize=["num_nodes"])  # type: ignore[untyped-decorator]
def find_floors(  # type: ignore[no-untyped-def]
    Logits, Nodes, Numbers, Addresses, Floors, Totals, num_nodes, vocab_size, stride,
    BLOCK: tl.constexpr, TABLES: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """Of each node the least score that top-k lets pass, the least that min-p lets pass too, and the largest: [3, T].

    Where top-p asks for it also the mass of what top-k lets pass: [T] int64.
    """
    node = tl.program_id(0)
    law = tl.load(Nodes + 3 * num_nodes + node)
    k = tl.load(Numbers + law * _FIELDS + 7).to(tl.int32)
    log_ratio = tl.load(Numbers + law * _FIELDS + 6)
    tail = tl.load(Numbers + law * _FIELDS + 5)
    is_sampled = tl.load(Numbers + law * _FIELDS + 1) > 0
    floor = tl.full([], float("-inf"), tl.float32)
    low = tl.full([], float("-inf"), tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    if is_sampled & ((k > 0) | (log_ratio > float("-inf")) | (tail >= 0)):
        groups = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = node_scores(
                Logits, Nodes, Numbers, Addresses, node, start, num_nodes, vocab_size, stride, BLOCK, TABLES, RECIPROCAL
            )
            groups = tl.maximum(groups, x)
        top = tl.max(groups, 0)
        if k > 0:
            # The k-th largest of the groups' largest is at most the k-th largest of all.
            low = tl.min(groups, 0)
            high = top
            while low < high:
                pivot = _between(low, high)
                if tl.sum((groups > pivot).to(tl.int32), 0) >= k:
                    low = tl.min(tl.where(groups > pivot, groups, float("inf")), 0)
                else:
                    high = tl.max(tl.where(groups > pivot, float("-inf"), groups), 0)
            high = top
            pivot = low  # mostly it is the k-th largest of all: one pass shows it
            while low < high:
                count = tl.full([], 0, tl.int32)
                above = tl.full([], float("inf"), tl.float32)
                below = tl.full([], float("-inf"), tl.float32)
                for start in range(0, vocab_size, BLOCK):
                    x = node_scores(
                        Logits, Nodes, Numbers, Addresses, node, start, num_nodes, vocab_size, stride, BLOCK, TABLES,
                        RECIPROCAL,
                    )  # fmt: skip
                    count += tl.sum((x > pivot).to(tl.int32), 0)
                    above = tl.minimum(above, tl.min(tl.where(x > pivot, x, float("inf")), 0))
                    below = tl.maximum(below, tl.max(tl.where(x > pivot, float("-inf"), x), 0))
                if count >= k:
                    low = above
                else:
                    high = below
                pivot = _between(low, high)
        floor = tl.maximum(low, _rounded_up(top.to(tl.float64) + log_ratio))
        if tail >= 0:
            total = tl.full([], 0, tl.int64)
            for start in range(0, vocab_size, BLOCK):
                x = node_scores(
                    Logits, Nodes, Numbers, Addresses, node, start, num_nodes, vocab_size, stride, BLOCK, TABLES,
                    RECIPROCAL,
                )  # fmt: skip
                total += tl.sum(tl.where((x >= low) & (x > float("-inf")), _mass(x, top), 0), 0)
            tl.store(Totals + node, total)
    tl.store(Floors + node, low)
    tl.store(Floors + num_nodes + node, floor)
    tl.store(Floors + 2 * num_nodes + node, top)


@triton.jit(do_not_specialize=["num_nodes"])  # type: ignore[untyped-decorator]
def keep_in_nucleus(  # type: ignore[no-untyped-def]
    Logits, Nodes, Numbers, Addresses, Floors, Totals, TargetIds, num_nodes, vocab_size, stride,
    BLOCK: tl.constexpr, TABLES: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """Replace each node's token that top-p bans by the winner among those that it keeps."""
    node = tl.program_id(0)
    law = tl.load(Nodes + 3 * num_nodes + node)
    tail = tl.load(Numbers + law * _FIELDS + 5).to(tl.float32)
    is_sampled = tl.load(Numbers + law * _FIELDS + 1) > 0
    low = tl.load(Floors + node)
    floor = tl.load(Floors + num_nodes + node)
    top = tl.load(Floors + 2 * num_nodes + node)
    if is_sampled & (tail >= 0) & (top > float("-inf")):
        seed, position = tl.load(Nodes + num_nodes + node), tl.load(Nodes + 2 * num_nodes + node)
        total = tl.load(Totals + node).to(tl.float64)
        winner = tl.load(TargetIds + node)
        is_open = tl.full([], 1, tl.int32)
        while is_open != 0:
            begin = winner // BLOCK * BLOCK
            own = node_scores(
                Logits, Nodes, Numbers, Addresses, node, begin, num_nodes, vocab_size, stride, BLOCK, TABLES, RECIPROCAL
            )
            score = tl.max(tl.where(begin + tl.arange(0, BLOCK) == winner, own, float("-inf")), 0)
            mass = tl.full([], 0, tl.int64)
            best = tl.full([], float("-inf"), tl.float32)
            follower = tl.full([], _NEVER, tl.int32)
            for start in range(0, vocab_size, BLOCK):
                v = start + tl.arange(0, BLOCK)
                x = node_scores(
                    Logits, Nodes, Numbers, Addresses, node, start, num_nodes, vocab_size, stride, BLOCK, TABLES,
                    RECIPROCAL,
                )  # fmt: skip
                is_behind = (x < score) | ((x == score) & (v <= winner))  # of equal scores the first go first
                is_counted = is_behind & (x >= low) & (x > float("-inf"))
                mass += tl.sum(tl.where(is_counted, _mass(x, top), 0), 0)
                x = tl.where(is_behind | (x < floor), float("-inf"), x)
                if tl.max(x, 0) > float("-inf"):
                    x = add_noise(x, seed, position, start, best, BLOCK)
                    found = tl.max(x, 0)
                    if found > best:
                        follower = tl.min(tl.where(x == found, v, _NEVER), 0)
                        best = found
            is_banned = (mass.to(tl.float64) / total).to(tl.float32) <= tail
            if is_banned & (follower != _NEVER):
                winner = follower
            else:
                is_open = tl.full([], 0, tl.int32)
        tl.store(TargetIds + node, winner)
