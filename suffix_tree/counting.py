"""A trie of all windows of a text, with exact counts: kernels on flat arrays.

Every node is a string of at most ``depth`` tokens, and its count is how often that string occurs. Appending a token
extends the windows that are still shorter than ``depth``, so it costs ``depth`` hash look-ups whatever the size.
Children are found by one hash table over (parent, token) that grows one bucket at a time; siblings form a list whose
head is the most frequent child (of equals, the one that got there first).

It is what SuffixDecoding counts with (depth 64) and what branch lookahead walks (depth 16).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from specdec.suffix_tree.memory import Int32Array, Int64Array, int32_at, kernel
from specdec.suffix_tree.paged import bucket_key, bucket_of

__all__ = ["append_windows", "child_of", "decay", "remove_windows", "walk"]

# Header slots.
(
    C_NODES,  # int32 [max_nodes * NODE_WIDTH]
    C_BUCKETS,  # int32 [max_nodes]: first node of each bucket
    C_NUM_NODES,  # nodes ever used; node 0 is the root
    C_MAX_NODES,
    C_FREE,  # head of the list of returned nodes, linked by N_CHAIN
    C_NUM_FREE,
    C_NUM_BUCKETS,
    C_BUCKET_MASK,
    C_DEPTH,
    C_EPOCH,  # counts deletions: windows that were open before one are void
    COUNT_SLOTS,
) = range(11)
# Columns of a node.
(
    N_TOKEN,
    N_PARENT,
    N_CHILD,  # most frequent child, 0 = none
    N_NEXT,  # sibling
    N_PREVIOUS,
    N_CHAIN,  # next node of the bucket
    N_COUNT,
    NODE_WIDTH,
) = range(8)
FIRST_BUCKETS: Final = 256
# A window record: epoch, number of open windows, then the node of each, longest first.
W_EPOCH: Final = 0
W_OPEN: Final = 1
W_NODES: Final = 2

_HASH_A = np.uint64(0x9E3779B97F4A7C15)
_HASH_B = np.uint64(0xBF58476D1CE4E5B9)


@kernel
def _hash(parent: int, token: int) -> np.uint64:
    return (np.uint64(parent) * _HASH_A) ^ (np.uint64(token) * _HASH_B)


@kernel
def _bucket(c: Int64Array, parent: int, token: int) -> int:
    value = _hash(parent, token)
    return bucket_of(bucket_key(value ^ (value >> np.uint64(29))), c[C_NUM_BUCKETS], c[C_BUCKET_MASK])


@kernel
def child_of(c: Int64Array, parent: int, token: int) -> int:
    """The child of a node that carries a token; 0 if there is none."""
    nodes = int32_at(c[C_NODES])
    node = int(int32_at(c[C_BUCKETS])[_bucket(c, parent, token)])
    while node > 0:
        at = node * NODE_WIDTH
        if nodes[at + N_TOKEN] == token and nodes[at + N_PARENT] == parent:
            return int(node)
        node = int(nodes[at + N_CHAIN])
    return 0


@kernel
def walk(c: Int64Array, tokens: Int32Array, start: int, stop: int) -> int:
    """The node of ``tokens[start:stop]``; 0 if that string does not occur."""
    node = 0
    for i in range(start, stop):
        node = child_of(c, node, tokens[i])
        if node == 0:
            return 0
    return node


@kernel
def _split_bucket(c: Int64Array) -> None:
    """Open one more bucket and move to it the nodes of the bucket that it splits."""
    nodes = int32_at(c[C_NODES])
    buckets = int32_at(c[C_BUCKETS])
    fresh = c[C_NUM_BUCKETS]
    if fresh > c[C_BUCKET_MASK]:
        c[C_BUCKET_MASK] = 2 * c[C_BUCKET_MASK] + 1
    old = fresh & (c[C_BUCKET_MASK] >> 1)
    c[C_NUM_BUCKETS] = fresh + 1
    buckets[fresh] = 0
    node = int(buckets[old])
    buckets[old] = 0
    while node > 0:
        at = node * NODE_WIDTH
        following = int(nodes[at + N_CHAIN])
        bucket = _bucket(c, nodes[at + N_PARENT], nodes[at + N_TOKEN])
        nodes[at + N_CHAIN] = buckets[bucket]
        buckets[bucket] = node
        node = following


@kernel
def _add_child(c: Int64Array, parent: int, token: int) -> int:
    """A new child with count 0, last of its siblings but for the head's place; 0 if the trie is full."""
    nodes = int32_at(c[C_NODES])
    if c[C_FREE] > 0:
        node = c[C_FREE]
        c[C_FREE] = nodes[node * NODE_WIDTH + N_CHAIN]
        c[C_NUM_FREE] -= 1
    elif c[C_NUM_NODES] < c[C_MAX_NODES]:
        node = c[C_NUM_NODES]
        c[C_NUM_NODES] += 1
    else:
        return 0
    if c[C_NUM_BUCKETS] < c[C_NUM_NODES] and c[C_NUM_BUCKETS] < c[C_MAX_NODES]:
        _split_bucket(c)
    at = node * NODE_WIDTH
    nodes[at + N_TOKEN] = token
    nodes[at + N_PARENT] = parent
    nodes[at + N_CHILD] = 0
    nodes[at + N_COUNT] = 0
    buckets = int32_at(c[C_BUCKETS])
    bucket = _bucket(c, parent, token)
    nodes[at + N_CHAIN] = buckets[bucket]
    buckets[bucket] = node
    head = int(nodes[parent * NODE_WIDTH + N_CHILD])
    if head == 0:
        nodes[parent * NODE_WIDTH + N_CHILD] = node
        nodes[at + N_NEXT] = 0
        nodes[at + N_PREVIOUS] = 0
    else:
        _insert_after(nodes, head, node)
    return int(node)


@kernel
def _insert_after(nodes: Int32Array, sibling: int, node: int) -> None:
    following = int(nodes[sibling * NODE_WIDTH + N_NEXT])
    nodes[node * NODE_WIDTH + N_PREVIOUS] = sibling
    nodes[node * NODE_WIDTH + N_NEXT] = following
    nodes[sibling * NODE_WIDTH + N_NEXT] = node
    if following > 0:
        nodes[following * NODE_WIDTH + N_PREVIOUS] = node


@kernel
def _unlink_sibling(nodes: Int32Array, node: int) -> None:
    before = int(nodes[node * NODE_WIDTH + N_PREVIOUS])
    following = int(nodes[node * NODE_WIDTH + N_NEXT])
    if before > 0:
        nodes[before * NODE_WIDTH + N_NEXT] = following
    else:
        nodes[int(nodes[node * NODE_WIDTH + N_PARENT]) * NODE_WIDTH + N_CHILD] = following
    if following > 0:
        nodes[following * NODE_WIDTH + N_PREVIOUS] = before


@kernel
def _make_head(nodes: Int32Array, node: int) -> None:
    parent = int(nodes[node * NODE_WIDTH + N_PARENT])
    if nodes[parent * NODE_WIDTH + N_CHILD] == node:
        return
    _unlink_sibling(nodes, node)
    head = int(nodes[parent * NODE_WIDTH + N_CHILD])
    nodes[node * NODE_WIDTH + N_PREVIOUS] = 0
    nodes[node * NODE_WIDTH + N_NEXT] = head
    nodes[head * NODE_WIDTH + N_PREVIOUS] = node
    nodes[parent * NODE_WIDTH + N_CHILD] = node


@kernel
def _restore_head(nodes: Int32Array, parent: int) -> None:
    """After a count fell: put the most frequent child first."""
    node = int(nodes[parent * NODE_WIDTH + N_CHILD])
    best = node
    while node > 0:
        if nodes[node * NODE_WIDTH + N_COUNT] > nodes[best * NODE_WIDTH + N_COUNT]:
            best = node
        node = int(nodes[node * NODE_WIDTH + N_NEXT])
    if best > 0:
        _make_head(nodes, best)


@kernel
def append_windows(c: Int64Array, windows: Int32Array, new: Int32Array, start: int, stop: int) -> bool:
    """Append ``new[start:stop]`` to the text whose open windows are in ``windows``.

    Args:
        c: header.
        windows: [W_NODES + depth + 1] int32, in and out: zeros for a new text.
        new: tokens.
        start: of the tokens to append.
        stop: likewise.

    Returns:
        False if the trie ran full: the rest was not counted.
    """
    nodes = int32_at(c[C_NODES])
    depth = c[C_DEPTH]
    if windows[W_EPOCH] != c[C_EPOCH]:
        windows[W_EPOCH] = c[C_EPOCH]
        windows[W_OPEN] = 0
    for i in range(start, stop):
        token = new[i]
        if windows[W_OPEN] == depth:  # the longest window is complete
            for w in range(W_NODES, W_NODES + depth - 1):
                windows[w] = windows[w + 1]
            windows[W_OPEN] -= 1
        windows[W_NODES + windows[W_OPEN]] = 0  # a new window begins at the root
        windows[W_OPEN] += 1
        nodes[N_COUNT] += 1
        for w in range(W_NODES, W_NODES + windows[W_OPEN]):
            parent = int(windows[w])
            node = child_of(c, parent, token)
            if node == 0:
                node = _add_child(c, parent, token)
                if node == 0:
                    windows[W_OPEN] = 0
                    return False
            at = node * NODE_WIDTH
            nodes[at + N_COUNT] += 1
            head = int(nodes[parent * NODE_WIDTH + N_CHILD])
            if nodes[at + N_COUNT] > nodes[head * NODE_WIDTH + N_COUNT]:
                _make_head(nodes, node)
            windows[w] = node
    return True


@kernel
def _free_node(c: Int64Array, node: int) -> None:
    """Return a node without children."""
    nodes = int32_at(c[C_NODES])
    buckets = int32_at(c[C_BUCKETS])
    at = node * NODE_WIDTH
    bucket = _bucket(c, nodes[at + N_PARENT], nodes[at + N_TOKEN])
    other = int(buckets[bucket])
    if other == node:
        buckets[bucket] = nodes[at + N_CHAIN]
    else:
        while nodes[other * NODE_WIDTH + N_CHAIN] != node:
            other = int(nodes[other * NODE_WIDTH + N_CHAIN])
        nodes[other * NODE_WIDTH + N_CHAIN] = nodes[at + N_CHAIN]
    _unlink_sibling(nodes, node)
    nodes[at + N_TOKEN] = -1
    nodes[at + N_COUNT] = 0
    nodes[at + N_CHAIN] = c[C_FREE]
    c[C_FREE] = node
    c[C_NUM_FREE] += 1


@kernel
def _free_subtree(c: Int64Array, top: int) -> None:
    """Return a node and all below it, children first, without recursion."""
    nodes = int32_at(c[C_NODES])
    node = top
    while True:
        child = int(nodes[node * NODE_WIDTH + N_CHILD])
        if child > 0:
            node = child
            continue
        parent = int(nodes[node * NODE_WIDTH + N_PARENT])
        _free_node(c, node)
        if node == top:
            return
        node = parent


@kernel
def remove_windows(c: Int64Array, tokens: Int32Array) -> None:
    """Uncount every window of a text that was appended as a whole; strings that no other text has are freed."""
    nodes = int32_at(c[C_NODES])
    c[C_EPOCH] += 1
    for start in range(tokens.shape[0]):
        nodes[N_COUNT] = max(nodes[N_COUNT] - 1, 0)
        node = 0
        for i in range(start, min(start + c[C_DEPTH], tokens.shape[0])):
            parent = node
            node = child_of(c, parent, tokens[i])
            if node == 0:
                break  # pruned already
            at = node * NODE_WIDTH
            nodes[at + N_COUNT] -= 1
            if nodes[at + N_COUNT] <= 0:
                _free_subtree(c, node)
                _restore_head(nodes, parent)
                break
            _restore_head(nodes, parent)


@kernel
def decay(c: Int64Array, least: int) -> int:
    """Halve every count and free the nodes whose count is then below ``least``; returns how many nodes are left."""
    nodes = int32_at(c[C_NODES])
    c[C_EPOCH] += 1
    for node in range(1, c[C_NUM_NODES]):
        nodes[node * NODE_WIDTH + N_COUNT] >>= 1
    nodes[N_COUNT] >>= 1
    for node in range(1, c[C_NUM_NODES]):
        at = node * NODE_WIDTH
        if nodes[at + N_TOKEN] >= 0 and nodes[at + N_COUNT] < least:
            _free_subtree(c, node)
    return int(c[C_NUM_NODES] - c[C_NUM_FREE])
