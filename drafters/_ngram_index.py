"""The compiled loops of `specdec.drafters.ngram`: flat int32 arrays in, flat int32 arrays out, no Python objects."""

from __future__ import annotations

import numpy as np
from numba import njit

from specdec.tree import FloatArray, IntArray

__all__ = ["MAX_MATCH", "NUM_RANKS", "count_outcomes", "extend", "find_copies", "grow_tree"]

# Tokens in common beyond this many say nothing new about the next one; also the most that a lookup compares.
MAX_MATCH = 32
NUM_RANKS = 4  # of siblings; those after the last share its cell


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _ngram_hash(token_ids: IntArray, end: int, n: int) -> int:
    """31-bit hash of the n-gram whose last token is at ``end``; no product leaves 63 bits."""
    value = np.int64(n)
    for position in range(end - n + 1, end + 1):
        value = ((value ^ np.int64(token_ids[position])) * 16777619) & 0x7FFFFFFF
    value ^= value >> 15
    value = (value * 0x2C1B3C6D) & 0x7FFFFFFF
    return int(value ^ (value >> 12))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _common_length(token_ids: IntArray, end: int, other_end: int, limit: int) -> int:
    """How many tokens the texts ending at ``end`` and, earlier, at ``other_end`` have in common, at most ``limit``."""
    length = 0
    while length < limit and other_end - length >= 0 and token_ids[other_end - length] == token_ids[end - length]:
        length += 1
    return length


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def extend(token_ids: IntArray, num_indexed: int, min_n: int, latest: IntArray, previous: IntArray) -> None:
    """Index the tokens from ``num_indexed`` on.

    Args:
        token_ids: [M] int32.
        num_indexed: tokens that are indexed already.
        min_n: row k of the tables is for n = min_n + k.
        latest: [K, S] int32, S a power of two: hash slot -> latest end of an n-gram, plus one; 0 = free.
        previous: [K, capacity] int32: position -> previous end of the n-gram that ends there, plus one; 0 = none.
    """
    mask = latest.shape[1] - 1
    for k in range(latest.shape[0]):
        n = min_n + k
        for end in range(max(num_indexed, n - 1), len(token_ids)):
            slot = _ngram_hash(token_ids, end, n) & mask
            while latest[k, slot] > 0 and _common_length(token_ids, end, latest[k, slot] - 1, n) < n:
                slot = (slot + 1) & mask
            previous[k, end] = latest[k, slot]
            latest[k, slot] = end + 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def find_copies(token_ids: IntArray, previous: IntArray, min_n: int, limits: tuple[int, int]) -> IntArray:
    """Earlier places that end like the text: longest n first, then most recent first; the best of those found.

    Args:
        token_ids: [M] int32.
        previous: [K, capacity] int32, see `extend`.
        min_n: row k of ``previous`` is for n = min_n + k.
        limits: how many places are looked at, and how many are returned at most.

    Returns:
        [2, B] int32: ends of the places and how many tokens they have in common with the end of the text, by
        decreasing length in common, then most recent first.
    """
    max_candidates, max_branches = limits
    last = len(token_ids) - 1
    copies = np.empty((2, max_candidates), dtype=np.int32)
    num_copies = 0
    for k in range(previous.shape[0] - 1, -1, -1):
        end = previous[k, last] - 1
        while end >= 0 and num_copies < max_candidates:
            length = _common_length(token_ids, last, end, MAX_MATCH)
            # With room left the longer n-gram's links were followed to their end: its places are in already.
            if length == min_n + k or k == previous.shape[0] - 1:
                place = num_copies
                while place > 0 and copies[1, place - 1] < length:
                    copies[0, place] = copies[0, place - 1]
                    copies[1, place] = copies[1, place - 1]
                    place -= 1
                copies[0, place] = end
                copies[1, place] = length
                num_copies += 1
            end = previous[k, end] - 1
    return copies[:, : min(num_copies, max_branches)]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _child(nodes: IntArray, num_nodes: int, parent: int, token_id: int) -> int:
    """The child of ``parent`` with this token, or -1."""
    for node in range(parent + 1, num_nodes):
        if nodes[1, node] == parent and nodes[0, node] == token_id:
            return node
    return -1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def grow_tree(
    token_ids: IntArray, copies: IntArray, limits: tuple[int, int, float], rates: FloatArray
) -> tuple[IntArray, FloatArray]:
    """The best ``budget`` nodes of the copies merged by prefix, best first.

    Each copy has a cursor into the tree; the cursor whose next node is worth most is moved, and so on. Values never
    grow along a path, hence every prefix of the nodes is the best tree of its size.

    Args:
        token_ids: [M] int32.
        copies: [2, B] int32 of `find_copies`.
        limits: most draft tokens, longest path, least value.
        rates: [cells] float32: acceptance rate of a node whose parent was accepted.

    Returns:
        nodes [3, N] int32 with rows token id, parent, cell; values [N] float32.
    """
    budget, max_depth, min_value = limits
    num_branches = copies.shape[1]
    last = len(token_ids) - 1
    nodes = np.zeros((3, budget + 1), dtype=np.int32)
    values = np.ones(budget + 1, dtype=np.float32)
    num_children = np.zeros(budget + 1, dtype=np.int32)
    at = np.zeros(num_branches, dtype=np.int32)  # the node that each cursor stands on
    depth = np.zeros(num_branches, dtype=np.int32)
    nodes[0, 0] = token_ids[last]
    nodes[1, 0] = -1
    num_nodes = 1
    while num_nodes <= budget:
        best, best_value, best_token, best_cell = -1, np.float32(-1.0), np.int32(0), 0
        for branch in range(num_branches):
            end = copies[0, branch]
            while depth[branch] < max_depth:
                token_id = token_ids[end + 1 + depth[branch] % (last - end)]
                child = -1
                if num_children[at[branch]] > 0:
                    child = _child(nodes, num_nodes, at[branch], token_id)
                if child < 0:
                    break
                at[branch] = child
                depth[branch] += 1
            if depth[branch] == max_depth:
                continue
            in_common = min(copies[1, branch] + depth[branch], MAX_MATCH)
            cell = in_common * NUM_RANKS + min(num_children[at[branch]], NUM_RANKS - 1)
            value = values[at[branch]] * rates[cell]
            if value > best_value:
                best, best_value, best_token, best_cell = branch, value, token_id, cell
        if best < 0 or best_value < min_value:
            break
        nodes[0, num_nodes] = best_token
        nodes[1, num_nodes] = at[best]
        nodes[2, num_nodes] = best_cell
        values[num_nodes] = best_value
        num_children[at[best]] += 1
        at[best] = num_nodes
        depth[best] += 1
        num_nodes += 1
    return nodes[:, :num_nodes], values[:num_nodes]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def count_outcomes(nodes: IntArray, truth: IntArray, tries: FloatArray, hits: FloatArray) -> None:
    """Count, along the true tokens, which nodes could have been accepted and which were.

    Args:
        nodes: [3, N] int32 of `grow_tree`.
        truth: [A + 1] int32: the tokens that the target chose.
        tries: [cells] float32; changed in place.
        hits: [cells] float32; changed in place.
    """
    parent = 0
    for token_id in truth:
        accepted = -1
        for node in range(parent + 1, nodes.shape[1]):
            if nodes[1, node] == parent:
                cell = nodes[2, node]
                tries[cell] += 1
                if nodes[0, node] == token_id:
                    hits[cell] += 1
                    accepted = node
        if accepted < 0:
            return
        parent = accepted
