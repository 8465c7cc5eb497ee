"""Slow and obvious versions of fast things, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def common_length(text: Sequence[int], end: int, limit: int) -> int:
    """How many tokens before and at ``end`` equal those at the end of ``text``."""
    length = 0
    while length < limit and end - length >= 0 and text[end - length] == text[-1 - length]:
        length += 1
    return length


def ngram_copies(text: Sequence[int], orders: range, max_candidates: int, max_branches: int) -> list[tuple[int, int]]:
    """(end, tokens in common) of the earlier places that a prompt lookup copies from, best first, by full search."""
    found: list[int] = []
    for n in reversed(orders):
        for end in range(len(text) - 2, -1, -1):
            if end not in found and common_length(text, end, n) == n and len(found) < max_candidates:
                found.append(end)
    copies = [(end, common_length(text, end, 32)) for end in found]
    return sorted(copies, key=lambda copy: -copy[1])[:max_branches]


def ngram_paths(
    text: Sequence[int],
    copies: Sequence[tuple[int, int]],
    limits: tuple[int, int, float],
    rate: Callable[[int, int], np.float32],
) -> list[tuple[tuple[int, ...], np.float32]]:
    """(path of tokens, value) of the draft nodes that continue ``copies``, in the order they are taken."""
    budget, max_depth, min_value = limits
    values: dict[tuple[int, ...], np.float32] = {(): np.float32(1)}
    while len(values) <= budget:
        options = []
        for end, in_common in copies:
            period = list(text[end + 1 :])
            future = tuple((period * max_depth)[:max_depth])
            depth = next((d for d in range(max_depth) if future[: d + 1] not in values), None)
            if depth is not None:
                rank = sum(len(path) == depth + 1 and path[:-1] == future[:depth] for path in values)
                options.append((values[future[:depth]] * rate(in_common + depth, rank), future[: depth + 1]))
        if not options:
            break
        value, path = max(options, key=lambda option: option[0])
        if value < min_value:
            break
        values[path] = value
    return list(values.items())[1:]
