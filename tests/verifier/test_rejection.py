"""The rejection verifiers inside the engine: the law over several steps, keyed coins, refusals, typical acceptance."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from specdec.config import EngineConfig
from specdec.controller import FixedController
from specdec.drafters.draws import draw_children
from specdec.drafters.ngram import NgramDrafter
from specdec.engine import Engine
from specdec.errors import ConfigError, InternalError, UnsupportedError
from specdec.protocols import DrafterNeeds, Draws, Verifier
from specdec.sampling import Sampler
from specdec.toy import RandomTreeDrafter, ToyTarget
from specdec.types import DraftTree, Request, RequestState, SamplingParams, StepEvent, TargetOutput
from specdec.verifier.match import MatchVerifier
from specdec.verifier.rejection import RejectionVerifier
from specdec.verifier.typical import TypicalVerifier, longest_typical_path, typical_thresholds

V = 4
PROMPT = np.array([2, 0, 3], dtype=np.int32)
NUM_REQUESTS = 3000
GATE = 3.7  # z; a sound path exceeds it with probability 1e-4
RULES: dict[str, Draws] = {
    "chain": "chain", "block": "chain", "specinfer": "with_replacement", "rrsw": "without_replacement",
    "traversal": "without_replacement",
}  # fmt: skip


class HonestDrafter:
    """Draws chains of three, or trees of shape [2, 1, 1], from a flatter law than the target's, which it knows."""

    def __init__(self, draws: Draws, *, is_honest: bool = True) -> None:
        self.needs = DrafterNeeds(draws=draws)
        self._draws = draws
        self._power = 1 if is_honest else 2  # of the law that it states
        self._toy = ToyTarget(vocab_size=V)

    def start(self, states: Sequence[RequestState]) -> None: ...

    def observe(self, events: Sequence[StepEvent]) -> None: ...

    def stop(self, request_ids: Sequence[str]) -> None: ...

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        return [self._tree(state, min(budget, 5)) for state, budget in zip(states, budgets, strict=True)]

    def _tree(self, state: RequestState, budget: int) -> DraftTree:
        text = state.token_ids.tolist()
        token_ids, parents, paths = [text[-1]], [-1], [text]
        laws = torch.zeros(budget + 1, V, dtype=torch.float64)
        for node in range(budget + 1):
            if node >= len(paths) or len(parents) > budget or len(paths[node]) >= len(text) + 3:
                break
            laws[node] = torch.from_numpy(0.6 * self._toy.logits(paths[node])).softmax(-1)
            count = min(2 if node == 0 and self._draws != "chain" else 1, budget + 1 - len(parents))
            key = {"seed": state.request.sampling.seed, "position": state.num_tokens, "node": node}
            for token_id in draw_children(laws[node], count, draws=self._draws, **key):
                token_ids.append(token_id)
                parents.append(node)
                paths.append([*paths[node], token_id])
        nodes = np.array(token_ids, dtype=np.int32), np.array(parents, dtype=np.int32)
        return DraftTree(*nodes, draft_probs=laws[: len(parents)] ** self._power)


def engine_of(verifier: Verifier, drafter: HonestDrafter | RandomTreeDrafter, budget: int = 5) -> Engine:
    config = EngineConfig(max_batch_size=100, max_prefill_tokens=10**6)
    return Engine(ToyTarget(vocab_size=V), verifier, drafter, FixedController(budget), config=config)


def decode(engine: Engine, num_requests: int, **params: float) -> tuple[list[tuple[int, ...]], float]:
    """The outputs by seed, and the mean number of accepted tokens per step."""
    options = {"max_new_tokens": 4, "temperature": 1.0} | params
    requests = [Request(f"r{seed}", PROMPT, SamplingParams(seed=seed, **options)) for seed in range(num_requests)]  # type: ignore[arg-type]
    states = {output.request_id: output.state for output in engine.generate(requests)}
    ordered = [states[request.request_id] for request in requests]
    accepted = sum(s.num_accepted for s in ordered) / sum(s.num_steps for s in ordered)
    return [tuple(s.output_ids.tolist()) for s in ordered], accepted


def z_of(texts: Sequence[tuple[int, ...]]) -> float:
    """How far the last three of four tokens, given all before, are from the target's law: a G-test as z value."""
    toy, statistic, freedom = ToyTarget(vocab_size=V), 0.0, 0
    for length in range(4):
        counts = Counter(text[: length + 1] for text in texts)
        for before in itertools.product(range(V), repeat=length):
            observed = np.array([counts[(*before, token)] for token in range(V)], dtype=float)
            law = np.exp(toy.logits([*PROMPT.tolist(), *before]))
            expected = observed.sum() * law / law.sum()
            if expected.min() >= 5:
                seen = observed > 0
                statistic += 2 * float((observed[seen] * np.log(observed[seen] / expected[seen])).sum())
                freedom += V - 1
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))


@pytest.mark.parametrize("rule", RULES)
def test_several_steps_together_follow_the_targets_law(rule: str) -> None:
    engine = engine_of(RejectionVerifier(Sampler(V), rule), HonestDrafter(RULES[rule]), 5 if rule != "block" else 3)
    texts, accepted = decode(engine, NUM_REQUESTS)
    assert abs(z_of(texts)) < GATE
    assert accepted > 0.5


@pytest.mark.parametrize("rule", RULES)
def test_the_test_notices_a_drafter_that_states_a_sharper_law_than_it_draws_from(rule: str) -> None:
    engine = engine_of(RejectionVerifier(Sampler(V), rule), HonestDrafter(RULES[rule], is_honest=False))
    texts, _ = decode(engine, 1000)
    assert z_of(texts) > 1.5 * GATE


def test_greedy_requests_keep_their_tokens_under_every_rule() -> None:
    expected = ToyTarget(vocab_size=V).greedy(PROMPT, 12)
    for rule, draws in RULES.items():
        engine = engine_of(RejectionVerifier(Sampler(V), rule), HonestDrafter(draws))
        [text], _ = decode(engine, 1, temperature=0.0, max_new_tokens=12)
        assert list(text) == expected


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    def make() -> Engine:
        return engine_of(RejectionVerifier(Sampler(V), "traversal"), HonestDrafter("without_replacement"))

    many, _ = decode(make(), 20, max_new_tokens=10)
    request = Request("alone", PROMPT, SamplingParams(seed=7, temperature=1.0, max_new_tokens=10))
    alone = list(make().generate([request]))[-1].state
    assert tuple(alone.output_ids.tolist()) == many[7]


@pytest.mark.parametrize("rule", RULES)
def test_the_engine_refuses_drafts_that_the_rule_cannot_judge(rule: str) -> None:
    verifier = RejectionVerifier(Sampler(V), rule)
    with pytest.raises(UnsupportedError, match="NgramDrafter needs the match rule"):
        Engine(ToyTarget(vocab_size=V), verifier, NgramDrafter(), FixedController(3))
    drafter = HonestDrafter("chain")
    drafter.needs = DrafterNeeds(draws="chain", needs_match=True)
    with pytest.raises(UnsupportedError, match="HonestDrafter needs the match rule"):
        engine_of(verifier, drafter)
    wrong: Draws = "without_replacement" if rule in ("chain", "block", "specinfer") else "with_replacement"
    with pytest.raises(UnsupportedError, match=f"HonestDrafter draws {wrong}"):
        engine_of(verifier, HonestDrafter(wrong))


def test_bad_rules_and_trees_without_laws_are_named() -> None:
    with pytest.raises(ConfigError, match="rejection rule must be one of chain, block, .* got 'greedy'"):
        RejectionVerifier(Sampler(V), "greedy")
    verifier = RejectionVerifier(Sampler(V), "chain")
    state = RequestState(Request("a", PROMPT))
    verifier.start(state)
    output = TargetOutput(torch.zeros(2, V), np.array([0, 2], dtype=np.int32))
    with pytest.raises(InternalError, match=r"need draft_probs of shape \(2, 4\), got None"):
        verifier.verify([state], [DraftTree.chain(3, [1])], output)


# --- draws ---------------------------------------------------------------------------------------------------------


def test_draws_without_replacement_are_ordered_and_skip_the_impossible() -> None:
    law = torch.tensor([0.5, 0.3, 0.2, 0.0])
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(4000):
        counts[tuple(draw_children(law, 3, draws="without_replacement", seed=seed, position=9, node=1))] += 1
    assert set(counts) == set(itertools.permutations(range(3)))
    assert counts[0, 1, 2] / 4000 == pytest.approx(0.5 * 0.6, abs=0.03)
    assert counts[2, 1, 0] / 4000 == pytest.approx(0.2 * 0.3 / 0.8, abs=0.03)


def test_draws_with_replacement_are_independent_of_each_other_and_of_other_nodes() -> None:
    law = torch.tensor([0.5, 0.5])
    draws: Draws = "with_replacement"
    pairs = Counter(tuple(draw_children(law, 2, draws=draws, seed=s, position=9, node=1)) for s in range(2000))
    assert all(count / 2000 == pytest.approx(0.25, abs=0.04) for count in pairs.values())
    same = sum(
        draw_children(law, 1, draws=draws, seed=s, position=9, node=1)
        == draw_children(law, 1, draws=draws, seed=s, position=9, node=2)
        for s in range(2000)
    )
    assert same / 2000 == pytest.approx(0.5, abs=0.05)


def test_a_chain_has_one_child() -> None:
    with pytest.raises(InternalError, match="a node can have 1 children, got 2"):
        draw_children(torch.ones(3), 2, draws="chain", seed=0, position=0, node=0)


# --- typical acceptance --------------------------------------------------------------------------------------------


def test_typical_acceptance_is_marked_and_is_not_lossless() -> None:
    verifier = TypicalVerifier(Sampler(V))
    assert not verifier.is_lossless
    assert RejectionVerifier(Sampler(V), "chain").is_lossless
    assert MatchVerifier(Sampler(V)).is_lossless
    texts, accepted = decode(engine_of(verifier, RandomTreeDrafter(V)), NUM_REQUESTS)
    assert accepted > 0.5
    assert z_of(texts) > 10


def test_typical_acceptance_is_match_for_greedy_requests() -> None:
    [text], _ = decode(engine_of(TypicalVerifier(Sampler(V)), RandomTreeDrafter(V)), 1, temperature=0, max_new_tokens=9)
    assert list(text) == ToyTarget(vocab_size=V).greedy(PROMPT, 9)


def test_typical_acceptance_takes_the_longest_plausible_path() -> None:
    p = torch.tensor([[0.45, 0.45, 0.05, 0.05], [0.0, 1.0, 0.0, 0.0], [0.25] * 4, [0.25] * 4], dtype=torch.float64)
    thresholds = typical_thresholds(p, epsilon=0.09, delta=0.3)
    entropy = -(0.9 * np.log(0.45) + 0.1 * np.log(0.05))
    assert thresholds.tolist() == pytest.approx([min(0.09, 0.3 * np.exp(-entropy)), 0.09, 0.075, 0.075])
    tree = DraftTree(np.array([9, 0, 1, 3], dtype=np.int32), np.array([-1, 0, 0, 2], dtype=np.int32))
    assert longest_typical_path(tree, p, thresholds) == [0, 2, 3]  # 1 is as good as 2, but nothing follows it
    tree = DraftTree(np.array([9, 0, 2], dtype=np.int32), np.array([-1, 0, 1], dtype=np.int32))
    assert longest_typical_path(tree, p, thresholds) == [0, 1]  # after 1 only token 1 is possible


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": 1.0}, {"delta": 0.0}])
def test_typical_acceptance_checks_its_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(options))} must be"):
        TypicalVerifier(Sampler(V), **options)
