from __future__ import annotations

import numpy as np
import pytest

from specdec.controller_adaptive import AdaptiveController
from specdec.errors import ConfigError, RequestError
from specdec.protocols import Controller, Load
from specdec.types import DraftTree, Request, RequestState, StepEvent, StepTrace, VerifyResult
from tests.test_step_budget import costs_of

LOAD = Load(num_running=2, num_waiting=0, num_prefill_tokens=0)


def state_of(name: str, *, priority: float = 1.0, tpot_ms: float | None = None) -> RequestState:
    return RequestState(Request(name, np.array([1], dtype=np.int32), priority=priority, tpot_ms=tpot_ms))


def chain(values: list[float]) -> DraftTree:
    tree = DraftTree.chain(1, list(range(2, 2 + len(values))))
    tree.values = np.array([1.0, *values], np.float32)
    return tree


def event(state: RequestState, tree: DraftTree, accepted: int, ms: float, size: int) -> StepEvent:
    ids = tree.token_ids[1 : accepted + 1]
    trace = StepTrace(state.request_id, 1, 1, tree.num_draft_tokens, accepted, accepted + 1, size, 0.1, ms, 0.1, 0.1)
    return StepEvent(state, tree, VerifyResult(np.arange(1, accepted + 1, dtype=np.int32), ids, 0), None, 0, ids, trace)  # type: ignore[arg-type]


def test_it_is_a_controller() -> None:
    controller = AdaptiveController(costs_of(4, 1.0))
    assert isinstance(controller, Controller)
    assert controller.plan([], LOAD) == []
    assert controller.admit([], []) == []


def test_the_best_nodes_of_all_requests_are_verified() -> None:
    controller, states = AdaptiveController(costs_of(1, 4.0)), [state_of("a"), state_of("b")]
    controller.plan(states, LOAD)
    # A token is worth 24 / 2 = 12 ms here and costs 4 ms: values above a third pay.
    trees = controller.admit(states, [chain([0.9, 0.8, 0.7, 0.2]), chain([0.3, 0.1])])
    assert [tree.num_draft_tokens for tree in trees] == [3, 0]
    assert trees[0].token_ids.tolist() == [1, 2, 3, 4]


def test_the_plan_is_what_could_pay_at_most() -> None:
    states = [state_of("a")]
    assert AdaptiveController(costs_of(1, 40.0)).plan(states, LOAD) == [0]
    assert AdaptiveController(costs_of(1, 0.01), max_budget=9).plan(states, LOAD) == [9]


def test_important_and_late_requests_get_more() -> None:
    controller = AdaptiveController(costs_of(1, 4.0))
    states = [
        state_of("a", priority=3.0),
        state_of("b"),
        state_of("late", tpot_ms=5.0),
        state_of("early", tpot_ms=900.0),
    ]
    trees = [chain([0.2])] * 4
    for _ in range(60):
        controller.plan(states, LOAD)
        controller.observe([event(s, t, 0, 48.0, 4) for s, t in zip(states, trees, strict=True)])
    controller.plan(states, LOAD)
    kept = controller.admit(states, trees)
    assert [tree.num_draft_tokens for tree in kept] == [1, 0, 1, 0]


def test_trees_without_values_are_taken_as_coin_tosses() -> None:
    controller, states = AdaptiveController(costs_of(1, 4.0)), [state_of("a")]
    controller.plan(states, LOAD)
    [tree] = controller.admit(states, [DraftTree.chain(1, [2, 3, 4])])
    assert tree.num_draft_tokens == 2  # a half and a quarter; 24 ms for a token, 4 ms for a node: above a sixth


def test_lateness_of_requests_that_left_is_dropped() -> None:
    controller = AdaptiveController(costs_of(1, 4.0))
    for i in range(300):
        state = state_of(f"r{i}", tpot_ms=1.0)
        controller.plan([state], LOAD)
        controller.observe([event(state, chain([0.5]), 0, 20.0, 1)])
    assert len(controller._lateness) <= 68


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_budget must be >= 1, got 0"):
        AdaptiveController(max_budget=0)
    with pytest.raises(RequestError, match="priority must be > 0 and finite, got 0"):
        state_of("a", priority=0.0)
    with pytest.raises(RequestError, match="tpot_ms must be > 0"):
        state_of("a", tpot_ms=-1.0)
