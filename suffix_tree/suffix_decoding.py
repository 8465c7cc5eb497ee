"""SuffixDecoding as published: counts of all suffixes, scored by frequency. What our estimator is measured against.

Source: SuffixDecoding (Oliaro et al. 2024, 2411.04975) with the details of its released implementation (Arctic
Inference 0.3): every match length is tried, each drafts at most ``factor * match length + offset`` tokens, the draft
with the largest sum of cumulative frequencies wins, ties go to the longer match and then to the request's own tree.
Memory and time per token are ``depth`` trie nodes, so this is for comparison, not for service.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree.count_trie import CountTrie
from specdec.suffix_tree.counting import (
    C_DEPTH,
    C_NODES,
    N_CHILD,
    N_COUNT,
    N_NEXT,
    N_TOKEN,
    NODE_WIDTH,
    append_windows,
    child_of,
)
from specdec.suffix_tree.memory import Int32Array, Int64Array, int32_at, kernel

__all__ = ["CountingDrafts", "ReferenceSuffixDecoding"]

FloatArray = npt.NDArray[np.float32]
f4 = np.float32
_MAX_OPEN = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CountingDrafts:
    """How much is drafted; the defaults are those of the released implementation.

    Args:
        max_nodes: most draft tokens.
        factor: draft tokens per matched token.
        offset: draft tokens beyond that.
        min_prob: least cumulative frequency of a drafted token.
        as_tree: draft trees; else paths.
    """

    max_nodes: int = 64
    factor: float = 1.0
    offset: float = 0.0
    min_prob: float = 0.1
    as_tree: bool = False


@kernel
def _draft_path(c: Int64Array, node: int, limit: int, min_prob: np.float32, draft: Int32Array) -> tuple[int, Any]:
    nodes = int32_at(c[C_NODES])
    size = 0
    prob = f4(1.0)
    score = f4(0.0)
    while size < limit:
        child = int(nodes[node * NODE_WIDTH + N_CHILD])
        if child == 0:
            break
        prob *= f4(nodes[child * NODE_WIDTH + N_COUNT]) / f4(nodes[node * NODE_WIDTH + N_COUNT])
        if prob < min_prob:
            break
        draft[0, size] = nodes[child * NODE_WIDTH + N_TOKEN]
        draft[1, size] = size - 1
        score += prob
        size += 1
        node = child
    return size, score


@kernel
def _draft_tree(
    c: Int64Array, node: int, limit: int, min_prob: np.float32, draft: Int32Array, open_: Int32Array, probs: FloatArray
) -> tuple[int, Any]:
    nodes = int32_at(c[C_NODES])
    size = 0
    count = 0
    score = f4(0.0)
    prob = f4(1.0)
    parent = -1
    while size < limit:
        total = f4(nodes[node * NODE_WIDTH + N_COUNT])
        child = int(nodes[node * NODE_WIDTH + N_CHILD])
        while child > 0:
            p = prob * f4(nodes[child * NODE_WIDTH + N_COUNT]) / total
            if p >= min_prob and count < _MAX_OPEN:
                open_[0, count] = child
                open_[1, count] = parent
                probs[count] = p
                count += 1
            child = int(nodes[child * NODE_WIDTH + N_NEXT])
        if count == 0:
            break
        best = 0
        for i in range(1, count):
            if probs[i] > probs[best]:
                best = i
        node = int(open_[0, best])
        prob = probs[best]
        draft[0, size] = nodes[node * NODE_WIDTH + N_TOKEN]
        draft[1, size] = open_[1, best]
        score += prob
        parent = size
        size += 1
        count -= 1
        open_[0, best] = open_[0, count]
        open_[1, best] = open_[1, count]
        probs[best] = probs[count]
    return size, score


@kernel
def _follow(c: Int64Array, loci: Int32Array, token: int) -> None:
    """Renew ``loci``: [depth + 1] int32, entry m is the node of the last m tokens; 0 from the first missing one on."""
    for m in range(loci.shape[0] - 1, 0, -1):
        loci[m] = child_of(c, loci[m - 1], token) if m == 1 or loci[m - 1] > 0 else 0


@kernel
def _best_draft(
    c: Int64Array, loci: Int32Array, longest: int, max_nodes: int, factor: float, offset: float, min_prob: np.float32,
    as_tree: bool, best: Int32Array, trial: Int32Array, open_: Int32Array, probs: FloatArray,
) -> tuple[int, Any]:  # fmt: skip
    """Write the tree's best-scoring draft to ``best`` [2, max_nodes]; returns its size and score."""
    size = 0
    top = f4(0.0)
    for match in range(1, longest + 1):
        if loci[match] == 0:
            break
        limit = max(0, min(max_nodes, int(match * factor + offset + 1e-6)))
        if as_tree:
            got, score = _draft_tree(c, loci[match], limit, min_prob, trial, open_, probs)
        else:
            got, score = _draft_path(c, loci[match], limit, min_prob, trial)
        if score >= top:  # ties go to the longer match
            top = score
            size = got
            best[:, :got] = trial[:, :got]
    return size, top


@kernel
def _replay(
    own: Int64Array, windows: Int32Array, cached: Int64Array, cached_windows: Int32Array, text: Int32Array, start: int,
    max_nodes: int, factor: float, offset: float, min_prob: float, as_tree: bool, totals: Int64Array,
) -> None:  # fmt: skip
    own_best = np.empty((2, max_nodes), np.int32)
    cached_best = np.empty((2, max_nodes), np.int32)
    trial = np.empty((2, max_nodes), np.int32)
    open_ = np.empty((2, _MAX_OPEN), np.int32)
    probs = np.empty(_MAX_OPEN, f4)
    least = f4(min_prob)
    depth = own[C_DEPTH]
    own_loci = np.zeros(depth + 1, np.int32)
    cached_loci = np.zeros(depth + 1, np.int32)
    for i in range(max(0, start - depth), start):
        _follow(own, own_loci, text[i])
        _follow(cached, cached_loci, text[i])
    at = start
    while at < text.shape[0]:
        longest = min(at, depth) - 1
        size, score = _best_draft(
            own, own_loci, longest, max_nodes, factor, offset, least, as_tree, own_best, trial, open_, probs
        )
        other, other_score = _best_draft(
            cached, cached_loci, longest, max_nodes, factor, offset, least, as_tree, cached_best, trial, open_, probs
        )
        best = own_best
        if other_score > score:
            best = cached_best
            size = other
        node = -1
        right = 0
        for i in range(size):
            if at + right < text.shape[0] and best[1, i] == node and best[0, i] == text[at + right]:
                node = i
                right += 1
        stop = min(at + right + 1, text.shape[0])
        append_windows(own, windows, text, at, stop)
        append_windows(cached, cached_windows, text, at, stop)
        for i in range(at, stop):
            _follow(own, own_loci, text[i])
            _follow(cached, cached_loci, text[i])
        totals[0] += 1
        totals[1] += right
        totals[2] += size
        at = stop


class ReferenceSuffixDecoding:
    """The published drafter over recorded calls: one tree of all responses, one of each call's prompt and output.

    Args:
        depth: longest string that is counted, match and draft together.
        max_nodes: of the tree of responses.
    """

    def __init__(self, depth: int = 64, max_nodes: int = 1 << 25) -> None:
        self._depth = depth
        self._cached = CountTrie(depth, max_nodes)

    def replay(self, prompt_ids: Int32Array, response_ids: Int32Array, options: CountingDrafts) -> tuple[int, int, int]:
        """Draft and verify a recorded response; returns steps, accepted draft tokens, draft tokens."""
        text = np.concatenate([prompt_ids, response_ids]).astype(np.int32)
        own = CountTrie(self._depth, len(text) * self._depth + 2)
        windows = own.new_windows()
        own.append(windows, prompt_ids)
        totals = np.zeros(3, np.int64)
        _replay(
            own.header, windows, self._cached.header, self._cached.new_windows(), text, len(prompt_ids),
            options.max_nodes, options.factor, options.offset, options.min_prob, options.as_tree, totals,
        )  # fmt: skip
        steps, accepted, drafted = totals.tolist()
        return steps, accepted, drafted
