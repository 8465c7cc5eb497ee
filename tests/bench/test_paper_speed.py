from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch

from specdec import controller_adaptive, engine
from specdec.bench import adaptive_speed
from specdec.bench.arms import EngineArm, Job
from specdec.bench.forcing import ForcedResponse
from specdec.bench.paper_speed import PaperClock, PricedDrafter, paper_engine
from specdec.bench.scripted import serve_scripted
from specdec.bench.turns import TurnClock, run_in_turns
from specdec.cost_model import CostModel, line_of
from specdec.device_work import DeviceClock
from specdec.drafters.fusion import FusedDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.protocols import Drafter
from specdec.step_budget import StepBudget
from specdec.types import DraftTree, Request, RequestState, SamplingParams


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperClock]:
    made, before = PaperClock(), engine.perf_counter  # type: ignore[attr-defined]
    adaptive_speed.use_clock(made)
    yield made
    adaptive_speed.use_clock(before)


def speed(clock: PaperClock, *, is_plain: bool, copies: bool, concurrency: int) -> float:
    """Tokens per simulated second of 3 x concurrency calls."""
    rng = np.random.default_rng(0)
    jobs = []
    for _ in range(3 * concurrency):
        prompt = rng.integers(0, 5000, 60)
        answer = prompt if copies else rng.integers(0, 5000, 60)
        jobs.append(Job(prompt.astype(np.int32), 60, answer.astype(np.int32)))
    make = partial(paper_engine, vocab_size=5000, costs=CostModel({"target": line_of(10.0, 0.6, free=4)}), clock=clock)

    def fresh() -> FusedDrafter:
        return FusedDrafter([("ngram", PricedDrafter(NgramDrafter(), (0.1, 0.3), clock))])

    name = "none" if is_plain else fresh
    arm = EngineArm("arm", make, name, budget=0 if is_plain else None, concurrency=concurrency)
    tokens, seconds = adaptive_speed.decode_seconds(arm.run(jobs), concurrency)
    arm.close()
    return tokens / seconds


def test_all_times_of_a_step_are_read_from_one_clock(clock: PaperClock) -> None:
    device = DeviceClock(torch.device("cpu"))
    begin = device.mark()
    clock.spend(7.0)
    assert device.ms(begin, device.mark()) == pytest.approx(7.0)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_same_run_takes_the_same_time_to_the_last_digit(clock: PaperClock, concurrency: int) -> None:
    first, again = (speed(clock, is_plain=False, copies=True, concurrency=concurrency) for _ in range(2))
    assert first == pytest.approx(again, rel=1e-9)
    assert first > 1.2 * speed(clock, is_plain=True, copies=True, concurrency=concurrency)


@pytest.mark.parametrize("concurrency", [1, 8, 16])
def test_texts_that_copy_nothing_are_as_fast_as_without_drafts(clock: PaperClock, concurrency: int) -> None:
    plain = speed(clock, is_plain=True, copies=False, concurrency=concurrency)
    assert speed(clock, is_plain=False, copies=False, concurrency=concurrency) > 0.97 * plain


class Liar(NgramDrafter):
    """Sure of itself and always wrong: no answer has a token 0."""

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = [DraftTree.chain(int(s.token_ids[-1]), [0] * min(8, b)) for s, b in zip(states, budgets, strict=True)]
        for tree in trees:
            tree.values = np.ones(len(tree), np.float32)
        return trees


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_confident_drafter_that_is_always_wrong_costs_at_most_3_percent_after_50_steps(
    clock: PaperClock, batch: int, is_known: bool
) -> None:
    def ms_of_steps(drafter: Drafter, budget: int | None) -> list[float]:
        engine = paper_engine(
            drafter, vocab_size=5000, clock=clock, is_known=is_known, budget=budget, max_batch_size=batch,
            costs=CostModel({"target": line_of(10.0, 0.6, free=1)}),
        )  # fmt: skip
        rng = np.random.default_rng(0)
        for number in range(batch):
            prompt, answer = rng.integers(1, 5000, (2, 400)).astype(np.int32)
            forced = ForcedResponse([answer], len(prompt))
            engine.submit(Request(str(number), prompt, SamplingParams(max_new_tokens=400, logits_processors=(forced,))))
        times = []
        while engine.has_work:
            begin = clock.now
            engine.step()
            times.append(1e3 * (clock.now - begin))
        return times

    liar = FusedDrafter([("liar", PricedDrafter(Liar(), (0.1, 0.3), clock))])
    spent, plain = ms_of_steps(liar, None), ms_of_steps(NoDrafter(), 0)
    assert sum(spent[:50]) > 1.01 * sum(plain[:50])  # it is tried
    assert len(spent) == len(plain)  # and never right
    assert sum(spent[50:]) <= 1.03 * sum(plain[50:])


def test_a_first_draft_that_compiles_does_not_stop_drafting() -> None:
    budget, num_drafted = StepBudget(CostModel({"target": line_of(10.0, 0.1)})), 0
    for step in range(400):
        most = budget.begin(1, 100.0, 0, 8)
        if most and budget.turns.may_draft("r"):
            num_drafted += 1
            size = budget.choose(np.full(4, 0.5, np.float32))
            budget.judge(["r"], [np.full(4, 0.5, np.float32)])
            budget.finish(2, size, {"draft": 800.0 if step < 2 else 0.2, "target": 10.5})
        else:
            budget.finish(1, 0, {"target": 10.1})
    assert num_drafted > 350


def test_the_clock_is_given_back() -> None:
    assert controller_adaptive.AdaptiveController().plan([], None) == []  # type: ignore[arg-type]


def test_a_drafter_learns_from_calls_that_are_served_without_a_model() -> None:
    drafter = FusedDrafter([("ngram", NgramDrafter())])
    text = np.array([1, 2, 3, 4] * 8, np.int32)
    serve_scripted(drafter, [(text[:12], text[12:])] * 2, 100, 4)
    assert sum(point.count for point in drafter.reliability()) > 5
    assert drafter.costs_and_gains()["ngram"]["gain"] > 1.0


def test_arms_that_take_turns_have_clocks_of_their_own() -> None:
    wall = PaperClock()
    own = TurnClock(wall)
    for _ in range(3):
        own.turn("a")
        wall.spend(2.0)
        own.turn("b")
        wall.spend(5.0)
    assert own() == pytest.approx(0.015)
    own.turn("a")
    assert own() == pytest.approx(0.006)


def test_arms_in_turns_answer_as_arms_alone(clock: PaperClock) -> None:
    rng = np.random.default_rng(0)
    jobs = [Job(row[:30], 20, row[30:]) for row in rng.integers(0, 5000, (3, 50)).astype(np.int32)]
    make = partial(paper_engine, vocab_size=5000, costs=CostModel({"target": line_of(10.0, 0.6)}), clock=clock)
    arms = [EngineArm(name, make, NgramDrafter, budget=budget) for name, budget in (("plain", 0), ("drafts", 4))]
    own = TurnClock(clock)
    adaptive_speed.use_clock(own)
    found = run_in_turns(arms, jobs, own)
    for arm in arms:
        assert [one.output_ids for one in found[arm.name]] == [one.output_ids for one in arm.run(jobs)]
    tokens, seconds = adaptive_speed.decode_seconds(found["plain"], 1)
    assert seconds / tokens == pytest.approx(0.0106, rel=1e-3)
