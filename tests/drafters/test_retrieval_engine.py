"""Each retrieval drafter through the real loop: the same text as without drafting, and shorter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from specdec.build import build_engine
from specdec.controller import FixedController
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.store import RetrievalStore
from specdec.drafters.suffix import SuffixDrafter
from specdec.engine import Engine
from specdec.protocols import Drafter
from specdec.sampling import Sampler
from specdec.toy import ToyTarget
from specdec.types import Request, SamplingParams
from specdec.verifier.match import MatchVerifier
from tests.tiny_models import tiny_llama

MAKE: dict[str, Callable[[], Drafter]] = {
    "suffix tree": lambda: SuffixDrafter(threshold=0.0),
    "suffix path": lambda: SuffixDrafter(threshold=0.0, as_tree=False),
    "suffix without cache": lambda: SuffixDrafter(threshold=0.02, caching=False),
    "lookahead": lambda: LookaheadDrafter(min_value=0.0),
    "recycling": RecyclingDrafter,
}


def requests(sampling: SamplingParams, number: int = 5) -> list[Request]:
    rng = np.random.default_rng(number)
    return [
        Request(f"r{n}", np.tile(rng.integers(0, 7, 6), 3).astype(np.int32), sampling, tenant="ab"[n % 2])
        for n in range(number)
    ]


def texts(engine: Engine, work: list[Request]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {request.request_id: [] for request in work}
    for output in engine.generate(work):
        found[output.request_id] += output.new_ids
    return found


def toy_engine(drafter: Drafter, budget: int) -> Engine:
    target = ToyTarget(vocab_size=7)
    return Engine(target, MatchVerifier(Sampler(7)), drafter, FixedController(budget))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_toy_target_says_the_same_with_every_drafter(name, temperature):
    sampling = SamplingParams(max_new_tokens=40, temperature=temperature, seed=3)
    plain = texts(toy_engine(MAKE[name](), 0), requests(sampling))
    drafter = MAKE[name]()
    for _ in range(2):  # the second time with a warm store
        assert texts(toy_engine(drafter, 9), requests(sampling)) == plain


@pytest.mark.parametrize("name", MAKE)
def test_a_llama_says_the_same_with_every_drafter(name):
    sampling = SamplingParams(max_new_tokens=24)
    model = tiny_llama()
    plain = texts(build_engine(model, "none", budget=0), requests(sampling))
    assert texts(build_engine(model, MAKE[name](), budget=12), requests(sampling)) == plain


@pytest.mark.parametrize("name", ["suffix tree", "suffix path", "lookahead"])
def test_a_repeated_request_takes_fewer_steps(name):
    sampling = SamplingParams(max_new_tokens=40, temperature=1.0, seed=5)
    store = RetrievalStore()
    drafter: Drafter = {
        "suffix tree": lambda: SuffixDrafter(store=store),
        "suffix path": lambda: SuffixDrafter(store=store, as_tree=False),
        "lookahead": lambda: LookaheadDrafter(store=store),
    }[name]()
    steps = []
    for turn in range(2):
        engine = toy_engine(drafter, 16)
        prompt = np.arange(7, dtype=np.int32)
        state = engine.submit(Request(f"turn {turn}", prompt, sampling))
        while engine.has_work:
            engine.step()
        steps.append(state.num_steps)
    assert steps[1] < steps[0] * 0.8


@pytest.mark.parametrize("name", MAKE)
def test_budgets_are_kept_and_nothing_is_left_of_finished_requests(name):
    drafter = MAKE[name]()
    engine = toy_engine(drafter, 3)
    texts(engine, requests(SamplingParams(max_new_tokens=10)))
    assert not drafter._live  # type: ignore[attr-defined]


def test_drafters_are_built_by_name():
    for name in ("suffix", "lookahead", "recycling"):
        engine = build_engine(tiny_llama(), name, budget=4)
        assert texts(engine, requests(SamplingParams(max_new_tokens=4), 1))["r0"]


def test_recycled_tokens_are_accepted():
    engine = toy_engine(RecyclingDrafter(), 30)
    state = engine.submit(Request("r", np.arange(7, dtype=np.int32), SamplingParams(max_new_tokens=60)))
    while engine.has_work:
        engine.step()
    assert state.num_steps < 40


@pytest.mark.parametrize("max_prefill_tokens", [7, 512])
def test_recycling_starts_from_what_the_target_finds_likely_in_the_prompt(max_prefill_tokens):
    model, drafter = tiny_llama(), RecyclingDrafter()
    prompt = np.random.default_rng(1).integers(0, 30, 40).astype(np.int32)
    engine = build_engine(model, drafter, budget=0, max_prefill_tokens=max_prefill_tokens)
    state = engine.submit(Request("r", prompt, SamplingParams(max_new_tokens=2)))
    while state.num_steps == 0:
        engine.step()
    with torch.no_grad():
        likeliest = model(torch.from_numpy(prompt).long()[None]).logits[0].topk(8).indices.numpy()
    last_place = {token: place for place, token in enumerate(prompt.tolist())}  # the root's row comes from its tree
    rows = drafter.store.successors("").rows
    assert {token: rows[token].tolist() for token in last_place} == {
        token: likeliest[place].tolist() for token, place in last_place.items()
    }
    assert state.successors == []


def test_prompts_are_scored_only_for_drafters_that_ask():
    engine = build_engine(tiny_llama(), "suffix", budget=4)
    state = engine.submit(Request("r", np.arange(9, dtype=np.int32), SamplingParams(max_new_tokens=3)))
    seen: list[int] = []
    target, forward = engine.target, engine.target.forward

    def watching(chunks):
        output = forward(chunks)
        seen.append(len(output.logits) - sum(len(chunk.tree) for chunk in chunks if chunk.tree is not None))
        assert len(output.successors) == 0
        return output

    target.forward = watching  # type: ignore[method-assign]
    while engine.has_work:
        engine.step()
    assert set(seen) == {0}
    assert state.successors == []
