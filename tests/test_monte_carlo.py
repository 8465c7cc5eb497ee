"""The real noise, sampler, match rule and engine together draw from the target's law: G-tests with fixed seeds.

What enumeration shows of the rule alone, counting shows of the whole path. Seeds are fixed, so a test that passes once
passes always; the gates say how unlikely a sound path was to fail at the first try.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from specdec.config import EngineConfig
from specdec.controller import FixedController
from specdec.engine import Engine
from specdec.protocols import Drafter, Observer
from specdec.sampling import Sampler
from specdec.toy import RandomTreeDrafter, ToyTarget
from specdec.types import Request, SamplingParams, StepEvent
from specdec.verifier.match import MatchVerifier

VOCAB_SIZE = 5
PROMPT = np.array([2, 0, 3], dtype=np.int32)
NUM_REQUESTS = 8000
GATE = 3.7  # z; a sound path exceeds it with probability 1e-4

Law = npt.NDArray[np.float64]


def soften(temperature: float, top_k: int) -> tuple[Law, SamplingParams]:
    """The exact joint law of the first two tokens, [V, V], and the parameters that ask for it."""
    target = ToyTarget(vocab_size=VOCAB_SIZE)

    def law(text: list[int]) -> Law:
        logits = target.logits(text) / temperature
        if top_k:
            logits[logits < np.sort(logits)[-top_k]] = -np.inf
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    first = law(PROMPT.tolist())
    joint = np.stack([first[token] * law([*PROMPT.tolist(), token]) for token in range(VOCAB_SIZE)])
    return joint, SamplingParams(temperature=temperature, top_k=top_k, max_new_tokens=2)


class AcceptanceCounter:
    """Compares how often some child of the root was accepted with how often that must happen."""

    def __init__(self, first: Law) -> None:
        self._first = first
        self.surplus = 0.0
        self.variance = 0.0

    def observe(self, events: list[StepEvent]) -> None:
        for event in events:
            if event.trace.position == len(PROMPT):
                chance = float(self._first[event.tree.token_ids[1:][event.tree.parents[1:] == 0]].sum())
                self.surplus += (event.result.num_accepted > 0) - chance
                self.variance += chance * (1 - chance)


def decode(params: SamplingParams, drafter: Drafter, budget: int, *observers: Observer) -> Counter[tuple[int, ...]]:
    """How often each pair of first tokens came, over ``NUM_REQUESTS`` neighbouring seeds."""
    engine = Engine(
        ToyTarget(vocab_size=VOCAB_SIZE),
        MatchVerifier(Sampler(VOCAB_SIZE)),
        drafter,
        FixedController(budget),
        config=EngineConfig(max_batch_size=100, max_prefill_tokens=10**6),
        observers=observers,
    )
    base = {name: getattr(params, name) for name in ("temperature", "top_k", "max_new_tokens")}
    requests = [Request(f"r{seed}", PROMPT, SamplingParams(**base, seed=seed)) for seed in range(NUM_REQUESTS)]
    states = {output.request_id: output.state for output in engine.generate(requests)}
    return Counter(tuple(state.output_ids.tolist()) for state in states.values())


@cache
def plain_counts(temperature: float, top_k: int) -> Counter[tuple[int, ...]]:
    _, params = soften(temperature, top_k)
    return decode(params, RandomTreeDrafter(VOCAB_SIZE), 0)


def g_test(counts: Counter[tuple[int, ...]], joint: Law) -> float:
    """G statistic as a z value (Wilson-Hilferty); cells expected fewer than 5 times are one cell."""
    observed = np.array([counts[pair] for pair in itertools.product(range(VOCAB_SIZE), repeat=2)], dtype=float)
    expected = joint.ravel() * observed.sum()
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        assert observed[-1] == 0, "a token of probability zero was drawn"
        observed, expected = observed[:-1], expected[:-1]
    seen = observed > 0
    statistic = 2 * float((observed[seen] * np.log(observed[seen] / expected[seen])).sum())
    spread = 2 / (9 * (len(expected) - 1))
    return float(((statistic / (len(expected) - 1)) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 3)])
def test_the_first_two_tokens_follow_the_joint_law_of_the_target(temperature: float, top_k: int) -> None:
    joint, _ = soften(temperature, top_k)
    assert abs(g_test(plain_counts(temperature, top_k), joint)) < GATE


def test_the_test_notices_a_temperature_that_is_wrong_by_a_fifth() -> None:
    wrong, _ = soften(1.2, 0)
    assert g_test(plain_counts(1.0, 0), wrong) > 1.5 * GATE


def test_hostile_trees_change_no_count_and_are_accepted_as_often_as_they_must() -> None:
    joint, params = soften(1.0, 0)
    counter = AcceptanceCounter(joint.sum(axis=1))
    counts = decode(params, RandomTreeDrafter(VOCAB_SIZE), 4, counter)
    assert counts == plain_counts(1.0, 0)  # keyed noise: the very same texts
    assert counter.variance > 500
    assert abs(counter.surplus) < GATE * np.sqrt(counter.variance)
