"""Length rules: what they send, that only those which declare it anticipate, and that match never minds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.build import build_engine
from specdec.cost_model import TOKENS, CostTable
from specdec.drafters.block_guesses import Chains
from specdec.drafters.block_length import ChunkLength, EmaLength, FixedLength, LengthRule, ThresholdLength
from specdec.drafters.block_throughput import ThroughputLength
from specdec.drafters.diffusion import DiffusionDrafter
from specdec.drafters.diffusion_files import read_diffusion_files
from specdec.drafters.diffusion_loading import build_diffusion_head, length_rule
from specdec.errors import ConfigError, UnsupportedError
from specdec.readings import HiddenStates
from specdec.types import (
    DraftTree,
    Request,
    RequestState,
    SamplingParams,
    StepEvent,
    StepTrace,
    TargetOutput,
    VerifyResult,
)
from tests.drafters.diffusion_checkpoints import write
from tests.drafters.drafting import run
from tests.drafters.eagle_checkpoints import VOCAB_SIZE, eagle_target

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 250, size).astype(np.int32) for size in (7, 2, 23)]
K = 6


class Cheat:
    """Sends what it likes the look of: tokens up to the first odd one that is not, or a third of the vocabulary."""

    anticipates = True
    mix = 0.0

    def may_draft(self, states: Sequence[RequestState]) -> list[bool]:
        return [True] * len(states)

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Any) -> list[int]:
        return [int((row % 3 != 0).cumprod().sum()) for row in chains.token_ids]

    def observe(self, events: Sequence[StepEvent]) -> None: ...

    def stop(self, request_ids: Sequence[str]) -> None: ...


RULES: dict[str, dict[str, Any]] = {
    "fixed": {"length": 3},
    "threshold": {"at": 0.1},
    "threshold, own": {"at": 0.02, "own": 1},
    "throughput": {},
    "throughput, ahead": {"lookahead": 1},
    "throughput, resting": {"rest": 1},
    "chunk": {"size": 2, "at": 0.4},
    "ema": {"low": 1},
    "apd": {"mix": 0.5},
    "cheat": {},
}


def rule_of(name: str) -> LengthRule:
    return Cheat() if name == "cheat" else length_rule(name.split(",")[0], dict(RULES[name]))


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@pytest.fixture(scope="module")
def head(target: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    files = read_diffusion_files(write("deepspec-dspark", tmp_path_factory.mktemp("head")))
    return build_diffusion_head(files, target, files.head_config(target.config))


@pytest.fixture(scope="module", params=[0.0, 1.0])
def plain(request: pytest.FixtureRequest, target: Any) -> tuple[float, list[list[int]]]:
    states, _ = run(target, "none", PROMPTS, 24, temperature=request.param)
    return request.param, [state.output_ids.tolist() for state in states]


@pytest.mark.parametrize("name", RULES)
def test_under_match_no_rule_changes_the_text(target: Any, head: Any, plain: Any, name: str) -> None:
    temperature, texts = plain
    drafter = DiffusionDrafter(head, vocab_size=VOCAB_SIZE, rule=rule_of(name))
    states, watch = run(target, drafter, PROMPTS, 24, temperature=temperature)
    assert [state.output_ids.tolist() for state in states] == texts
    lengths = {tree.num_draft_tokens for _, tree in watch.seen}
    assert max(lengths) > 0
    assert len(lengths) > 2 or name in ("fixed", "ema", "throughput, resting")  # it really varies


@pytest.mark.parametrize("name", [name for name in RULES if rule_of(name).anticipates])
def test_a_rule_that_anticipates_is_refused_under_rejection(target: Any, head: Any, name: str) -> None:
    with pytest.raises(UnsupportedError, match="only the match rule keeps the target's law"):
        DiffusionDrafter(head, vocab_size=VOCAB_SIZE, rule=rule_of(name), draws="chain")
    unsuspecting = DiffusionDrafter(head, vocab_size=VOCAB_SIZE, rule=rule_of(name))
    with pytest.raises(UnsupportedError, match="needs the match rule"):
        build_engine(target, unsuspecting, verifier="block")


@pytest.mark.parametrize("name", [name for name in RULES if not rule_of(name).anticipates])
def test_a_rule_that_does_not_is_taken_under_rejection(target: Any, head: Any, name: str) -> None:
    drafter = DiffusionDrafter(head, vocab_size=VOCAB_SIZE, rule=rule_of(name), draws="chain")
    states, watch = run(target, drafter, PROMPTS, 12, temperature=1.0, verifier="block")
    assert all(state.num_output_tokens == 12 for state in states)
    assert sum(tree.num_draft_tokens for _, tree in watch.seen) > 0


def chains_of(chances: Any, values: Any, agrees: Any, token_ids: Any) -> Chains:
    return Chains(token_ids, values, chances, agrees, [])


@pytest.mark.parametrize("name", RULES)
def test_whether_a_token_is_sent_depends_on_it_or_later_ones_only_where_the_rule_says_so(name: str) -> None:
    """Two drafts alike before place k: token k is sent in both or in none. Its chance does not look at it."""
    states = [RequestState(Request("r", PROMPTS[0], SamplingParams()))]
    rng = np.random.default_rng(0)
    broken = 0
    for trial in range(300):
        rule = rule_of(name)
        if isinstance(rule, ThroughputLength):
            know(rule, lambda tokens: 1.0 + (tokens >= 3) + 2.0 * (tokens >= 6))
        k = trial % K
        first = [rng.random((1, K)), rng.random((1, K)), rng.random((1, K)) < 0.7, rng.integers(0, 9, (1, K))]
        second = [rng.random((1, K)), rng.random((1, K)), rng.random((1, K)) < 0.7, rng.integers(0, 9, (1, K))]
        for place, (a, b) in enumerate(zip(first, second, strict=True)):
            b[:, : k + (place == 0)] = a[:, : k + (place == 0)]
        sent = [rule.lengths(states, chains_of(*parts), parts[0])[0] > k for parts in (first, second)]
        broken += sent[0] != sent[1]
    assert bool(broken) == rule_of(name).anticipates


def observe(
    rule: Any, state: RequestState, tokens: int, ms: float, accepted: int = 0, times: int = 20, prompt: int = 0
) -> None:
    """Steps of one request, beside ``prompt`` tokens of a prompt."""
    hidden = HiddenStates((0,), torch.empty(tokens + prompt, 1))
    output = TargetOutput(torch.empty(tokens, 1), np.array([0, tokens], dtype=np.int32), hidden)
    tree = DraftTree.chain(0, list(range(1, tokens)))
    trace = StepTrace("r", 1, state.num_tokens, tokens - 1, accepted, accepted + 1, 1, 0.5, ms, 0.0, 0.0)
    ids = np.arange(accepted, dtype=np.int32)
    for _ in range(times):
        rule.observe([StepEvent(state, tree, VerifyResult(ids, ids, 0), output, 0, ids, trace)])


def know(rule: ThroughputLength, ms: Callable[[int], float]) -> None:
    """As if the times of steps were known: 0.5 ms for a draft, ``ms`` of the tokens for the rest."""
    rule._draft = CostTable(np.full((8, 5, len(TOKENS)), 0.5))
    rule._target = CostTable(np.broadcast_to([ms(tokens) for tokens in TOKENS], (8, 5, len(TOKENS))))


def lengths(rule: LengthRule, chances: list[list[float]], values: Any = None) -> list[int]:
    states = [RequestState(Request(f"r{i}", PROMPTS[0], SamplingParams())) for i in range(len(chances))]
    given = np.array(chances)
    agrees = np.array([[True, False, True]] * len(chances))
    parts = chains_of(given, given if values is None else np.array(values), agrees, np.ones_like(given, dtype=np.int64))
    return rule.lengths(states, parts, given)


def test_rules_send_what_their_papers_say() -> None:
    assert lengths(ThresholdLength(at=0.5), [[0.9, 0.4, 0.9], [0.2, 0.9, 0.9]]) == [1, 0]
    assert lengths(ThresholdLength(at=0.5, own=1), [[0.1, 0.1, 0.1]], [[0.9, 0.9, 0.1]]) == [2]
    assert lengths(ChunkLength(size=2, at=0.5), [[0.9, 0.4, 0.9], [0.9, 0.9, 0.1]]) == [2, 3]
    assert lengths(ChunkLength(size=1, at=0.5, most=2), [[0.9, 0.9, 0.9], [0.1, 0.9, 0.9]]) == [2, 1]
    assert lengths(length_rule("apd", {"mix": 0.5}), [[0.1, 0.1, 0.1]]) == [2]
    assert lengths(length_rule("fixed", {}), [[0.1, 0.1, 0.1]]) == [3]


def test_ema_grows_while_everything_is_accepted_and_shrinks_to_what_was() -> None:
    state = RequestState(Request("r0", PROMPTS[0], SamplingParams()))
    rule = EmaLength(low=1, high=4, step=2, decay=0.0)
    assert lengths(rule, [[0.5] * 6]) == [3]
    observe(rule, state, 4, 1.0, accepted=3)  # all three
    assert lengths(rule, [[0.5] * 6]) == [4]
    observe(rule, state, 4, 1.0, accepted=1)
    assert lengths(rule, [[0.5] * 6]) == [3]
    rule.stop(["r0"])
    assert lengths(rule, [[0.5] * 6]) == [3]


def test_throughput_sends_what_is_worth_its_time_over_all_requests() -> None:
    state = RequestState(Request("r", PROMPTS[0], SamplingParams()))
    rule = ThroughputLength()
    assert lengths(rule, [[0.1, 0.1, 0.1]]) == [3]  # no time known yet
    observe(rule, state, 3, 9.0, prompt=50)
    assert not rule._target.is_measured
    rule.may_draft([state])
    observe(rule, state, 3, 2.0)
    assert rule._draft.at(1, state.num_tokens, 1) == pytest.approx(0.5, rel=0.01)
    assert rule._target.at(3, state.num_tokens, 1) == pytest.approx(2.0, rel=0.01)
    know(rule, lambda tokens: 1.0 * tokens)
    # A draft costs 0.5, a token 1: 1 / 1.5 = .67, 1.9 / 2.5 = .76, 2.71 / 3.5 = .77, 3.11 / 4.5 = .69
    assert lengths(rule, [[0.9, 0.9, 0.5]]) == [2]
    assert lengths(rule, [[0.3, 0.9, 0.9]]) == [0]
    steps = ThroughputLength(lookahead=1)
    know(steps, lambda tokens: 1.0 + (tokens >= 2))
    assert lengths(steps, [[0.55, 0.99, 0.99]]) == [3]  # past a step that one token alone is not worth


def test_a_request_whose_guesses_do_not_pay_rests_and_is_asked_again() -> None:
    """One request is sure of its blocks, the other is not: it is by their own chances that they rest."""
    rule = ThroughputLength(rest=1)
    know(rule, lambda tokens: 1.0 + 0.01 * tokens)
    states = [RequestState(Request(name, PROMPTS[0], SamplingParams())) for name in ("sure", "unsure")]
    chances = {"sure": [0.95, 0.95, 0.95], "unsure": [0.1, 0.1, 0.1]}
    asked = {name: 0 for name in chances}
    for _ in range(60):
        drafting = [state for state, may in zip(states, rule.may_draft(states), strict=True) if may]
        if drafting:
            given = np.array([chances[state.request_id] for state in drafting])
            found = rule.lengths(drafting, chains_of(given, given, given > 0, np.ones_like(given)), given)
            assert all(length == 3 for length, state in zip(found, drafting, strict=True) if state is states[0])
        for state in drafting:
            asked[state.request_id] += 1
    assert asked["sure"] == 60
    assert 2 <= asked["unsure"] <= 30
    assert ThroughputLength().may_draft(states) == [True, True]


@pytest.mark.parametrize(("draft_ms", "asked"), [(0.05, [0, 2, 5, 10, 19, 36, 69]), (2.0, [0, 17, 50, 83])])
def test_the_dearer_a_guess_in_vain_the_longer_the_first_rest(draft_ms: float, asked: list[int]) -> None:
    rule, found = ThroughputLength(rest=1), list[int]()
    know(rule, lambda tokens: 1.0 + 0.01 * tokens)
    rule._draft = CostTable(np.full((8, 5, len(TOKENS)), draft_ms))
    state = RequestState(Request("r0", PROMPTS[0], SamplingParams()))
    for step in range(100):
        if rule.may_draft([state])[0]:
            found.append(step)
            lengths(rule, [[0.01, 0.1, 0.1]])
    assert found == asked


def test_the_pass_that_reads_a_prompt_teaches_no_time() -> None:
    state = RequestState(Request("r0", PROMPTS[0], SamplingParams()))
    rule = ThroughputLength(rest=1)
    for step in range(3):
        rule.may_draft([state])
        if step:  # in the first one the target has shown no states yet
            lengths(rule, [[0.9, 0.9, 0.9]])
        observe(rule, state, 3 if step else 1, 2.0, times=1)
        assert rule._draft.is_measured == (step == 2)


def test_a_pass_for_trials_alone_tries_all_that_have_half_of_their_rest_behind_them() -> None:
    """Two requests, one of which came a step later, are tried together from then on: a pass for both costs less."""
    rule, passes = ThroughputLength(rest=1), list[list[str]]()
    know(rule, lambda tokens: 1.0 + 0.01 * tokens)
    states = [RequestState(Request(name, PROMPTS[0], SamplingParams())) for name in ("r0", "r1")]
    for step in range(60):
        live = states[: 1 + (step > 0)]
        drafting = [state for state, may in zip(live, rule.may_draft(live), strict=True) if may]
        if drafting:
            passes.append([state.request_id for state in drafting])
            given = np.full((len(drafting), 3), 0.1)
            rule.lengths(drafting, chains_of(given, given, given > 0, np.ones_like(given)), given)
    assert passes[:2] == [["r0"], ["r1"]]
    assert len(passes) > 2
    assert all(both == ["r0", "r1"] for both in passes[2:])


def test_a_size_that_was_slow_once_is_measured_again() -> None:
    """Times of a disturbed start must not keep a sure draft from being sent for ever."""
    rule = ThroughputLength(rest=1)
    know(rule, lambda tokens: 1.0 if tokens == 1 else 8.0)
    state, sure = RequestState(Request("r0", PROMPTS[0], SamplingParams())), [[0.95, 0.95, 0.95]]
    sent = []
    for _ in range(40):
        found = lengths(rule, sure)[0] if rule.may_draft([state])[0] else 0
        observe(rule, state, found + 1, 1.1 if found else 1.0, times=1)
        sent.append(found)
    assert sent[-10:] == [3] * 10


class EveryFifth(FixedLength):
    """Lets requests draft in every fifth step; counts the steps."""

    num_asked = 0

    def may_draft(self, states: Sequence[RequestState]) -> list[bool]:
        self.num_asked += 1
        return [self.num_asked % 5 == 0] * len(states)


def test_a_resting_request_costs_no_guess_and_misses_nothing(
    target: Any, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all rest the head makes no pass; of the same text it then guesses what it would have guessed anyway."""
    rule = EveryFifth()
    drafter = DiffusionDrafter(head, vocab_size=VOCAB_SIZE, rule=rule)
    run_head, passes = drafter._scorer._run, list[int]()
    monkeypatch.setattr(drafter._scorer, "_run", lambda growths: passes.append(rule.num_asked) or run_head(growths))
    _, rested = run(target, drafter, PROMPTS[:1], 24)
    assert passes
    assert all(step % 5 == 0 for step in passes)
    _, always = run(target, DiffusionDrafter(head, vocab_size=VOCAB_SIZE), PROMPTS[:1], 24)
    guesses = {len(text): tree.token_ids.tolist() for text, tree in always.seen}
    same = [tree.token_ids.tolist() == guesses[len(text)] for text, tree in rested.seen
            if tree.num_draft_tokens > 1 and len(text) in guesses]  # fmt: skip
    assert len(same) > 1
    assert all(same)


def test_bad_options_are_named() -> None:
    for name, options, message in (
        ("threshold", {"at": 1.5}, r"at must be in \[0, 1\], got 1.5"),
        ("chunk", {"size": 5, "most": 3}, "most must be >= size = 5, got 3"),
        ("ema", {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ("apd", {"mix": 0.0}, r"mix must be in \(0, 1\), got 0.0"),
        ("fixed", {"length": -1}, "length must be >= 0, got -1"),
        ("throughput", {"rest": 2}, "rest must be 0 or 1, got 2"),
        ("best", {}, "rule must be one of fixed, threshold, throughput, chunk, ema, apd, got 'best'"),
    ):
        with pytest.raises(ConfigError, match=message):
            length_rule(name, options)


def test_apd_needs_a_markov_head(target: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apd compares a Markov head with its absence"):
        build_engine(target, f"diffusion:{write('zlab', tmp_path)}?rule=apd&probe=0")
