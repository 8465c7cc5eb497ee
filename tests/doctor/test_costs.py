"""Break-even figures from literal milliseconds, and the measuring itself over a strict toy target."""

from __future__ import annotations

import pytest
import torch

from specdec.doctor.costs import MAX_STEPS, break_even, measure_steps, recommend
from specdec.errors import UnsupportedError
from specdec.toy import ToyTarget

CPU = torch.device("cpu")


def test_a_budget_breaks_even_where_its_step_costs_per_token_what_a_plain_step_costs():
    costs = break_even({4: 15.0, 1: 10.0, 2: 11.0})
    assert [(c.budget, c.acceptance_length) for c in costs] == [(0, 1.0), (1, 1.1), (3, 1.5)]


def test_free_draft_tokens_are_all_worth_having():
    [*_, best] = recommend(break_even({1: 10.0, 32: 10.0}))
    assert best.budget == 31
    assert best.speedup == pytest.approx((1 - 0.9**32) / 0.1)


def test_draft_tokens_that_cost_a_step_each_are_never_worth_having():
    for entry in recommend(break_even({1: 10.0, 2: 20.0, 32: 320.0})):
        assert (entry.budget, entry.speedup) == (0, 1.0)


def test_better_drafts_deserve_larger_budgets():
    budgets = [entry.budget for entry in recommend(break_even({1: 10.0, 8: 13.0, 16: 18.0, 32: 27.0}))]
    assert budgets == sorted(budgets)
    assert budgets[0] < budgets[-1]


def test_steps_of_all_sizes_are_measured_and_nothing_stays_behind():
    target = ToyTarget(vocab_size=11, max_length=4 * MAX_STEPS)
    shares: list[float] = []
    costs = measure_steps(target, batch=3, context=20, seconds=0.2, device=CPU, on_progress=shares.append)
    assert [c.budget for c in costs.break_even] == [0, 1, 3, 7, 15, 31]
    assert all(c.ms > 0 for c in costs.break_even)
    assert (costs.batch, costs.context) == (3, 20)
    assert costs.num_rounds >= 1
    assert shares[-1] <= 1
    assert target.num_held_tokens == 0


def test_a_target_without_drafts_is_measured_at_budget_0_only():
    target = ToyTarget(vocab_size=11, max_draft_tokens=0)
    costs = measure_steps(target, batch=1, context=5, seconds=0.01, device=CPU)
    assert [c.budget for c in costs.break_even] == [0]
    assert all(entry.budget == 0 for entry in costs.recommended)


def test_no_room_is_said_and_leaves_nothing_behind():
    target = ToyTarget(vocab_size=11, kv_tokens=10)
    with pytest.raises(UnsupportedError, match="no memory for 20 more tokens"):
        measure_steps(target, batch=1, context=20, seconds=0.01, device=CPU)
    assert target.num_held_tokens == 0
