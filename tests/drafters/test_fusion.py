from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from specdec.controller import FixedController
from specdec.controller_adaptive import AdaptiveController
from specdec.cost_model import CostModel
from specdec.drafters.fusion import FusedDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.engine import Engine
from specdec.errors import ConfigError
from specdec.protocols import Controller, Drafter, DrafterNeeds, Load
from specdec.sampling import Sampler
from specdec.toy import OracleDrafter, RandomTreeDrafter, ToyTarget
from specdec.types import DraftTree, Request, RequestState, SamplingParams, StepEvent
from specdec.verifier.match import MatchVerifier

V = 30


class Watched:
    """A drafter that notes who was asked and what it was told."""

    def __init__(self, inner: Drafter) -> None:
        self.inner, self.needs = inner, DrafterNeeds()
        self.asked, self.told = 0, 0

    def start(self, states: Sequence[RequestState]) -> None:
        self.inner.start(states)

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        self.asked += 1
        return self.inner.propose(states, budgets)

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.told += 1
        self.inner.observe(events)

    def stop(self, request_ids: Sequence[str]) -> None:
        self.inner.stop(request_ids)


class RandomController(AdaptiveController):
    """Plans and admits at random, every step."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = np.random.default_rng(seed)

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        super().plan(states, load)
        return self._rng.integers(0, 12, len(states)).tolist()

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        parts = []
        for tree in trees:
            kept = [0]
            for node in range(1, len(tree)):
                if int(tree.parents[node]) in kept and self._rng.random() < 0.7:
                    kept.append(node)
            parts.append(tree.subtree(np.array(kept)))
        return parts


def outputs(
    drafter: Drafter, controller: Controller, *, temperature: float = 0.0, order: int = 2
) -> dict[str, list[int]]:
    engine = Engine(ToyTarget(vocab_size=V, seed=5, order=order), MatchVerifier(Sampler(V)), drafter, controller)
    requests = [
        Request(
            f"r{i}",
            np.array([i, 3, 1], np.int32),
            SamplingParams(max_new_tokens=60 + i, temperature=temperature, seed=i),
        )
        for i in range(5)
    ]
    found: dict[str, list[int]] = {}
    for output in engine.generate(requests):
        found.setdefault(output.request_id, []).extend(output.new_ids)
    return found


def retrieval() -> list[tuple[str, Drafter]]:
    return [
        ("suffix", SuffixDrafter()),
        ("lookahead", LookaheadDrafter()),
        ("recycling", RecyclingDrafter()),
        ("ngram", NgramDrafter()),
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_fused_drafts_and_any_controller_change_no_token(temperature: float, seed: int | None) -> None:
    plain = outputs(RandomTreeDrafter(V), FixedController(0), temperature=temperature)
    controller = AdaptiveController() if seed is None else RandomController(seed)
    hostile = [*retrieval(), ("random", RandomTreeDrafter(V))]
    assert outputs(FusedDrafter(hostile, costs=controller.costs), controller, temperature=temperature) == plain


def test_all_sources_are_asked_and_told() -> None:
    watched = [Watched(drafter) for _, drafter in retrieval()]
    drafter = FusedDrafter([(f"s{i}", w) for i, w in enumerate(watched)])
    outputs(drafter, FixedController(8))
    assert all(w.asked > 5 and w.told == w.asked for w in watched)
    assert drafter.names == ("s0", "s1", "s2", "s3")
    assert drafter.reliability()


def test_a_costly_source_is_left_out_while_a_cheap_one_suffices() -> None:
    plain = outputs(RandomTreeDrafter(V), FixedController(0))

    class Slow(OracleDrafter):
        def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
            return super().propose(states, budgets)

    costs = CostModel()
    costs.tokens_per_ms = 1.0
    cheap, dear = Watched(OracleDrafter(plain, V)), Watched(Slow(plain, V))
    drafter = FusedDrafter([("cheap", cheap), ("dear", dear)], costs=costs)
    for source in drafter._sources:
        source.num_calls, source.ms_each = 100, 50.0 if source.name == "dear" else 0.001
    drafter._sources[1].gains = [2.0, 0.0, 0.0, 0.0]
    assert outputs(drafter, FixedController(3)) == plain
    assert cheap.asked > 10
    assert dear.asked < cheap.asked / 2


def test_a_costly_source_is_asked_where_the_cheap_one_has_nothing() -> None:
    plain = outputs(RandomTreeDrafter(V), FixedController(0))
    costs = CostModel()
    costs.tokens_per_ms = 0.01
    cheap, dear = Watched(RandomTreeDrafter(V)), Watched(OracleDrafter(plain, V))
    drafter = FusedDrafter([("cheap", cheap), ("dear", dear)], costs=costs)
    for source in drafter._sources:
        source.num_calls, source.ms_each = 100, 20.0 if source.name == "dear" else 0.001
    assert outputs(drafter, FixedController(3)) == plain
    assert dear.asked == cheap.asked


def test_a_source_that_adds_much_but_seldom_is_not_given_up_in_a_lull() -> None:
    costs = CostModel()
    costs.tokens_per_ms = 0.2
    drafter = FusedDrafter([("a", NgramDrafter()), ("b", NgramDrafter())], costs=costs)
    source, num_asked = drafter._sources[1], 0
    source.num_calls, source.ms_each = 100, 0.1  # a call costs 0.02 tokens
    for step in range(3000):  # and brings 0.05: three tokens in every 60th step
        if drafter._worth_asking(source, [0], [0]):
            num_asked += 1
            source.note_gain(0, 3.0 if step % 60 == 59 else 0.0)
    assert num_asked > 2900
    for _ in range(3000):
        num_asked += bool(drafter._worth_asking(source, [0], [0]))
        source.note_gain(0, 0.0)
    assert num_asked < 4500


@pytest.mark.parametrize(("price", "least"), [(0.0, 0.05), (0.001, 0.005), (0.2, 0.1), (5.0, 0.5)])
def test_sources_look_as_deep_as_verifying_is_cheap(price: float, least: float) -> None:
    costs, source = CostModel(), NgramDrafter(min_value=0.05)
    costs.tokens_per_node = price
    outputs(FusedDrafter([("ngram", source)], costs=costs), FixedController(4))
    assert source.min_value == pytest.approx(least)


def test_a_cheap_source_is_soon_tried_again() -> None:
    costs = CostModel()
    costs.tokens_per_ms = 0.5
    drafter = FusedDrafter([("a", NgramDrafter())], costs=costs)
    source = drafter._sources[0]
    source.num_calls, source.ms_each, source.gains = 100, 0.1, [0.0] * 4
    asked = [step for step in range(2000) if drafter._worth_asking(source, [0], [0])]
    assert np.diff(asked).max() == 17
    source.ms_each = 10.0
    asked = [step for step in range(4000) if drafter._worth_asking(source, [0], [0])]
    assert np.diff(asked).max() == 257


def test_a_liar_costs_at_most_3_percent_after_50_steps() -> None:
    """Time as the tables have it: a step of T tokens takes 20 + T ms, so a wrong draft of 8 costs two fifths more."""
    from tests.test_step_budget import costs_of

    class Liar(RandomTreeDrafter):
        def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
            trees = [
                DraftTree.chain(int(s.token_ids[-1]), [0] * min(8, b)) for s, b in zip(states, budgets, strict=True)
            ]
            for tree in trees:
                tree.values = np.ones(len(tree), np.float32)
            return trees

    costs = costs_of(1, 1.0)
    controller = AdaptiveController(costs)
    drafter = FusedDrafter([("liar", Liar(V))], costs=costs)
    target = ToyTarget(vocab_size=V, seed=5)
    never_zero = SamplingParams(max_new_tokens=600, suppress_tokens=(0,))
    engine = Engine(target, MatchVerifier(Sampler(V)), drafter, controller)
    controller.budget.finish = lambda emitted, drafted, parts_ms: None  # type: ignore[method-assign]  # tables stay
    state = engine.submit(Request("r", np.array([4], np.int32), never_zero))
    drafted = []
    while engine.has_work:
        before = state.num_drafted
        engine.step()
        drafted.append(state.num_drafted - before)
    assert sum(drafted[:50]) > 8
    assert sum(drafted[50:]) * 1.0 <= 0.03 * 21.0 * len(drafted[50:])


def test_wrong_sources_are_named() -> None:
    with pytest.raises(ConfigError, match="1 to 8 different sources, got a, a"):
        FusedDrafter([("a", NgramDrafter()), ("a", NgramDrafter())])

    class Reads(RandomTreeDrafter):
        def __init__(self, layer: int) -> None:
            super().__init__(V)
            self.needs = DrafterNeeds(hidden_layers=(layer,))

    assert FusedDrafter([("a", Reads(2)), ("b", Reads(1)), ("c", NgramDrafter())]).needs.hidden_layers == (1, 2)
