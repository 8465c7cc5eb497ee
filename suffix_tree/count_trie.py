"""The counting trie as an object: texts go in, come out again, and every string's count can be asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.suffix_tree import counting as at
from specdec.suffix_tree.memory import Int32Array, address_of, reserve_int32

__all__ = ["CountTrie"]


class CountTrie:
    """Counts of all strings up to ``depth`` tokens.

    Args:
        depth: longest string that is counted.
        max_nodes: bound; ``nbytes`` is at most 32 bytes a node.

    Raises:
        ValueError: an argument is outside its rule.
    """

    def __init__(self, depth: int, max_nodes: int) -> None:
        if not 1 <= depth <= 1024:
            raise ValueError(f"depth must be in [1, 1024], got {depth}")
        if not 2 <= max_nodes < (1 << 31):
            raise ValueError(f"max_nodes must be in [2, 2^31), got {max_nodes}")
        self.depth = depth
        self.header = np.zeros(at.COUNT_SLOTS, np.int64)
        self.nodes = reserve_int32(max_nodes * at.NODE_WIDTH)
        self.buckets = reserve_int32(max(max_nodes, at.FIRST_BUCKETS))
        self.header[at.C_NODES] = address_of(self.nodes)
        self.header[at.C_BUCKETS] = address_of(self.buckets)
        self.header[at.C_NUM_NODES] = 1
        self.header[at.C_MAX_NODES] = max_nodes
        self.header[at.C_NUM_BUCKETS] = at.FIRST_BUCKETS
        self.header[at.C_BUCKET_MASK] = 2 * at.FIRST_BUCKETS - 1
        self.header[at.C_DEPTH] = depth

    @property
    def num_nodes(self) -> int:
        """Nodes in use, the root included."""
        return int(self.header[at.C_NUM_NODES] - self.header[at.C_NUM_FREE])

    @property
    def is_crowded(self) -> bool:
        """True if less than an eighth of the nodes is left."""
        return self.num_nodes > int(self.header[at.C_MAX_NODES]) * 7 // 8

    @property
    def nbytes(self) -> int:
        """Bytes touched by nodes and buckets."""
        return 4 * int(self.header[at.C_NUM_NODES] * at.NODE_WIDTH + self.header[at.C_NUM_BUCKETS])

    def new_windows(self) -> Int32Array:
        """The record of a text's open windows, for ``append``."""
        return np.zeros(at.W_NODES + self.depth + 1, np.int32)

    def append(self, windows: Int32Array, tokens: Int32Array) -> bool:
        """Append tokens to the text of ``windows``; False if the trie ran full and the rest was not counted."""
        return bool(at.append_windows(self.header, windows, tokens, 0, len(tokens)))

    def remove(self, tokens: Int32Array) -> None:
        """Uncount a text that was appended from its first to its last token."""
        at.remove_windows(self.header, tokens)

    def decay(self, least: int = 1) -> int:
        """Halve all counts and drop what falls below ``least``; returns the number of nodes left."""
        return int(at.decay(self.header, least))

    def count(self, tokens: Sequence[int] | Int32Array) -> int:
        """How often a string of at most ``depth`` tokens occurs."""
        ids = np.asarray(tokens, np.int32)
        if len(ids) > self.depth:
            raise ValueError(f"strings of at most {self.depth} tokens are counted, got {len(ids)}")
        node = at.walk(self.header, ids, 0, len(ids))
        return int(self.nodes[node * at.NODE_WIDTH + at.N_COUNT]) if node or not len(ids) else 0

    def check_integrity(self) -> None:
        """Walk the whole trie and raise AssertionError with the first broken invariant, in words."""
        nodes = self.nodes.reshape(-1, at.NODE_WIDTH)[: int(self.header[at.C_NUM_NODES])]
        seen = 0
        stack = [0]
        while stack:
            parent = stack.pop()
            seen += 1
            node, before = int(nodes[parent, at.N_CHILD]), 0
            best = int(nodes[node, at.N_COUNT])
            while node:
                row = nodes[node]
                if row[at.N_PARENT] != parent or row[at.N_PREVIOUS] != before:
                    raise AssertionError(f"the trie is damaged: node {node} is not linked to its parent or sibling")
                if row[at.N_COUNT] > best or row[at.N_COUNT] < 1:
                    raise AssertionError(f"the trie is damaged: count {row[at.N_COUNT]} of node {node} is out of order")
                if at.child_of(self.header, parent, int(row[at.N_TOKEN])) != node:
                    raise AssertionError(f"the trie is damaged: node {node} is not found by its token")
                stack.append(node)
                before, node = node, int(row[at.N_NEXT])
        if seen != self.num_nodes:
            raise AssertionError(f"the trie is damaged: {seen} nodes are reached, {self.num_nodes} are in use")
