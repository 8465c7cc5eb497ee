from __future__ import annotations

import numpy as np
import pytest

from specdec.controller import BackoffController, FixedController
from specdec.errors import ConfigError
from specdec.protocols import Controller, Load
from specdec.types import DraftTree, Request, RequestState, StepEvent, VerifyResult

LOAD = Load(num_running=1, num_waiting=0, num_prefill_tokens=0)


def state_of(request_id: str) -> RequestState:
    return RequestState(Request(request_id, np.array([1], dtype=np.int32)))


def event(state: RequestState, num_drafted: int, num_accepted: int) -> StepEvent:
    tree = DraftTree.chain(1, [0] * num_drafted)
    ids = np.zeros(num_accepted, dtype=np.int32)
    return StepEvent(state, tree, VerifyResult(ids, ids, 0), None, 0, ids, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("controller", [FixedController(3), BackoffController()])
def test_it_is_a_controller_with_a_budget_per_request(controller: Controller) -> None:
    assert isinstance(controller, Controller)
    assert controller.plan([], LOAD) == []
    budgets = controller.plan([state_of("a"), state_of("b")], LOAD)
    assert len(budgets) == 2
    assert min(budgets) >= 0


def test_a_fixed_budget_never_changes() -> None:
    controller, state = FixedController(5), state_of("a")
    controller.observe([event(state, 5, 0)])
    assert controller.plan([state, state], LOAD) == [5, 5]
    assert FixedController(0).plan([state], LOAD) == [0]


def test_the_budget_follows_what_was_accepted() -> None:
    controller, state = BackoffController(max_budget=16, min_budget=2), state_of("a")
    budgets = []
    for num_accepted in (0, 2, 5, 16, 1, 0):
        [budget] = controller.plan([state], LOAD)
        budgets.append(budget)
        controller.observe([event(state, max(budget, num_accepted), num_accepted)])
    assert budgets == [16, 2, 6, 12, 16, 4]
    assert controller.plan([state], LOAD) == [2]


def test_a_step_without_a_draft_changes_nothing() -> None:
    controller, state = BackoffController(max_budget=16), state_of("a")
    controller.observe([event(state, 0, 0)])
    assert controller.plan([state], LOAD) == [16]


def test_requests_have_budgets_of_their_own() -> None:
    controller, a, b = BackoffController(max_budget=9, min_budget=1), state_of("a"), state_of("b")
    controller.observe([event(a, 4, 0), event(b, 4, 3)])
    assert controller.plan([b, a], LOAD) == [7, 1]


def test_records_of_requests_that_left_are_dropped() -> None:
    controller, kept = BackoffController(max_budget=16, min_budget=1), state_of("kept")
    for i in range(1000):
        controller.observe([event(kept, 4, 0), event(state_of(f"r{i}"), 4, 0)])
        assert controller.plan([kept], LOAD) == [1]
    assert len(controller._budgets) <= 68


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_budget": 0}, "min_budget must be >= 1, got 0"),
        ({"max_budget": 3}, "max_budget must be >= min_budget = 4, got 3"),
    ],
)
def test_a_wrong_option_is_named_with_its_rule(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BackoffController(**options)


def test_a_negative_fixed_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget must be >= 0, got -1"):
        FixedController(-1)
