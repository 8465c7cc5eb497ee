"""The rejection rules keep the target's law for honest drafts, exactly, and do not for others."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest
import torch

from specdec.errors import InternalError
from specdec.types import DraftTree
from specdec.verifier.ratio_rules import RULES, block, recursive, specinfer, traversal
from tests import enumeration as e
from tests.test_enumeration import BIASED, DISHONEST, EXACT, HONEST
from tests.verifier.exact_laws import deep_tree, independent_tree, rule_law

CHAINS = {name: HONEST[name] for name in list(HONEST)[:3]}
TREES = {name: process for name, process in HONEST.items() if "tree" in name} | {"a deep tree [2, 1, 1]": deep_tree}
DRAFTS = {
    "chain": CHAINS,
    "with_replacement": {"two independent draws": independent_tree},
    "without_replacement": TREES,
}
LOSSLESS = [
    (rule, process, drafts[process])
    for rule in RULES
    for draws in sorted(RULES[rule].draws)
    for drafts in [DRAFTS[draws]]
    for process in drafts
]
FALSE_CHAINS = [name for name in DISHONEST if "child" not in name]  # one child per node
FALSE = [(rule, name) for rule in ("chain", "block", "specinfer") for name in FALSE_CHAINS] + [
    (rule, name) for rule in ("rrsw", "traversal") for name in DISHONEST
]


@pytest.mark.parametrize(("rule", "name", "process"), LOSSLESS, ids=[f"{rule}-{name}" for rule, name, _ in LOSSLESS])
def test_a_rule_keeps_the_law_of_honest_drafts(rule: str, name: str, process: e.Process) -> None:
    num_telling = 0
    num_models, num_tokens = (4, 4) if process is deep_tree else (15, 3)
    for seed in range(num_models):
        models = e.random_models(seed, num_tokens=num_tokens)
        law, mean_accepted = rule_law(models, RULES[rule].decide, process(models, ()))
        assert sum(law.values()) == pytest.approx(1, abs=EXACT)
        assert e.total_variation(law, e.target_law(models)) < EXACT
        num_telling += mean_accepted > 0.01
    assert num_telling >= 0.6 * num_models, "a model on which nothing was accepted shows nothing"


@pytest.mark.parametrize(("rule", "process"), FALSE)
def test_a_rule_is_biased_on_drafts_that_break_its_premises(rule: str, process: str) -> None:
    distances = []
    for seed in range(20):
        models = e.random_models(seed, num_tokens=3)
        law, mean_accepted = rule_law(models, RULES[rule].decide, DISHONEST[process](models, ()))
        assert sum(law.values()) == pytest.approx(1, abs=EXACT)  # a law, only not the target's
        distances.append(e.total_variation(law, e.target_law(models)) if mean_accepted > 0 else 0)
    assert median(distances) > 10 * BIASED
    assert sum(distance > BIASED for distance in distances) >= 14


def test_the_multi_step_rule_is_biased_without_replacement_and_where_equal_draws_are_merged() -> None:
    for process in (e.sampled_tree(lambda *_: 2), e.two_draws):
        distances = []
        for seed in range(30):
            models = e.random_models(seed, num_tokens=2)
            law, _ = rule_law(models, specinfer, process(models, ()))
            distances.append(e.total_variation(law, e.target_law(models)))
        assert max(distances) > BIASED


def mean_accepted_by(rule: str, process: e.Process, num_tokens: int = 4) -> list[float]:
    models = [e.random_models(seed, num_tokens=num_tokens) for seed in range(6)]
    return [rule_law(model, RULES[rule].decide, process(model, ()))[1] for model in models]


def three_tokens(models: e.Models, text: e.Text) -> e.Outcomes:
    """A chain of three tokens drawn from q."""
    for first, second, third in np.ndindex(e.V, e.V, e.V):
        tokens = (first, second, third)
        laws = e.claims(models, text, tokens)
        weight = float(np.prod([law[token] for law, token in zip(laws, tokens, strict=True)]))
        yield weight, e.as_chain(tokens, laws)


def test_looking_at_the_whole_draft_never_accepts_less() -> None:
    by_token, by_block = mean_accepted_by("chain", three_tokens), mean_accepted_by("block", three_tokens)
    assert all(b >= t - 1e-12 for t, b in zip(by_token, by_block, strict=True))
    assert max(b - t for t, b in zip(by_token, by_block, strict=True)) > 0.01
    assert mean_accepted_by("traversal", three_tokens) == pytest.approx(by_block, abs=1e-12)
    assert sum(mean_accepted_by("traversal", deep_tree)) > sum(mean_accepted_by("rrsw", deep_tree)) + 0.05


def chain_and_laws() -> tuple[DraftTree, torch.Tensor]:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], dtype=torch.float64)
    return DraftTree.chain(0, [1, 2]), p


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_from_the_targets_own_law_is_always_accepted(rule: str) -> None:
    tree, p = chain_and_laws()
    asked: list[float] = []

    def accept(probability: float) -> bool:
        asked.append(probability)
        return True

    node, weights = RULES[rule].decide(tree, p, p, accept)
    assert (node, asked[0]) == (2, 1.0)
    assert torch.equal(weights, p[2])


@pytest.mark.parametrize("rule", RULES)
def test_a_root_alone_gives_the_targets_law(rule: str) -> None:
    p = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    node, weights = RULES[rule].decide(DraftTree.root_only(1), p, torch.zeros_like(p), lambda _: True)
    assert node == 0
    assert torch.equal(weights, p[0])


def test_no_law_is_read_below_an_impossible_token() -> None:
    p = torch.tensor([[0.0, 1.0], [torch.nan, torch.nan], [torch.nan, torch.nan]], dtype=torch.float64)
    q = torch.full((3, 2), 0.5, dtype=torch.float64)
    for rule in (recursive, block, traversal):
        node, weights = rule(DraftTree.chain(1, [0, 0]), p, q, lambda probability: probability == 1)
        assert (node, weights.tolist()) == (0, [0.0, 1.0])


def test_drafts_that_cannot_be_what_they_state_are_named() -> None:
    tree, p = chain_and_laws()
    q = torch.tensor([[1.0, 0.0, 0.0]] * 3, dtype=torch.float64)
    for rule in RULES.values():
        with pytest.raises(InternalError, match=r"token 1 was drafted, but the stated draft law gives it probability"):
            rule.decide(tree, p, q, lambda _: True)
    branching = DraftTree(np.array([0, 1, 2], dtype=np.int32), np.array([-1, 0, 0], dtype=np.int32))
    with pytest.raises(InternalError, match="defined for chains"):
        block(branching, p, p, lambda _: True)
