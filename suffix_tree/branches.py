"""Branch retrieval for trie lookahead: one tree from two counting tries, the request's own and the tenant's.

Source: PainlessInferenceAcceleration (Zhao et al. 2023, 2312.12728), its hierarchical mode: the branches that follow
the last tokens are merged by prefix, the own text's counts outweighing the tenant's. Two things differ. The tree grows
by calibrated acceptance instead of raw frequency, and what a shorter query finds is taken only where the longer one
finds too little.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree.counting import C_NODES, N_CHILD, N_COUNT, N_NEXT, N_TOKEN, NODE_WIDTH, child_of, walk
from specdec.suffix_tree.memory import Int32Array, Int64Array, int32_at, kernel

__all__ = ["BRANCH_CELLS", "branch_outcomes", "grow_branches"]

FloatArray = npt.NDArray[np.float32]
f4 = np.float32
TENANT_WEIGHT = f4(1e-4)  # of a tenant's count against an own count, as published: it breaks ties
MAX_SIBLINGS = 32  # children looked at per trie node, the most frequent one among them
MAX_OPEN = 2048
SHARES = 10
LEVELS = 6
COUNTS = 4
BRANCH_CELLS = 2 * LEVELS * COUNTS * SHARES
# Columns of an open branch.
_O_TOKEN, _O_PARENT, _O_OWN, _O_TENANT, _O_DEPTH, _O_CELL, _O_WIDTH = range(7)


@kernel
def _cell(is_own: bool, depth: int, count: int, share: np.float32) -> int:
    level = min(depth, LEVELS - 1)
    often = 0 if count < 2 else (1 if count < 4 else (2 if count < 16 else 3))
    part = min(int(share * f4(SHARES)), SHARES - 1)
    return ((int(is_own) * LEVELS + level) * COUNTS + often) * SHARES + part


@kernel
def _open_children(
    own: Int64Array, tenant: Int64Array, own_node: int, tenant_node: int, parent: int, depth: int, value: np.float32,
    rates: FloatArray, items: Int32Array, values: FloatArray, count: int,
) -> int:  # fmt: skip
    """Add the children of a merged node to the open branches; returns their new number."""
    nodes_own = int32_at(own[C_NODES])
    nodes_tenant = int32_at(tenant[C_NODES])
    first = count
    total = f4(0.0)
    if own_node > 0:
        child = int(nodes_own[own_node * NODE_WIDTH + N_CHILD])
        while child > 0 and count - first < MAX_SIBLINGS and count < MAX_OPEN:
            at = child * NODE_WIDTH
            items[count * _O_WIDTH + _O_TOKEN] = nodes_own[at + N_TOKEN]
            items[count * _O_WIDTH + _O_OWN] = child
            items[count * _O_WIDTH + _O_TENANT] = (
                child_of(tenant, tenant_node, nodes_own[at + N_TOKEN]) if tenant_node > 0 else 0
            )
            total += f4(nodes_own[at + N_COUNT])
            count += 1
            child = int(nodes_own[at + N_NEXT])
    if tenant_node > 0:
        child = int(nodes_tenant[tenant_node * NODE_WIDTH + N_CHILD])
        looked = 0
        while child > 0 and looked < MAX_SIBLINGS and count < MAX_OPEN:
            at = child * NODE_WIDTH
            looked += 1
            if own_node == 0 or child_of(own, own_node, nodes_tenant[at + N_TOKEN]) == 0:
                items[count * _O_WIDTH + _O_TOKEN] = nodes_tenant[at + N_TOKEN]
                items[count * _O_WIDTH + _O_OWN] = 0
                items[count * _O_WIDTH + _O_TENANT] = child
                total += f4(nodes_tenant[at + N_COUNT]) * (TENANT_WEIGHT if own_node > 0 else f4(1.0))
                count += 1
            child = int(nodes_tenant[at + N_NEXT])
    for i in range(first, count):
        at = i * _O_WIDTH
        is_own = items[at + _O_OWN] > 0
        if is_own:
            number = nodes_own[items[at + _O_OWN] * NODE_WIDTH + N_COUNT]
            weight = f4(number)
        else:
            number = nodes_tenant[items[at + _O_TENANT] * NODE_WIDTH + N_COUNT]
            weight = f4(number) * (TENANT_WEIGHT if own_node > 0 else f4(1.0))
        cell = _cell(is_own, depth, number, weight / total)
        items[at + _O_PARENT] = parent
        items[at + _O_DEPTH] = depth
        items[at + _O_CELL] = cell
        values[i] = value * rates[cell]
    return count


@kernel
def grow_branches(
    own: Int64Array, tenant: Int64Array, text: Int32Array, query: int, budget: int, least: float, rates: FloatArray,
    tree: Int32Array, values: FloatArray,
) -> int:  # fmt: skip
    """The likeliest nodes that follow the last ``query`` tokens of ``text``, best first.

    Args:
        own: header of the request's trie.
        tenant: header of the tenant's trie.
        text: committed tokens.
        query: how many of the last tokens are looked up.
        budget: most nodes.
        least: no node whose path is accepted with less than this probability.
        rates: [BRANCH_CELLS] float32: acceptance by cell.
        tree: [3, budget + 1] int32 out: tokens, parents (the root is 0), cells; column 0 is the root.
        values: [budget + 1] float32 out.

    Returns:
        Number of nodes, the root included.
    """
    length = text.shape[0]
    tree[0, 0] = text[length - 1]
    tree[1, 0] = -1
    values[0] = f4(1.0)
    if length < query:
        return 1
    own_node = walk(own, text, length - query, length)
    tenant_node = walk(tenant, text, length - query, length)
    items = np.empty(MAX_OPEN * _O_WIDTH, np.int32)
    likely = np.empty(MAX_OPEN, f4)
    count = _open_children(own, tenant, own_node, tenant_node, 0, 0, f4(1.0), rates, items, likely, 0)
    size = 1
    while size <= budget and count > 0:
        best = 0
        for i in range(1, count):
            if likely[i] > likely[best]:
                best = i
        if likely[best] < least:
            break
        at = best * _O_WIDTH
        tree[0, size] = items[at + _O_TOKEN]
        tree[1, size] = items[at + _O_PARENT]
        tree[2, size] = items[at + _O_CELL]
        values[size] = likely[best]
        own_node = int(items[at + _O_OWN])
        tenant_node = int(items[at + _O_TENANT])
        depth = int(items[at + _O_DEPTH]) + 1
        count -= 1
        likely[best] = likely[count]
        for i in range(_O_WIDTH):
            items[at + i] = items[count * _O_WIDTH + i]
        count = _open_children(
            own, tenant, own_node, tenant_node, size, depth, values[size], rates, items, likely, count
        )
        size += 1
    return size


@kernel
def branch_outcomes(tree: Int32Array, truth: Int32Array, tries: FloatArray, hits: FloatArray) -> None:
    """Count, per cell, which nodes under the true path were right.

    Args:
        tree: [3, N] as ``grow_branches`` wrote it.
        truth: tokens that really came.
        tries: [BRANCH_CELLS] float32, in and out.
        hits: likewise.
    """
    node = 0
    for k in range(truth.shape[0]):
        found = -1
        for i in range(node + 1, tree.shape[1]):
            if tree[1, i] == node:
                tries[tree[2, i]] += f4(1.0)
                if tree[0, i] == truth[k]:
                    hits[tree[2, i]] += f4(1.0)
                    found = i
        if found < 0:
            return
        node = found
