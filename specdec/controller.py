"""How many draft tokens each request may use, by rules that need no measured cost.

A budget only limits time: with the match rule the text does not depend on it, so a controller may change it at will.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.errors import ConfigError
from specdec.protocols import Load
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["BackoffController", "FixedController"]


def _require(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {rule}, got {value}")


class FixedController:
    """Gives every request the same budget in every step (`specdec.protocols.Controller`).

    Args:
        budget: draft tokens, >= 0; 0 = plain decoding.

    Raises:
        ConfigError: the budget is negative.
    """

    def __init__(self, budget: int) -> None:
        _require(budget >= 0, "budget", ">= 0", budget)
        self._budget = budget

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        return [self._budget] * len(states)

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""


class BackoffController:
    """Lets each request's budget follow what was accepted of its last draft; a default for retrieval drafters.

    Text is copied in stretches. After a step that accepted A draft tokens the budget is 2 A + min_budget, so it doubles
    within a stretch and is back at min_budget after a miss, from where it tries again in every step. A step that
    drafted nothing (no match, no room) changes nothing. On 80 recorded replies with the n-gram drafter this drafted as
    much as a fixed budget of 8 (4.0 tokens per step) and gained more: mean acceptance length 2.17 against 2.12, on code
    edits 6.4 against 5.0. Pausing after misses lost there: a drafter that has no match drafts nothing anyway.

    Args:
        max_budget: most draft tokens, >= min_budget; also the first budget of a request.
        min_budget: draft tokens after a miss, >= 1.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(self, *, max_budget: int = 32, min_budget: int = 4) -> None:
        _require(min_budget >= 1, "min_budget", ">= 1", min_budget)
        _require(max_budget >= min_budget, "max_budget", f">= min_budget = {min_budget}", max_budget)
        self._max_budget = max_budget
        self._min_budget = min_budget
        self._budgets: dict[str, int] = {}

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        # Nobody says when a request ends. Cleaning up this seldom costs nothing per step and keeps the records within
        # twice the batch and a constant; a request that waited meanwhile starts anew.
        if len(self._budgets) > 2 * len(states) + 64:
            live = {state.request_id for state in states}
            self._budgets = {name: budget for name, budget in self._budgets.items() if name in live}
        return [self._budgets.get(state.request_id, self._max_budget) for state in states]

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            if event.tree.num_draft_tokens > 0:
                budget = min(2 * event.result.num_accepted + self._min_budget, self._max_budget)
                self._budgets[event.state.request_id] = budget
