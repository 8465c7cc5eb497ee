from __future__ import annotations

from collections.abc import Sequence
from threading import Event
from typing import Any

import numpy as np
import pytest

from specdec.build import build_engine
from specdec.cost_model import CostModel, line_of
from specdec.drafters.ngram import NgramDrafter
from specdec.errors import ConfigError
from specdec.halves import HalfBatches, overlap_gain
from specdec.types import DraftTree, Request, RequestState, SamplingParams
from tests.tiny_models import tiny_llama


def requests() -> list[Request]:
    return [
        Request(
            f"r{i}",
            np.array([1, 2, 3, i, 1, 2, 3], np.int32),
            SamplingParams(max_new_tokens=20, temperature=0.8 * (i % 2), seed=i),
        )
        for i in range(5)
    ]


def texts(outputs: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for output in outputs:
        found.setdefault(output.request_id, []).extend(output.new_ids)
    return found


class Waiting(NgramDrafter):
    """Its first draft is not ready before the other half's forward has begun."""

    def __init__(self, other_runs: Event) -> None:
        super().__init__()
        self.other_runs, self.was_beside = other_runs, False

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        self.was_beside = self.other_runs.wait(timeout=30)
        return super().propose(states, budgets)


def test_one_half_is_drafted_for_while_the_other_is_verified_and_no_token_changes() -> None:
    model, runs = tiny_llama(), Event()
    with build_engine(model, "none", budget=0) as engine:
        plain = texts(engine.generate(requests()))
    waiting = Waiting(runs)
    second = build_engine(model, NgramDrafter(), budget=4)
    forward = second.target.forward

    def noted(chunks: Any) -> Any:
        runs.set()
        return forward(chunks)

    second.target.forward = noted  # type: ignore[method-assign]
    with HalfBatches([build_engine(model, waiting, budget=4), second]) as halves:
        assert texts(halves.generate(requests())) == plain
        assert waiting.was_beside
        first = next(iter(halves.generate(requests())))  # closed early: the rest is cancelled
        assert first.request_id in plain
    assert not any(engine.has_work for engine in halves.engines)


def test_a_failure_in_one_half_is_raised() -> None:
    model = tiny_llama()

    class Broken(NgramDrafter):
        def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
            raise RuntimeError("no draft")

    with (
        HalfBatches([build_engine(model, Broken(), budget=4), build_engine(model, "ngram", budget=4)]) as halves,
        pytest.raises(RuntimeError, match="no draft"),
    ):
        list(halves.generate(requests()))


def test_costs_decide() -> None:
    linear = CostModel({"target": line_of(0.1, 1.0), "draft": line_of(0.1, 1.0)})
    flat = CostModel({"target": line_of(20.0, 0.01), "draft": line_of(0.1, 0.1)})
    assert overlap_gain(linear, 16, 100) == pytest.approx(2.0, rel=0.05)  # all drafting is hidden
    assert overlap_gain(flat, 16, 100) == pytest.approx(0.5, rel=0.1)  # the target runs twice as often
    assert overlap_gain(CostModel(), 16, 100) == overlap_gain(linear, 1, 100) == 1.0
    model = tiny_llama()
    with HalfBatches([build_engine(model, "ngram"), build_engine(model, "ngram")], costs=flat) as halves:
        assert not halves.splits(requests())
        assert set(texts(halves.generate(requests()))) == {f"r{i}" for i in range(5)}
    with pytest.raises(ConfigError, match="two engines"):
        HalfBatches([])
