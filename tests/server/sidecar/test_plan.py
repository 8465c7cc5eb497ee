"""Plans and gates: what is launched, what it may cost, and when nothing is."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.errors import ConfigError
from specdec.server.sidecar.drafting import Drafting, Shop
from specdec.server.sidecar.gates import Budget, BudgetOptions, LoadGate
from specdec.server.sidecar.learner import simulate
from specdec.server.sidecar.metrics import SidecarMetrics
from specdec.server.sidecar.plan import Layout, PlanOptions, Timing, best_layout
from specdec.suffix_tree.cache import SuffixCache

SURE = [1.0] * 128


def test_a_sure_draft_is_raced_from_its_end_and_gridded_in_segments():
    timing = Timing(0.02, 0.02)
    race = best_layout(SURE, timing, PlanOptions(min_gain_s=0.0))
    assert race == Layout((128,), pytest.approx(128 * 0.02 - 0.02))
    grid = best_layout(SURE[:64], timing, PlanOptions(max_branches=4, min_gain_s=0.0))
    assert grid.offsets == (16, 32, 48, 64)
    assert grid.gain_s == pytest.approx(4 * 16 * 0.02 - 0.02)


def test_a_doubtful_draft_is_raced_from_where_it_still_holds():
    timing = Timing(0.02, 0.02)
    reach = [0.9**i for i in range(1, 60)]
    (offset,) = best_layout(reach, timing, PlanOptions(min_gain_s=0.0)).offsets
    gains = [reach[x - 1] * (x * 0.02 - 0.02) for x in range(4, 23)]
    assert offset == 4 + int(np.argmax(gains))


def test_nothing_is_launched_that_does_not_pay():
    options = PlanOptions(min_gain_s=0.04)
    assert best_layout(SURE[:5], Timing(0.02, 0.5), options) == Layout()  # opens too late
    assert best_layout(SURE[:5], Timing(0.001, 0.0), options) == Layout()  # saves too little
    assert best_layout([0.05] * 50, Timing(0.02, 0.0), options) == Layout()  # too doubtful
    assert best_layout(SURE, Timing(None), options) == Layout()  # the upstream's speed is not known
    assert best_layout([], Timing(0.02), options) == Layout()


def test_speed_is_learned_from_gaps_and_openings():
    timing = Timing()
    assert timing.usual_step_s is None
    for _ in range(20):
        timing.saw_gap(0.04, 2)
    assert timing.step_s == pytest.approx(0.02)
    timing.saw_open(0.05)
    assert timing.open_s == pytest.approx(0.03)
    for _ in range(40):
        timing.saw_gap(0.06, 1)
    assert timing.usual_step_s == pytest.approx(0.02) or timing.usual_step_s == pytest.approx(0.06)
    assert timing.step_s == pytest.approx(0.06, rel=0.05)


def test_a_busy_upstream_closes_the_gate_within_a_few_tokens():
    now = [0.0]
    timing = Timing()
    gate = LoadGate(timing, clock=lambda: now[0])
    assert "not known yet" in gate.why_closed
    for _ in range(200):
        timing.saw_gap(0.02, 1)
        gate.saw_gap(0.02, is_crowded=False)
    assert gate.why_closed is None
    count = 0
    while gate.why_closed is None:
        timing.saw_gap(0.06, 1)
        count += 1
    assert count <= 5
    assert "as long as usual" in gate.why_closed
    for _ in range(40):
        timing.saw_gap(0.02, 1)
    assert gate.why_closed is None
    gate.num_waiting = 1
    assert gate.why_closed == "1 requests wait upstream"
    gate.num_waiting = 0
    gate.refused()
    assert "refused" in gate.why_closed
    now[0] = 5.1
    assert gate.why_closed is None
    for pause in (5, 10, 20):  # branches that slow clients down: twice as long each time
        while gate.why_closed is None:
            gate.saw_gap(0.025, is_crowded=True)
        assert gate.why_closed == "branches slow down clients"
        now[0] += pause + 0.1
        assert gate.why_closed is None


def test_the_budget_bounds_what_is_wasted_in_all_and_for_each_tenant():
    budget = Budget(BudgetOptions(ratio=0.5, burst=100, max_branches=4, max_branches_per_tenant=2))
    assert budget.spend("a", 2, 60)
    assert not budget.spend("a", 1, 1)  # its branches are all under way
    assert not budget.spend("b", 1, 41)  # more than all have left
    assert budget.spend("b", 1, 40)
    assert not budget.spend("c", 2, 0)  # four in all
    budget.settle("a", 2, 0)
    assert not budget.spend("a", 1, 1)
    budget.earn("a", 10)
    assert budget.left == 5
    assert budget.spend("a", 1, 5)
    budget.settle("a", 1, 5)
    assert budget.left == 5
    for bad in ({"ratio": -1}, {"burst": -1}, {"max_branches": 0}):
        with pytest.raises(ConfigError):
            BudgetOptions(**bad)
    for bad in ({"max_branches": 0}, {"min_segment": 0}, {"max_draft": 300}, {"min_probability": 0}):
        with pytest.raises(ConfigError):
            PlanOptions(**bad)


def shop(plan=None, ratio=0.2, burst=64):
    timing = Timing(0.02, 0.02)
    plan = plan or PlanOptions(min_gain_s=0.0)
    gate = LoadGate(timing)
    for _ in range(16):
        gate.saw_gap(0.02, is_crowded=False)
    return Shop(SuffixCache(), plan, timing, gate, Budget(BudgetOptions(ratio, burst)), SidecarMetrics())


def test_wrong_drafts_stop_when_the_budget_is_gone():
    made = shop()
    loop = list(range(10, 18)) * 3
    wasted = 0
    for number in range(50):
        drafting = Drafting(
            made, str(number), "t", limit=100, may_learn=False, may_write=lambda: True, is_sampled=False
        )
        drafting.begin([1, 2, *loop])
        drafting.extend(loop[:4])
        guess = drafting.guess()
        for offset in guess.offsets:
            wasted += offset
            drafting.ended("miss", num_ready=0, num_wasted=3)
        drafting.close()
    assert 0 < wasted <= 64 + 0.2 * 4 * 50
    assert made.metrics.exhausted._value.get() > 0
    assert not made.cache.active_requests


def test_the_estimate_is_the_segment_rules_own_time():
    # A recitation of 100 tokens after the first 10: drafts hold, so a race of d tokens saves d - 1 steps at best.
    made = shop(PlanOptions(min_gain_s=0.0, max_draft=64))
    text = list(range(100, 220))
    for number in range(4):
        made.cache.insert(number, np.array(text, np.int32), tenant="t")
    saved, launched = simulate(made, "x", [1, 2], text, tenant="t", plan=made.plan, timing=made.timing)
    assert launched >= 1
    assert 0.3 * 120 * 0.02 < saved < 0.5 * 120 * 0.02  # one branch: at most twice as fast
    other, _ = simulate(made, "x", [1, 2], text, tenant="nobody", plan=made.plan, timing=made.timing)
    assert other == 0.0
    assert not made.cache.active_requests
