from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from specdec.bench.arrivals import Arrival
from specdec.bench.load_policies import LoadLimits, Policy
from specdec.bench.load_record import record_acceptance
from specdec.bench.load_sim import simulate_load
from specdec.bench.load_validation import TimedController, fit_arrivals, prediction_errors, serve_in_turns
from specdec.bench.turns import TurnClock
from specdec.bench.workload import WorkItem
from specdec.build import build_engine
from specdec.cost_model import CostModel
from tests.tiny_models import tiny_llama


def test_engines_that_take_turns_serve_every_call_on_their_own_time() -> None:
    model, ticks = tiny_llama(), count()
    clock = TurnClock(lambda: next(ticks) * 1e-3)  # every look at it is a millisecond
    ids = np.array([1, 2, 3, 4] * 4, np.int32)
    items = [WorkItem("s", "t", ids[i:], ids[: 8 + i]) for i in range(5)]
    arrivals = fit_arrivals([Arrival(float(i), 1, 1) for i in range(5)], items, seconds=0.2)
    costs = CostModel()
    engines = {name: build_engine(model, name, budget=4, max_batch_size=2) for name in ("none", "ngram")}
    for name, engine in engines.items():
        engine.controller = TimedController(engine.controller, costs, clock, drafts=name != "none")
    served = serve_in_turns(engines, arrivals, items, clock)
    assert {name: len(done) for name, done in served.items()} == {"none": 5, "ngram": 5}
    for done in served.values():
        assert all(one.last_s > one.first_s > one.arrival_s for one in done)
        assert sorted(one.response_tokens for one in done) == [8, 9, 10, 11, 12]
    assert [one.drafted for one in served["none"]] == [0] * 5
    assert sum(one.drafted for one in served["ngram"]) > 0
    assert all(costs.tables[part].is_measured for part in ("target", "host", "draft"))
    # What was served without drafts is simulated without an error in tokens, and in about the time of its steps.
    record = record_acceptance(items, "ngram", budget=4)
    found = prediction_errors(served["none"], arrivals, costs, record, Policy("none"), LoadLimits(2, 512))
    assert found["error"]["tokens_per_step"] == 0
    simulated, _ = simulate_load(arrivals, costs, record, Policy("none"), limits=LoadLimits(2, 512), seed=None)
    assert sum(one.steps for one in simulated) == sum(one.steps for one in served["none"]) == pytest.approx(50)
