"""Machine code of the fuser: merge trees by prefix, price their nodes, learn from what came. See ``acceptance``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from specdec.tree import FloatArray, IntArray

__all__ = ["DEPTHS", "NUM_BINS", "learn_outcomes", "merge_and_price", "merge_trees", "price_nodes"]

Bytes = npt.NDArray[np.uint8]
DEPTHS = 6  # buckets: 1, 2, 3-4, 5-8, 9-16, deeper
NUM_BINS = 10
_MARGIN = 6.0  # log-odds beyond which a source's own confidence says no more
_DECAY = 0.998  # of the squared gradients that scale a step: an old regime is forgotten within about 500 outcomes
_RATE = 0.15
_OFFSET_RATE = 0.15
_OFFSET_LIMIT = 3.0


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _depth_bucket(depth: int) -> int:
    if depth <= 2:
        return depth - 1
    if depth <= 4:
        return 2
    if depth <= 8:
        return 3
    return 4 if depth <= 16 else 5


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def merge_trees(
    token_ids: IntArray, parents: IntArray, values: FloatArray, sources: Bytes, offsets: IntArray, budget: int
) -> Any:
    """The union of some trees over one root, equal prefixes once.

    Args:
        token_ids: [T] int32: the trees one after the other, root first.
        parents: [T] int32, within each tree.
        values: [T] float32: each source's own path values.
        sources: [trees] uint8: which source each tree is of.
        offsets: [trees + 1] int32.
        budget: most merged nodes below the root, times the number of sources; a bound of memory only.

    Returns:
        token_ids [N], parents [N], depths [N], masks [N] uint8 (bit s: source s proposed it), and margins [N, 8]
        float32: log-odds of each source's conditional value, 0 where it did not propose the node.
    """
    most = min(len(token_ids), budget + 1)
    out_ids = np.empty(most, dtype=np.int32)
    out_parents = np.empty(most, dtype=np.int32)
    depths = np.zeros(most, dtype=np.int32)
    masks = np.zeros(most, dtype=np.uint8)
    margins = np.zeros((most, 8), dtype=np.float32)
    first_child = np.full(most, -1, dtype=np.int32)
    next_sibling = np.full(most, -1, dtype=np.int32)
    node_of = np.empty(len(token_ids), dtype=np.int32)
    out_ids[0] = token_ids[0]
    out_parents[0] = -1
    size = 1
    for tree in range(len(offsets) - 1):
        first = offsets[tree]
        source = sources[tree]
        node_of[first] = 0
        for at in range(first + 1, offsets[tree + 1]):
            above = node_of[first + parents[at]]
            node_of[at] = -1
            if above < 0:
                continue
            node = first_child[above]
            while node >= 0 and out_ids[node] != token_ids[at]:
                node = next_sibling[node]
            if node < 0:
                if size == most:
                    continue
                node = size
                size += 1
                out_ids[node] = token_ids[at]
                out_parents[node] = above
                depths[node] = depths[above] + 1
                next_sibling[node] = first_child[above]
                first_child[above] = node
            node_of[at] = node
            masks[node] |= np.uint8(1 << source)
            chance = values[at] / max(values[first + parents[at]], np.float32(1e-9))
            chance = min(max(chance, np.float32(1e-6)), np.float32(1 - 1e-6))
            margin = np.log(chance / (1 - chance))
            margins[node, source] = min(max(margin, -_MARGIN), _MARGIN)
    return out_ids[:size], out_parents[:size], depths[:size], masks[:size], margins[:size]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def price_nodes(
    parents: IntArray, depths: IntArray, masks: Bytes, margins: FloatArray, weights: FloatArray, offset: float
) -> Any:
    """Chances [N] float32 of the nodes given their parents, and values [N] float32: those of their paths.

    Args:
        parents: [N] int32.
        depths: [N] int32.
        masks: [N] uint8.
        margins: [N, 8] float32.
        weights: [256, DEPTHS, 9] float32: by mask and depth, a weight per source and a bias.
        offset: log-odds that this request adds.
    """
    size = len(parents)
    chances = np.ones(size, dtype=np.float32)
    total = np.zeros(size, dtype=np.float32)
    values = np.ones(size, dtype=np.float32)
    for node in range(1, size):
        w = weights[masks[node], _depth_bucket(depths[node])]
        x = w[8] + offset
        for source in range(8):
            x += w[source] * margins[node, source]
        chances[node] = 1.0 / (1.0 + np.exp(-x))
        total[parents[node]] += chances[node]
    for node in range(1, size):
        # Siblings exclude each other, so their chances must not add up to more than one.
        values[node] = values[parents[node]] * chances[node] / max(total[parents[node]], np.float32(1.0))
    return chances, values


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def merge_and_price(
    token_ids: IntArray, parents: IntArray, values: FloatArray, sources: Bytes, offsets: IntArray, weights: FloatArray,
    offset: float,
) -> Any:  # fmt: skip
    """``merge_trees`` and ``price_nodes`` in one call: what it returns, one after the other."""
    merged = merge_trees(token_ids, parents, values, sources, offsets, len(token_ids))
    return merged + price_nodes(merged[1], merged[2], merged[3], merged[4], weights, offset)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def learn_outcomes(
    token_ids: IntArray,
    parents: IntArray,
    depths: IntArray,
    masks: Bytes,
    margins: FloatArray,
    chances: FloatArray,
    truth: IntArray,
    accepted: int,
    weights: FloatArray,
    squares: FloatArray,
    offset: float,
    bins: npt.NDArray[np.float64],
    extra: IntArray,
) -> float:
    """Compare a merged tree with the tokens that came; adjusts ``weights``, ``squares`` and ``bins`` in place.

    A node is judged if its parent is on the true path, whether or not it was verified: the tokens that came are the
    truth about it. Nodes behind the last known token are censored and teach nothing.

    Args:
        token_ids: [N] int32 of the merged tree; ``parents``, ``depths``, ``masks``, ``margins`` and ``chances``
            likewise.
        parents: [N] int32.
        depths: [N] int32.
        masks: [N] uint8.
        margins: [N, 8] float32.
        chances: [N] float32 that were predicted, before siblings were made to share.
        truth: [G] int32: the tokens that the target chose from here on.
        accepted: how many of them were draft tokens; a node that was right and not verified brought nothing.
        weights: [256, DEPTHS, 9] float32.
        squares: the same shape: decayed sums of squared gradients, which scale each step (AdaGrad).
        offset: log-odds of this request.
        bins: [256, NUM_BINS, 3] float64: by mask and prediction: outcomes, sum of predictions, hits.
        extra: [8] int32, written: how many accepted tokens would be lost without each source.

    Returns:
        The request's new offset.
    """
    node, length = 0, 0
    lost_from = np.full(8, -1, dtype=np.int32)
    for place in range(len(truth)):
        found = -1
        for child in range(node + 1, len(token_ids)):
            if parents[child] != node:
                continue
            mask = masks[child]
            hit = token_ids[child] == truth[place]
            outcome = 1.0 if hit else 0.0
            row = min(int(chances[child] * NUM_BINS), NUM_BINS - 1)
            bins[mask, row, 0] += 1
            bins[mask, row, 1] += chances[child]
            bins[mask, row, 2] += 1 if hit else 0
            w = weights[mask, _depth_bucket(depths[child])]
            g = squares[mask, _depth_bucket(depths[child])]
            # What holds for all requests is fitted without this one's offset, which takes only what is left.
            x = w[8]
            for i in range(8):
                x += w[i] * margins[child, i]
            error = outcome - 1.0 / (1.0 + np.exp(-x))
            for i in range(9):
                slope = error * (1.0 if i == 8 else margins[child, i])
                if slope != 0:
                    g[i] = g[i] * _DECAY + slope * slope
                    w[i] += _RATE * slope / np.sqrt(g[i] + 0.3)
            offset += _OFFSET_RATE * (outcome - chances[child])
            if hit:
                found = child
        # Half of what a request taught is forgotten after about 32 tokens.
        offset = min(max(offset * 0.979, -_OFFSET_LIMIT), _OFFSET_LIMIT)
        if found < 0:
            break
        node = found
        for source in range(8):
            if lost_from[source] < 0 and masks[node] == 1 << source:
                lost_from[source] = length
        length += 1
    for source in range(8):
        extra[source] = max(min(length, accepted) - lost_from[source], 0) if lost_from[source] >= 0 else 0
    return offset
