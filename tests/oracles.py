"""Slow and obvious versions of fast things, shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.types import DraftTree


def match_path(tree: DraftTree, target_ids: Sequence[int]) -> tuple[list[int], int]:
    """Accepted nodes (root excluded) and bonus token of the match rule, by looking for a child again and again."""
    nodes: list[int] = []
    node = 0
    while True:
        wanted = target_ids[node]
        children = [i for i in range(1, len(tree)) if tree.parents[i] == node and tree.token_ids[i] == wanted]
        if not children:
            return nodes, int(wanted)
        (node,) = children  # siblings carry different tokens
        nodes.append(node)


def random_tree(rng: np.random.Generator, vocab_size: int, max_draft_tokens: int, root: int = 0) -> DraftTree:
    """A tree of random shape with random tokens; sometimes the root alone."""
    token_ids, parents = [root], [-1]
    taken: set[tuple[int, int]] = set()
    for _ in range(int(rng.integers(0, max_draft_tokens + 1))):
        edge = (int(rng.integers(0, len(parents))), int(rng.integers(0, vocab_size)))
        if edge not in taken:
            taken.add(edge)
            parents.append(edge[0])
            token_ids.append(edge[1])
    return DraftTree(np.array(token_ids, dtype=np.int32), np.array(parents, dtype=np.int32))
