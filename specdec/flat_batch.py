"""The chunks of a step as one flat row of tokens: who is whose, at which position, and under whom in its tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from specdec.errors import InternalError
from specdec.query_layout import QueryLayout
from specdec.types import Chunk, IntArray

__all__ = ["FlatBatch", "flatten", "warm_up"]


@dataclass(frozen=True, slots=True, eq=False)
class FlatBatch:
    """All chunks of a step as one row of T tokens."""

    layouts: list[QueryLayout]
    input_ids: npt.NDArray[np.int64]  # [T]
    positions: npt.NDArray[np.int64]  # [T]
    tree_rows: npt.NDArray[np.int64]  # flat rows of the trees' nodes, tree after tree
    cu_nodes: IntArray  # [trees + 1]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _expand(
    spans: npt.NDArray[np.int64],
    parents: IntArray,
    positions: npt.NDArray[np.int64],
    ancestors: npt.NDArray[np.bool_],
    tree_rows: npt.NDArray[np.int64],
) -> int:
    """Positions and ancestors of a flat batch, in one pass.

    Args:
        spans: [R, 3] int64: context length, prefix tokens and tree nodes of each chunk.
        parents: the trees' parents, tree after tree.
        positions: [T] int64, written: context length + depth in the chunk.
        ancestors: [sum of T_r * T_r] bool, all False, written: per chunk a matrix, (i, j) True if j is i or above it.
        tree_rows: [nodes] int64, written: the flat rows of the trees' nodes.

    Returns:
        -1, or the first node (among all trees' nodes) whose parent is not a node before it in its own tree.
    """
    start = 0
    first_node = 0
    first_bit = 0
    for chunk in range(len(spans)):
        num_cached, num_prefix, num_nodes = spans[chunk]
        num_tokens = num_prefix + num_nodes
        for token in range(num_tokens):
            above = token - 1
            node = token - num_prefix
            if node >= 0:
                tree_rows[first_node + node] = start + token
                parent = parents[first_node + node]
                if (parent != -1 if node == 0 else parent < 0) or parent >= node:
                    return int(first_node + node)
                above = num_prefix + parent
            row = first_bit + token * num_tokens
            if above >= 0:
                positions[start + token] = positions[start + above] + 1
                for column in range(above + 1):
                    ancestors[row + column] = ancestors[first_bit + above * num_tokens + column]
            else:
                positions[start + token] = num_cached
            ancestors[row + token] = True
        start += num_tokens
        first_node += num_nodes
        first_bit += num_tokens * num_tokens
    return -1


def flatten(chunks: Sequence[Chunk]) -> FlatBatch:
    """Lay the chunks out one after the other.

    Raises:
        InternalError: a tree's parents break their rule.
    """
    ids: list[IntArray] = []
    parents: list[IntArray] = [np.empty(0, dtype=np.int32)]
    spans: list[tuple[int, int, int]] = []
    cu_nodes = [0]
    for chunk in chunks:
        ids.append(chunk.prefix_ids)
        if chunk.tree is not None:
            ids.append(chunk.tree.token_ids)
            parents.append(chunk.tree.parents)
            cu_nodes.append(cu_nodes[-1] + len(chunk.tree))
        spans.append((chunk.state.num_cached, len(chunk.prefix_ids), chunk.num_tokens - len(chunk.prefix_ids)))
    input_ids = np.concatenate(ids, dtype=np.int64)
    positions = np.empty_like(input_ids)
    ancestors = np.zeros(sum((prefix + nodes) ** 2 for _, prefix, nodes in spans), dtype=np.bool_)
    tree_rows = np.empty(cu_nodes[-1], dtype=np.int64)
    bad: int = _expand(np.array(spans, dtype=np.int64), np.concatenate(parents), positions, ancestors, tree_rows)
    if bad >= 0:
        raise InternalError(
            f"a draft tree must have parents[0] = -1 and 0 <= parents[i] < i, but node {bad} of the "
            f"step's trees has parent {np.concatenate(parents)[bad]}"
        )
    layouts: list[QueryLayout] = []
    start = first_bit = 0
    for chunk, (num_cached, num_prefix, num_nodes) in zip(chunks, spans, strict=True):
        size = num_prefix + num_nodes
        matrix = ancestors[first_bit : first_bit + size * size].reshape(size, size)
        layouts.append(
            QueryLayout(chunk.state.request_id, start, size, num_cached, positions[start : start + size], matrix)
        )
        start += size
        first_bit += size * size
    return FlatBatch(layouts, input_ids, positions, tree_rows, np.array(cu_nodes, dtype=np.int32))


def warm_up() -> None:
    """Compile the loop of ``flatten``, so that no request waits for it."""
    empty = np.empty(0, dtype=np.int64)
    _expand(empty.reshape(0, 3), empty.astype(np.int32), empty, empty.astype(np.bool_), empty)
