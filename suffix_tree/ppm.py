"""Prediction by partial matching: the law of the next token, blended over contexts of one to six tokens.

Every context that the text ends with, in the request's own text or in the tenant's outputs, has a say: the tokens that
followed it, by their shares. How much is left to shorter contexts (the escape) is learned by how often a context was
seen and how many different tokens followed it, so that one that was seen once is trusted as far as such ones were right
before. Longer contexts speak first, of equally long ones the own text.

Sources: PPM (Cleary and Witten 1984), its escapes learned in classes of contexts (PPMII, Shkarin 2002); blending in
place of exclusion, and trees of the likeliest continuations, are ours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree.counting import C_NODES, N_CHILD, N_COUNT, N_NEXT, N_TOKEN, NODE_WIDTH, child_of, walk
from specdec.suffix_tree.memory import Int32Array, Int64Array, int32_at, kernel

__all__ = ["MAX_ORDER", "PPM_CELLS", "grow_likeliest", "learn_escapes", "prior_weights"]

FloatArray = npt.NDArray[np.float32]
f4 = np.float32
MAX_ORDER = 6  # tokens of the longest context
_MOST_CHILDREN = 16  # looked at per context, the most frequent one among them
_MOST_TOKENS = 32  # different ones in a blended law
_LEAST = f4(0.004)  # chances below this are not followed up
_SIZES, _WIDTHS = 7, 5  # classes of contexts: times seen, and different tokens that followed, in doublings
_SIDE = MAX_ORDER * _SIZES * _WIDTHS
PPM_CELLS = 2 * _SIDE


def prior_weights() -> FloatArray:
    """[PPM_CELLS] float32: the chance that a context has seen its next token, before anything was learned.

    As Witten and Bell (1991) have it: contexts seen n times with d different successors are trusted by n / (n + d).
    """
    size, width = 2.0 ** np.arange(_SIZES), 2.0 ** np.arange(_WIDTHS)
    cells = size[:, None] / (size[:, None] + np.minimum(width[None, :], size[:, None]))
    return np.tile(cells.ravel(), 2 * MAX_ORDER).astype(np.float32)


@kernel
def _doublings(number: int, most: int) -> int:
    found = 0
    while number > 1 and found < most:
        number >>= 1
        found += 1
    return found


@kernel
def _class_of(c: Int64Array, node: int, order: int, side: int) -> int:
    """The class of a context; -1 if nothing ever followed it."""
    nodes = int32_at(c[C_NODES])
    width = 0
    child = int(nodes[node * NODE_WIDTH + N_CHILD])
    while child > 0 and width < _MOST_CHILDREN:
        width += 1
        child = int(nodes[child * NODE_WIDTH + N_NEXT])
    if width == 0:
        return -1
    size = _doublings(int(nodes[node * NODE_WIDTH + N_COUNT]), _SIZES - 1)
    return side * _SIDE + ((order - 1) * _SIZES + size) * _WIDTHS + _doublings(width, _WIDTHS - 1)


@kernel
def _find_contexts(c: Int64Array, text: Int32Array, stop: int, contexts: Int32Array, first: int) -> None:
    """Write the nodes of the last 1, 2, ... MAX_ORDER tokens of ``text[:stop]``; 0 where a string is unknown."""
    for order in range(1, MAX_ORDER + 1):
        node = 0
        if order <= stop and (order == 1 or contexts[first + order - 2] > 0):
            node = walk(c, text, stop - order, stop)
        contexts[first + order - 1] = node


@kernel
def _follow(c: Int64Array, contexts: Int32Array, above: int, below: int, token: int) -> None:
    """Write the contexts behind one more token."""
    contexts[below] = child_of(c, 0, token)
    for order in range(1, MAX_ORDER):
        before = contexts[above + order - 1]
        contexts[below + order] = child_of(c, before, token) if before > 0 and contexts[below + order - 1] > 0 else 0


@kernel
def _blend(
    own: Int64Array, tenant: Int64Array, contexts: Int32Array, first: int, weights: FloatArray, tokens: Int32Array,
    chances: FloatArray,
) -> int:  # fmt: skip
    """Write the likelier next tokens and their chances; returns how many they are."""
    count = 0
    rest = f4(1.0)
    for level in range(2 * MAX_ORDER):
        order, side = MAX_ORDER - level // 2, level % 2
        c = own if side == 0 else tenant
        node = int(contexts[first + side * MAX_ORDER + order - 1])
        cell = _class_of(c, node, order, side) if node > 0 else -1
        if cell < 0:
            continue
        nodes = int32_at(c[C_NODES])
        each = rest * weights[cell] / f4(max(nodes[node * NODE_WIDTH + N_COUNT], 1))
        child = int(nodes[node * NODE_WIDTH + N_CHILD])
        for _ in range(_MOST_CHILDREN):
            if child == 0:
                break
            at = child * NODE_WIDTH
            chance = each * f4(nodes[at + N_COUNT])
            i = 0
            while i < count and tokens[i] != nodes[at + N_TOKEN]:
                i += 1
            if i < count:
                chances[i] += chance
            elif chance >= _LEAST and count < _MOST_TOKENS:
                tokens[i] = nodes[at + N_TOKEN]
                chances[i] = chance
                count += 1
            child = int(nodes[at + N_NEXT])
        rest *= f4(1.0) - weights[cell]
        if rest < _LEAST:
            break
    return count


@kernel
def grow_likeliest(
    own: Int64Array, tenant: Int64Array, text: Int32Array, budget: int, depth: int, least: float, as_tree: bool,
    weights: FloatArray, tree: Int32Array, values: FloatArray,
) -> int:  # fmt: skip
    """The likeliest nodes behind a text, best first.

    Args:
        own: header of the request's trie.
        tenant: header of the tenant's trie.
        text: committed tokens, at least one.
        budget: most nodes.
        depth: longest path.
        least: no node whose path has a smaller chance.
        as_tree: False: one child a node, the likeliest.
        weights: [PPM_CELLS] float32: the chance that a context of each class has seen its next token.
        tree: [2, budget + 1] int32 out: tokens and parents; column 0 is the root.
        values: [budget + 1] float32 out: chances of the paths.

    Returns:
        Number of nodes, the root included.
    """
    length = text.shape[0]
    tree[0, 0], tree[1, 0], values[0] = text[length - 1], -1, f4(1.0)
    contexts = np.empty((budget + 1) * 2 * MAX_ORDER, np.int32)
    _find_contexts(own, text, length, contexts, 0)
    _find_contexts(tenant, text, length, contexts, MAX_ORDER)
    depths = np.zeros(budget + 1, np.int32)
    open_tokens = np.empty((budget + 1) * _MOST_TOKENS, np.int32)
    open_parents = np.empty((budget + 1) * _MOST_TOKENS, np.int32)
    open_values = np.empty((budget + 1) * _MOST_TOKENS, f4)
    count, size = 0, 1
    while True:
        node = size - 1
        if not as_tree:
            count = 0
        if depths[node] < depth:
            found = _blend(
                own, tenant, contexts, node * 2 * MAX_ORDER, weights, open_tokens[count:], open_values[count:]
            )
            last = count + found
            for i in range(count, last):
                value = open_values[i] * values[node]
                if value >= least:  # children are worth no more, so others never come to be looked at
                    open_tokens[count], open_parents[count], open_values[count] = open_tokens[i], node, value
                    count += 1
        if size > budget or count == 0:
            return size
        best = 0
        for i in range(1, count):
            if open_values[i] > open_values[best]:
                best = i
        parent = open_parents[best]
        tree[0, size], tree[1, size], values[size] = open_tokens[best], parent, open_values[best]
        depths[size] = depths[parent] + 1
        count -= 1
        open_tokens[best], open_parents[best] = open_tokens[count], open_parents[count]
        open_values[best] = open_values[count]
        above, below = parent * 2 * MAX_ORDER, size * 2 * MAX_ORDER
        _follow(own, contexts, above, below, tree[0, size])
        _follow(tenant, contexts, above + MAX_ORDER, below + MAX_ORDER, tree[0, size])
        size += 1


@kernel
def learn_escapes(
    own: Int64Array, tenant: Int64Array, text: Int32Array, first: int, tries: FloatArray, hits: FloatArray
) -> None:
    """Count, for each token from ``text[first]`` on, which contexts had seen it: before they are shown it.

    Args:
        own: header of the request's trie.
        tenant: header of the tenant's trie.
        text: committed tokens.
        first: place of the first new one.
        tries: [PPM_CELLS] float32, in and out: contexts that were asked, longest first, until one had seen the token.
        hits: [PPM_CELLS] float32, in and out: contexts that had.
    """
    contexts = np.empty(2 * MAX_ORDER, np.int32)
    for place in range(max(first, 1), text.shape[0]):
        _find_contexts(own, text, place, contexts, 0)
        _find_contexts(tenant, text, place, contexts, MAX_ORDER)
        for level in range(2 * MAX_ORDER):
            order, side = MAX_ORDER - level // 2, level % 2
            c = own if side == 0 else tenant
            node = int(contexts[side * MAX_ORDER + order - 1])
            cell = _class_of(c, node, order, side) if node > 0 else -1
            if cell < 0:
                continue
            tries[cell] += f4(1.0)
            if child_of(c, node, text[place]) > 0:
                hits[cell] += f4(1.0)
                break
