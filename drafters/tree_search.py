"""Grows draft trees level by level, best first, for a batch of requests; knows scores, not models.

Two published searches are one algorithm with other limits. Every level, the ``width`` best nodes of the level before
are expanded into their ``top_k`` best children; all children are candidates; in the end the best candidates by path
value form the tree. A value never exceeds its parent's, so the best n are a connected subtree, and of all subtrees of n
nodes they have the largest sum of values, which is the expected acceptance length if values are true probabilities.

- EAGLE-2 (Li et al. 2024, arXiv 2406.16858, section 4): ``top_k = width = 10``, a fixed depth.
- OPT-Tree (Wang et al. 2024, arXiv 2406.17276, algorithm 1): ``top_k = width = budget``, and another level only while
  the last one raised the expected length by more than a threshold: the cost of a draft level in target steps. With
  measured costs the threshold follows from them: a level must bring its tokens as cheaply as the step did so far.
- A chain is ``top_k = width = 1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specdec.types import DraftTree, IntArray

__all__ = ["Frontier", "LevelCosts", "SearchLimits", "TreeSearch"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LevelCosts:
    """Times in one unit: of a further level of a draft, and of the rest of a step (reading, target, verification)."""

    level: float
    rest: float


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """How a tree may grow.

    Args:
        top_k: children per expanded node, >= 1.
        width: nodes expanded per level, >= 1.
        depth: most levels, >= 1.
        min_gain: stop once a level raises the expected acceptance length by no more than this; None: never.
        costs: stop where another level would bring fewer tokens for its time than the step so far; None: never.
    """

    top_k: int
    width: int
    depth: int
    min_gain: float | None = None
    costs: LevelCosts | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """The nodes of the newest level that are to be expanded, best first.

    Args:
        token_ids: [W] int32.
        parents: [W] int32: places in the *previous* frontier; -1: the root.
        depth: of these nodes; 1 = children of the root.
    """

    token_ids: IntArray
    parents: IntArray
    depth: int


class TreeSearch:
    """One request's search.

    Args:
        root: the last committed token.
        budget: most draft tokens.
        limits: of the tree; levels that could not enter it are not grown.

    Example:
        >>> search = TreeSearch(7, 3, SearchLimits(top_k=2, width=2, depth=2))
        >>> frontier = search.add(np.array([[5, 6]]), np.log([[0.6, 0.3]]))  # the root's children
        >>> frontier.token_ids.tolist(), frontier.parents.tolist()
        ([5, 6], [-1, -1])
        >>> search.add(np.array([[1, 2], [3, 4]]), np.log([[0.9, 0.1], [0.5, 0.5]])) is None
        True
        >>> tree = search.tree()
        >>> tree.token_ids.tolist(), tree.parents.tolist()
        ([7, 5, 6, 1], [-1, 0, 0, 1])
    """

    def __init__(self, root: int, budget: int, limits: SearchLimits) -> None:
        self._root, self._budget, self._limits = root, budget, limits
        self._depth = 0
        self._token_ids: list[IntArray] = []
        self._parents: list[npt.NDArray[np.int64]] = []  # indices among all candidates; -1: the root
        self._values: list[Floats] = []  # log of the path's value
        self._num_candidates = 0
        self._frontier = np.array([-1])  # candidates to be expanded now
        self._frontier_values = np.zeros(1)
        self._expected = 0.0
        self._gain: float | None = None  # of the level before

    def add(self, token_ids: npt.NDArray[np.integer], log_probs: Floats) -> Frontier | None:
        """Take the children of the present frontier (at first: of the root).

        Args:
            token_ids: [W, K] candidates of every frontier node, K <= ``top_k``.
            log_probs: [W, K] log of the chance of each, given its parent.

        Returns:
            What is to be expanded next, or None: the tree is done.
        """
        values = (log_probs + self._frontier_values[:, None]).ravel()
        first = self._num_candidates
        width, num_children = token_ids.shape
        self._token_ids.append(token_ids.ravel().astype(np.int32))
        self._parents.append(np.repeat(self._frontier, num_children))
        self._values.append(values)
        self._num_candidates += len(values)
        self._depth += 1
        best = _best(values, self._limits.width)
        if self._is_done(values[best]):
            return None
        frontier = Frontier(
            self._token_ids[-1][best], (np.arange(width).repeat(num_children)[best]).astype(np.int32), self._depth
        )
        if self._depth == 1:
            frontier = Frontier(frontier.token_ids, np.full(len(best), -1, dtype=np.int32), 1)
        self._frontier, self._frontier_values = first + best, values[best]
        return frontier

    def _is_done(self, frontier_values: Floats) -> bool:
        if self._depth >= min(self._limits.depth, self._budget):
            return True
        values = np.concatenate(self._values)
        chosen = values[_best(values, self._budget)]
        if len(chosen) == self._budget and frontier_values[0] <= chosen.min():
            return True  # no deeper node can displace one of these
        expected = float(np.exp(chosen).sum())
        gain, self._expected = expected - self._expected, expected
        is_dear = self._limits.costs is not None and self._is_dear(gain, self._limits.costs)
        self._gain = gain
        return is_dear or (self._limits.min_gain is not None and gain <= self._limits.min_gain)

    def _is_dear(self, gain: float, costs: LevelCosts) -> bool:
        """True if the next level is likely to lower the step's tokens per time.

        Gains are taken to shrink on as they just did: the next is gain * gain / (the one before).
        """
        following = gain * min(1.0, gain / self._gain) if self._gain else gain
        spent = costs.rest + (self._depth - 1) * costs.level  # the first level came with reading the text
        return following * spent <= (1 + self._expected) * costs.level

    def tree(self) -> DraftTree:
        """The best candidates within the budget, with their path values; parents before children."""
        if not self._values or self._budget < 1:
            return DraftTree.root_only(self._root)
        values = np.concatenate(self._values)
        chosen = np.sort(_best(values, self._budget))  # candidates stand level by level: parents come first
        chosen = chosen[values[chosen] > -np.inf]  # what is impossible is no guess
        node_of = np.full(len(values) + 1, 0)  # the last entry is that of parent -1: the root
        node_of[chosen] = np.arange(1, len(chosen) + 1)
        parents = node_of[np.concatenate(self._parents)[chosen]]
        return DraftTree(
            np.concatenate([[self._root], np.concatenate(self._token_ids)[chosen]]).astype(np.int32),
            np.concatenate([[-1], parents]).astype(np.int32),
            np.concatenate([[1.0], np.exp(values[chosen]).clip(0, 1)]).astype(np.float32),
        )


def _best(values: Floats, count: int) -> npt.NDArray[np.int64]:
    """Indices of the ``count`` largest values, largest first; of equal ones the first."""
    return np.argsort(-values, kind="stable")[:count]
