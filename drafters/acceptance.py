"""How likely a drafted node is, whoever proposed it: calibrated online, per set of sources and depth.

Every source states a value of its own for each node (a frequency, a softmax, a learned probability). What it says about
a node given its parent becomes a log-odds margin; a logistic model over the margins of all sources that proposed the
node gives the probability. There is one such model per set of sources and depth bucket, so it also learns what it means
that two sources agree. It starts from trusting them and is fitted by every step (AdaGrad on the log loss).

- **Censoring.** A node is judged only if its parent came true; then it is judged even if it was not verified, since the
  target's token at its parent is known. What lies behind the last known token teaches nothing.
- **Requests differ.** Each request has a log-odds offset that follows its own errors and fades with a half-life of 32
  tokens.
- **No draw decides.** Margins are known before the target's draw, and under the match rule values cannot bias the text.

Sources: the logistic model on margins, its censoring and its request offset follow the estimator of vLLM's adaptive
verification; mixing several predictions in the logistic domain is Mahoney's (2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from specdec.drafters.fusion_kernels import DEPTHS, NUM_BINS, learn_outcomes, merge_and_price
from specdec.errors import ConfigError
from specdec.tree import DraftTree, FloatArray, IntArray

__all__ = ["MAX_SOURCES", "AcceptanceModel", "MergedTree", "ReliabilityBin"]

MAX_SOURCES = 8
_NO_VALUE = 0.5  # of a path per token, where a source states no values


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """One point of a reliability diagram: of ``count`` nodes that were given ``predicted``, ``observed`` came true."""

    sources: int  # bit s: source s proposed them
    count: int
    predicted: float
    observed: float


@dataclass(slots=True, eq=False)
class MergedTree:
    """Several sources' trees over one root as one; see ``merge_trees`` for the arrays."""

    token_ids: IntArray
    parents: IntArray
    depths: IntArray
    masks: npt.NDArray[np.uint8]
    margins: FloatArray
    chances: FloatArray
    values: FloatArray

    @property
    def expected_accepted(self) -> float:
        """Accepted tokens to be expected if all nodes were verified."""
        return float(self.values[1:].sum())

    def best(self, budget: int) -> DraftTree:
        """The ``budget`` best nodes; values fall along every path, so they are connected."""
        tree = DraftTree(self.token_ids, self.parents, self.values, self.masks)
        if tree.num_draft_tokens <= budget:
            return tree
        # Of equal values the parent stands first, as it does in the arrays.
        chosen = np.sort(np.argsort(-self.values[1:], kind="stable")[: max(budget, 0)]) + 1
        return tree.subtree(np.concatenate([[0], chosen]))


class AcceptanceModel:
    """Calibrates and merges.

    Args:
        num_sources: in [1, 8].

    Raises:
        ConfigError: another number of sources.

    Example:
        >>> model = AcceptanceModel(2)
        >>> chain = DraftTree(np.array([7, 1, 2], np.int32), np.array([-1, 0, 1], np.int32),
        ...                   np.array([1, 0.8, 0.4], np.float32))
        >>> merged = model.merge("r", [chain, DraftTree.root_only(7)])
        >>> merged.token_ids.tolist(), merged.values.round(2).tolist()
        ([7, 1, 2], [1.0, 0.800000011920929, 0.4000000059604645])
        >>> _ = model.learn("r", merged, np.array([1, 5], np.int32))  # 1 was right, 2 was wrong
        >>> model.merge("r", [chain, DraftTree.root_only(7)]).values[2] < 0.4
        True
    """

    def __init__(self, num_sources: int) -> None:
        if not 1 <= num_sources <= MAX_SOURCES:
            raise ConfigError(f"an acceptance model mixes 1 to {MAX_SOURCES} sources, got {num_sources}")
        self.num_sources = num_sources
        masks = np.arange(256)
        members = (masks[:, None] >> np.arange(8)) & 1  # [256, 8]
        size = np.maximum(members.sum(axis=1, keepdims=True), 1)
        # One source alone is believed; several that agree are worth a little more than their mean.
        start = members * np.where(size > 1, 1.3 / size, 1.0)
        weights = np.concatenate([start, np.zeros((256, 1))], axis=1).astype(np.float32)
        self.weights = np.repeat(weights[:, None, :], DEPTHS, axis=1).copy()
        self._squares = np.zeros_like(self.weights)
        self._offsets: dict[str, float] = {}
        self._bins = np.zeros((256, NUM_BINS, 3), dtype=np.float64)

    def merge(self, request_id: str, trees: Sequence[DraftTree]) -> MergedTree:
        """One request's trees as one, with calibrated values.

        Args:
            request_id: whose.
            trees: one per source, in the order of the sources; all have the same root.
        """
        used = [s for s, tree in enumerate(trees) if len(tree) > 1] or [0]
        offset = self._offsets.get(request_id, 0.0)
        if len(used) == 1:
            tree = trees[used[0]]
            ids, parents, values = tree.token_ids, tree.parents, _values(tree)
        else:
            ids = np.concatenate([trees[s].token_ids for s in used])
            parents = np.concatenate([trees[s].parents for s in used])
            values = np.concatenate([_values(trees[s]) for s in used])
        ends = np.array([0, *accumulate(len(trees[s]) for s in used)], dtype=np.int32)
        sources = np.array(used, dtype=np.uint8)
        return MergedTree(*merge_and_price(ids, parents, values, sources, ends, self.weights, offset))

    def learn(self, request_id: str, merged: MergedTree, truth: IntArray, accepted: int | None = None) -> IntArray:
        """Learn what became of a tree; [8] int32: accepted tokens that only each source had.

        Args:
            request_id: whose.
            merged: what ``merge`` gave for it.
            truth: [G] int32: the tokens that the target chose behind the root.
            accepted: how many of them were draft tokens that were verified; None: all that the tree had.
        """
        extra = np.zeros(8, dtype=np.int32)
        self._offsets[request_id] = learn_outcomes(
            merged.token_ids, merged.parents, merged.depths, merged.masks, merged.margins, merged.chances, truth,
            len(truth) if accepted is None else accepted, self.weights, self._squares,
            self._offsets.get(request_id, 0.0), self._bins, extra,
        )  # fmt: skip
        return extra

    def forget(self, request_id: str) -> None:
        """Drop a request's offset."""
        self._offsets.pop(request_id, None)

    def reliability(self) -> list[ReliabilityBin]:
        """Predicted against observed chances of all nodes that were judged so far, by set of sources and tenth."""
        return [
            ReliabilityBin(mask, int(count), float(predicted / count), float(hits / count))
            for mask in range(256)
            for count, predicted, hits in self._bins[mask].tolist()
            if count
        ]

    def points(self) -> npt.NDArray[np.float64]:
        """[NUM_BINS, 3]: by tenth, over all sets of sources: nodes, sum of their predicted chances, hits."""
        pooled: npt.NDArray[np.float64] = self._bins.sum(axis=0)
        return pooled

    def calibration_error(self) -> float:
        """Expected calibration error: mean distance of predicted and observed, weighted by the number of nodes."""
        bins = self.points()
        total = bins[:, 0].sum()
        return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / total) if total else 0.0


def _values(tree: DraftTree) -> FloatArray:
    if tree.values is not None:
        return tree.values
    return (_NO_VALUE ** tree.depths()).astype(np.float32)
