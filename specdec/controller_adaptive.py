"""Spends verification where it buys tokens: the best nodes of the whole batch while they pay, and none if none do.

Before drafting, ``plan`` bounds each request's draft by what could pay if every node were right. After drafting,
``admit`` verifies the best nodes of all requests together; see ``specdec.token_worth`` for what each is worth and
``specdec.step_budget`` for how many. Worths fall along a path, so the best nodes are connected (OPT-Tree, 2406.17276).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from specdec.cost_model import CostModel
from specdec.errors import ConfigError
from specdec.protocols import Load
from specdec.step_budget import StepBudget
from specdec.tree import FloatArray
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["AdaptiveController"]

_NO_VALUE = 0.5  # of a path per token, for drafters that state no values
_MAX_WEIGHT = 4.0  # of a request that is late, over one that is in time
_LATE_SHARE = 0.1  # of the newest step in a request's lateness
_NOTHING = np.empty(0, np.float32)
_GAP_MS = 100.0  # a longer pause between two steps is not the host's work


class AdaptiveController:
    """Budgets from measured costs and calibrated chances (`specdec.protocols.Controller`).

    Requests with a ``tpot_ms`` weigh up to four times more while they are behind it, and down to a quarter while they
    are ahead; ``priority`` multiplies.

    Args:
        costs: times of the parts; learned from steps where it knows none.
        max_budget: most draft tokens of one request, >= 1.
        floor: the least speed against plain decoding that is put up with, in (0, 1]; below it, speculation pauses.
        hysteresis: see ``StepBudget``.
        clock: seconds.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(
        self,
        costs: CostModel | None = None,
        *,
        max_budget: int = 64,
        floor: float = 0.97,
        hysteresis: float = 0.005,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        if max_budget < 1:
            raise ConfigError(f"max_budget must be >= 1, got {max_budget}")
        self.budget = StepBudget(costs or CostModel(), floor=floor, hysteresis=hysteresis)
        self._max_budget = max_budget
        self._clock = clock
        self._observed_at: float | None = None
        self._host_ms = 0.0
        self._lateness: dict[str, float] = {}
        self._planned: list[bool] = []  # by request of this step: it may draft

    @property
    def costs(self) -> CostModel:
        """What the parts cost, as known now."""
        return self.budget.costs

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        self._host_ms = 0.0
        if self._observed_at is not None:  # between two steps the host works: scheduling, streaming, observers
            gap = 1e3 * (self._clock() - self._observed_at)
            self._host_ms = gap if gap < _GAP_MS else 0.0
        if not states:
            self._planned = []
            return []
        context = sum(state.num_tokens for state in states) / len(states)
        most = self.budget.begin(len(states), context, load.num_prefill_tokens, self._max_budget)
        if len(self.budget.turns) > 2 * len(states) + 64:
            self.budget.turns.keep({state.request_id for state in states})
        self._planned = [most > 0 and self.budget.turns.may_draft(state.request_id) for state in states]
        return [most if planned else 0 for planned in self._planned]

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        if all(len(tree) == 1 for tree in trees):  # many requests rest: their steps should cost what plain ones do
            self._judge(states, [_NOTHING] * len(states))
            return trees
        values = [self._weight(state) * self._worths(tree)[1:] for state, tree in zip(states, trees, strict=True)]
        flat = np.concatenate(values)
        chosen = np.ones(len(flat), dtype=np.bool_)
        if len(flat):
            order = np.argsort(-flat, kind="stable")
            chosen[order[self.budget.choose(flat[order]) :]] = False
        admitted, first = [], 0
        for tree, own in zip(trees, values, strict=True):
            kept = chosen[first : first + len(own)]
            first += len(own)
            size = int(np.count_nonzero(kept))
            admitted.append(tree if size == len(own) else tree.subtree(np.flatnonzero(np.append(True, kept))))
        self._judge(states, values)
        return admitted

    def _judge(self, states: Sequence[RequestState], values: Sequence[FloatArray]) -> None:
        """Of those that might draft."""
        asked = [row for row, planned in enumerate(self._planned) if planned]
        if asked:
            self.budget.judge([states[row].request_id for row in asked], [values[row] for row in asked])

    def _worths(self, tree: DraftTree) -> FloatArray:
        """[N] float32, in tokens."""
        if len(tree) == 1:
            return np.ones(1, np.float32)
        values = tree.values
        if values is None:
            values = (_NO_VALUE ** tree.depths()).astype(np.float32)
        return self.budget.worths(tree.parents, values)

    def _weight(self, state: RequestState) -> np.float32:
        return np.float32(state.request.priority * self._lateness.get(state.request_id, 1.0))

    def observe(self, events: Sequence[StepEvent]) -> None:
        self._observed_at = self._clock()
        if not events:
            return
        trace = events[0].trace
        parts = {
            "draft": trace.draft_ms, "target": trace.target_ms, "verify": trace.verify_ms, "commit": trace.commit_ms,
            "host": self._host_ms,
        }  # fmt: skip
        self.budget.finish(
            sum(event.trace.num_emitted for event in events),
            sum(event.trace.num_draft_tokens for event in events),
            parts,
        )
        self._note_lateness(events, sum(parts.values()))

    def _note_lateness(self, events: Sequence[StepEvent], spent: float) -> None:
        for event in events:
            target = event.state.request.tpot_ms
            if target is not None:
                late = spent / max(event.trace.num_emitted, 1) / target
                name = event.state.request_id
                before = self._lateness.get(name, 1.0)
                moved = before + _LATE_SHARE * (late - before)
                self._lateness[name] = min(max(moved, 1 / _MAX_WEIGHT), _MAX_WEIGHT)
        # Nobody says when a request ends; see ``BackoffController``.
        if len(self._lateness) > 2 * len(events) + 64:
            live = {event.state.request_id for event in events}
            self._lateness = {name: value for name, value in self._lateness.items() if name in live}
