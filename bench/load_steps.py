"""How long a step of a simulated engine takes, by a cost table and by what its policy does to the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.bench.load_policies import Policy, PruneModel
from specdec.cost_model import BATCHES, CONTEXTS, TOKENS, CostModel, CostTable

__all__ = ["StepTimes", "draft_table"]

_CONTEXTS = 16  # tokens: contexts are told apart by so many


def draft_table(fixed_ms: float, each_ms: float) -> CostTable:
    """The table of drafting that takes ``fixed_ms`` and ``each_ms`` for every request, whatever is drafted."""
    by_batch = fixed_ms + each_ms * np.array(BATCHES, dtype=np.float64)
    return CostTable(np.broadcast_to(by_batch[:, None, None], (len(BATCHES), len(CONTEXTS), len(TOKENS))).copy())


class StepTimes:
    """Milliseconds of steps under one policy; what was read once from the table is kept.

    Args:
        costs: which do not change.
        policy: what may be done to a step; each is done only where the table says that it pays.
        pruning: of policies that prune.
    """

    def __init__(self, costs: CostModel, policy: Policy, pruning: PruneModel) -> None:
        self._costs, self._policy, self._pruning = costs, policy, pruning
        self._known: dict[tuple[str, float, int, float], float] = {}

    def draft_ms(self, tokens: float, context: float, num_requests: int) -> float:
        """Of a step of ``tokens`` query tokens that drafts for ``num_requests``."""
        return self._read("draft", tokens, context, num_requests) if self._costs.tables["draft"].is_measured else 0.0

    def verify_ms(self, tokens: float, drafted: float, rejected: float, context: float, batch: float) -> float:
        """Of a forward with ``tokens`` others, pruned where that pays."""
        whole = self._read("", tokens + drafted, context, batch)
        if not self._policy.prunes or not drafted:
            return whole
        model = self._pruning
        less = self._read("", tokens + drafted - model.found * rejected, context, batch)
        return min(whole, model.depth * whole + (1 - model.depth) * less + model.probe_ms * drafted)

    def step_ms(
        self, others: int, sizes: Sequence[int], gains: Sequence[Sequence[int]], draft_ms: float, context: float
    ) -> float:
        """Of drafting and verifying.

        Args:
            others: query tokens that are no draft tokens.
            sizes: [R] draft tokens of each request.
            gains: [R][size + 1] accepted tokens if the first 0, 1, ... of them are verified.
            draft_ms: of all drafts.
            context: mean length.
        """
        drafted, batch = sum(sizes), max(len(sizes), 1)
        accepted = sum(own[size] for own, size in zip(gains, sizes, strict=True))
        rejected = drafted - accepted
        taken = draft_ms + self.verify_ms(others, drafted, rejected, context, batch)
        if self._policy.overlaps and draft_ms and len(sizes) > 1:
            half = self.verify_ms(others / 2, drafted / 2, rejected / 2, context, batch / 2)
            taken = min(taken, 2 * max(half, draft_ms / 2))
        if self._policy.chunks and drafted > len(sizes):
            taken = min(taken, self._in_chunks(others, sizes, gains, draft_ms, context))
        return taken

    def _in_chunks(
        self, others: int, sizes: Sequence[int], gains: Sequence[Sequence[int]], draft_ms: float, context: float
    ) -> float:
        """The first half of drafts is verified while the second is drafted, then that of those whose first held."""
        first = [(size + 1) // 2 for size in sizes]
        rest = [
            size - one
            for own, one, size in zip(gains, first, sizes, strict=True)
            if size > one and (own[one] == one or own[size] > own[one])
        ]
        rejected = sum(one - own[one] for own, one in zip(gains, first, strict=True))
        taken = draft_ms / 2
        taken += max(self.verify_ms(others, sum(first), rejected, context, max(len(sizes), 1)), draft_ms / 2)
        return taken + (self.verify_ms(len(rest), sum(rest) - len(rest), 0, context, len(rest)) if rest else 0.0)

    def _read(self, part: str, tokens: float, context: float, batch: float) -> float:
        """Of one part, or of all but drafting."""
        key = (part, tokens, round(context / _CONTEXTS), batch)
        found = self._known.get(key)
        if found is None:
            place = max(key[2] * _CONTEXTS, 1)
            table = self._costs.tables[part] if part else None
            found = table.at(tokens, place, batch) if table else self._costs.step_ms(tokens, place, batch)
            self._known[key] = found
        return found
