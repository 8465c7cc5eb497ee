"""The rejection family: rules that test target over draft probabilities, as pure functions.

They keep the target's law only for *honest* drafts: children drawn from the law that the tree states, in the order in
which the tree lists them, from a shape that no drawn token at or below it had a say in. Match needs none of that.

A rule gets one tree with its laws and a function ``accept(probability) -> bool``, which flips its coins. Production
passes keyed uniforms; the tests pass every outcome in turn and so add up the exact law of what stands here.

Laws are float64 rows: p [N, V] after every node, q [N, V] over the children of every node (rows of leaves are not
read). A rule returns the last accepted node and the weights [V], not necessarily normalised, of the bonus token.

Sources: chain: Leviathan et al. 2023, Chen et al. 2023; block: Sun et al. 2024 (arXiv 2403.10444), algorithm 2;
SpecInfer's multi-step rule: Miao et al. 2023 (2305.09781); without replacement: Jeon et al. 2024 (2402.14160), Chen et
al. 2024 (2402.12374); traversal: Weng et al. 2025 (2505.12398).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import InternalError
from specdec.protocols import Draws
from specdec.types import DraftTree

__all__ = ["RULES", "Accept", "RatioRule", "block", "recursive", "specinfer", "traversal"]

Accept = Callable[[float], bool]
Rule = Callable[[DraftTree, Tensor, Tensor, Accept], tuple[int, Tensor]]


@dataclass(frozen=True, slots=True)
class RatioRule:
    """One rule and which drafts it is lossless for."""

    decide: Rule
    draws: frozenset[Draws]


def recursive(tree: DraftTree, p: Tensor, q: Tensor, accept: Accept) -> tuple[int, Tensor]:
    """Child after child, drawn without replacement: a rejected token leaves q. On a chain: the classic ratio test."""
    return _child_by_child(tree, p, q, accept, is_replaced=False)


def specinfer(tree: DraftTree, p: Tensor, q: Tensor, accept: Accept) -> tuple[int, Tensor]:
    """Child after child, drawn independently: q stays as it is, and equal draws are children of their own."""
    return _child_by_child(tree, p, q, accept, is_replaced=True)


def _child_by_child(tree: DraftTree, p: Tensor, q: Tensor, accept: Accept, *, is_replaced: bool) -> tuple[int, Tensor]:
    children = _children(tree)
    node = 0
    while True:
        law, draft = p[node], q[node]
        for child in children[node]:
            token_id = int(tree.token_ids[child])
            if accept(_ratio(float(law[token_id]), float(draft[token_id]), token_id)):
                node = child
                break
            law = _residual(law, draft)
            if not is_replaced:
                draft = _without(draft, token_id)
        else:
            return node, law


def block(tree: DraftTree, p: Tensor, q: Tensor, accept: Accept) -> tuple[int, Tensor]:
    """A chain as a whole: accepts at least as many tokens as testing one by one, from the same laws.

    Raises:
        InternalError: the tree is no chain.
    """
    if not tree.is_chain:
        raise InternalError("block verification is defined for chains, got a tree with branches")
    length = tree.num_draft_tokens
    reach = [1.0]  # P_i: how likely the first i tokens may stand
    for i, token_id in enumerate(tree.token_ids[1:].tolist()):
        weight = reach[-1] * float(p[i, token_id]) if reach[-1] > 0 else 0.0  # below the impossible p is not defined
        reach.append(_ratio(weight, float(q[i, token_id]), token_id))
    for i in range(length, 0, -1):
        chance = reach[i]
        if chance > 0 and i < length:
            mass = float((reach[i] * p[i] - q[i]).clamp_min(0).sum())
            left = mass + 1 - reach[i]
            chance = mass / left if left > 0 else 1.0
        if accept(chance):
            return i, p[i] if i == length else _residual(reach[i] * p[i], q[i], otherwise=p[i])
    return 0, _residual(p[0], q[0]) if length else p[0]


def traversal(tree: DraftTree, p: Tensor, q: Tensor, accept: Accept) -> tuple[int, Tensor]:
    """Leaves first, left to right; children drawn without replacement. On a chain it is block verification.

    A leaf that is not accepted is cut off, and what it leaves over goes to its parent's other children; so a path is
    judged as a whole before any of its tokens is.
    """
    children = _children(tree)
    law, draft = list(p), list(q)
    chance = [1.0] * len(tree)  # a(v): that the path to v may stand; 0 where an ancestor is impossible

    def refresh(node: int) -> None:
        """Recompute the chances of everything below a node."""
        for child in children[node]:
            token_id = int(tree.token_ids[child])
            # Below an impossible token p is not defined.
            weight = chance[node] * float(law[node][token_id]) if chance[node] > 0 else 0.0
            chance[child] = _ratio(weight, float(draft[node][token_id]), token_id)
            refresh(child)

    refresh(0)
    while True:
        leaf = 0
        while children[leaf]:
            leaf = children[leaf][0]
        if leaf == 0 or (chance[leaf] > 0 and accept(chance[leaf])):
            return leaf, law[leaf]
        parent = int(tree.parents[leaf])
        children[parent].pop(0)
        if chance[parent] > 0:
            left_over = (chance[parent] * law[parent] - draft[parent]).clamp_min(0)
            mass = float(left_over.sum())
            rest = mass + 1 - chance[parent]
            chance[parent] = mass / rest if rest > 0 else 1.0
            if mass > 0:
                law[parent] = left_over / mass
        draft[parent] = _without(draft[parent], int(tree.token_ids[leaf]))
        refresh(parent)


RULES: Mapping[str, RatioRule] = {
    "chain": RatioRule(recursive, frozenset({"chain"})),
    "block": RatioRule(block, frozenset({"chain"})),
    "specinfer": RatioRule(specinfer, frozenset({"chain", "with_replacement"})),
    "rrsw": RatioRule(recursive, frozenset({"chain", "without_replacement"})),
    "traversal": RatioRule(traversal, frozenset({"chain", "without_replacement"})),
}


def _children(tree: DraftTree) -> list[list[int]]:
    """Children of every node in the order of their draws."""
    children: list[list[int]] = [[] for _ in range(len(tree))]
    for node, parent in enumerate(tree.parents[1:].tolist(), start=1):
        children[parent].append(node)
    return children


def _ratio(weight: float, drawn: float, token_id: int) -> float:
    """min(1, weight / drawn).

    Raises:
        InternalError: a token was drafted that its stated law could not have drawn.
    """
    if not drawn > 0:
        raise InternalError(f"token {token_id} was drafted, but the stated draft law gives it probability {drawn}")
    return min(1.0, weight / drawn)


def _residual(law: Tensor, draft: Tensor, *, otherwise: Tensor | None = None) -> Tensor:
    """norm(max(law - draft, 0)); where nothing is left the case has probability 0 up to rounding: ``otherwise``."""
    left_over = (law - draft).clamp_min(0)
    mass = left_over.sum()
    if mass > 0:
        return left_over / mass
    return law if otherwise is None else otherwise


def _without(draft: Tensor, token_id: int) -> Tensor:
    """The draft law with one token taken out and the rest normalised; all zero where it was the only one."""
    rest = draft.clone()
    rest[token_id] = 0
    mass = rest.sum()
    return rest / mass if mass > 0 else torch.zeros_like(rest)
