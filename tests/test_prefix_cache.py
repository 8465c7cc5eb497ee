"""Beginnings that are known need no forward, and nobody's text changes for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from specdec.build import build_engine
from specdec.engine import Engine
from specdec.prefix_cache import PrefixCache
from specdec.tree_target import TreeTarget
from specdec.types import Request, RequestState, SamplingParams
from tests.test_tree_target import CONFIGS, FORGETS, VOCAB_SIZE, make_model

LENGTH = 128


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_model("llama")


def make_engine(model: PreTrainedModel, *, is_on: bool = True, **options: Any) -> Engine:
    options = {"max_length": LENGTH, "kv_tokens": 600, "max_batch_size": 3, "max_prefill_tokens": 24} | options
    return build_engine(model, "ngram", prefix_cache=is_on, **options)


def prefixes_of(engine: Engine) -> PrefixCache:
    assert isinstance(engine.target, TreeTarget)
    assert engine.target.prefixes is not None
    return engine.target.prefixes


def ask(name: str, prompt: Sequence[int], *, tenant: str = "", tokens: int = 6, seed: int = 1, **law: Any) -> Request:
    sampling = SamplingParams(max_new_tokens=tokens, seed=seed, **law)
    return Request(name, np.array(prompt, dtype=np.int32), sampling, tenant)


def answers(engine: Engine, requests: Sequence[Request]) -> dict[str, RequestState]:
    states = {}
    for output in engine.generate(requests):
        states[output.request_id] = output.state
    return states


def some_tokens(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, length).tolist()


def conversations(engine: Engine, *, temperature: float) -> tuple[list[list[int]], int]:
    """Two tenants, two conversations each, four turns on one system prompt; all texts, and the tokens recalled."""
    texts, num_recalled = [], 0
    system = some_tokens(0, 21)
    talks = {(tenant, talk): list(system) for tenant in "ab" for talk in range(2)}
    for turn in range(4):
        requests = []
        for (tenant, talk), text in talks.items():
            text += some_tokens(10 * turn + talk, 7)
            requests.append(
                ask(f"{tenant}{talk}", text, tenant=tenant, temperature=temperature, seed=turn, tokens=5 + talk)
            )
        for name, state in answers(engine, requests).items():
            talks[name[0], int(name[1])] += state.output_ids.tolist()
            num_recalled += state.num_recalled
            texts.append(state.output_ids.tolist())
    return texts, num_recalled


@pytest.mark.parametrize(("temperature", "kv_tokens"), [(0.0, 600), (1.0, 600), (0.0, 170)])
def test_no_text_changes(model: PreTrainedModel, temperature: float, kv_tokens: int) -> None:
    with make_engine(model, is_on=False) as engine:
        wanted, none = conversations(engine, temperature=temperature)
    with make_engine(model, kv_tokens=kv_tokens) as engine:
        texts, num_recalled = conversations(engine, temperature=temperature)
        prefixes_of(engine).clear()
        assert engine.target.pool.num_used == 0  # type: ignore[attr-defined]
    assert texts == wanted
    assert none == 0
    assert num_recalled > 0


def test_the_next_turn_moves_in_and_copies_nothing(model: PreTrainedModel) -> None:
    copied: list[int] = []
    with make_engine(model) as engine:
        first = answers(engine, [ask("first", some_tokens(1, 40))])["first"]
        for group in engine.target.pool.groups.values():  # type: ignore[attr-defined]
            move = group._move
            group._move = lambda source, target, move=move: (copied.append(len(source)), move(source, target))
        text = first.token_ids.tolist() + some_tokens(2, 5)
        second = answers(engine, [ask("second", text, tokens=1)])["second"]
    assert second.num_recalled == first.num_tokens - 1
    assert copied == []


def test_a_common_beginning_is_copied_and_both_stay(llama: PreTrainedModel) -> None:
    system = some_tokens(1, 30)
    with make_engine(llama) as engine:
        answers(engine, [ask("first", system + some_tokens(2, 9))])
        states = answers(engine, [ask(name, system + some_tokens(seed, 9)) for name, seed in (("b", 3), ("c", 4))])
        assert [states[name].num_recalled for name in "bc"] == [30, 30]
        assert len(prefixes_of(engine)) == 3


def test_a_request_that_still_runs_lends_what_it_has(llama: PreTrainedModel) -> None:
    prompt = some_tokens(1, 20)
    with make_engine(llama) as engine:
        engine.submit(ask("long", prompt, tokens=60))
        engine.step()
        late = engine.submit(ask("late", [*prompt, 5]))
        engine.step()
        assert late.num_recalled >= 19


@pytest.mark.parametrize("kind", FORGETS)
def test_what_a_window_has_forgotten_is_computed_again(kind: str) -> None:
    prompt = some_tokens(1, 60)
    with make_engine(make_model(kind)) as engine:
        answers(engine, [ask("first", prompt)])
        second = answers(engine, [ask("second", [*prompt[:33], *some_tokens(2, 20)])])["second"]
    assert second.num_recalled == 0


def test_one_tenant_never_finds_what_another_left(llama: PreTrainedModel) -> None:
    prompt = some_tokens(1, 40)
    with make_engine(llama) as engine:
        answers(engine, [ask("hers", prompt, tenant="her")])
        his = answers(engine, [ask("his", prompt, tenant="him")])["his"]
        hers = answers(engine, [ask("hers", prompt, tenant="her")])["hers"]
    assert his.num_recalled == 0
    assert hers.num_recalled == len(prompt) - 1


def test_kept_text_gives_way_to_whoever_needs_room(llama: PreTrainedModel) -> None:
    with make_engine(llama, kv_tokens=300) as engine:
        for turn in range(20):
            state = answers(engine, [ask("r", some_tokens(turn, 90), tokens=20)])["r"]
            assert state.num_preemptions == 0
            assert prefixes_of(engine).num_tokens <= 300
        requests = [ask(f"r{i}", some_tokens(50 + i, 80), tokens=10) for i in range(3)]
        states = answers(engine, requests)
        assert sum(state.num_preemptions for state in states.values()) == 0


def test_the_least_recently_used_beginning_goes_first(llama: PreTrainedModel) -> None:
    old, other = some_tokens(1, 40), some_tokens(2, 40)
    with make_engine(llama) as engine:
        answers(engine, [ask("old", old)])
        answers(engine, [ask("other", other)])
        answers(engine, [ask("again", [*old[:30], 7, 8, 9])])  # makes `old` the more recent one
        prefixes_of(engine).drop_oldest()
        assert answers(engine, [ask("x", other)])["x"].num_recalled == 0
        assert answers(engine, [ask("y", old)])["y"].num_recalled == 39


def test_a_cancelled_request_leaves_what_was_committed(llama: PreTrainedModel) -> None:
    prompt = some_tokens(1, 60)
    with make_engine(llama) as engine:
        engine.submit(ask("long", prompt))
        engine.step()  # 24 tokens of the prompt
        engine.cancel("long")
        state = answers(engine, [ask("again", prompt)])["again"]
    assert state.num_recalled == 24


def test_newcomers_get_runs_of_their_own_in_a_pool_full_of_kept_text(llama: PreTrainedModel) -> None:
    with make_engine(llama, kv_tokens=1200, max_batch_size=2) as engine:
        groups = engine.target.pool.groups.values()  # type: ignore[attr-defined]
        for turn in range(30):
            for index in range(2):
                engine.submit(ask(f"r{index}", some_tokens(2 * turn + index, 20 + turn), tokens=10))
            while engine.has_work:
                engine.step()
                live = [
                    group.tables[state.request_id]
                    for group in groups
                    for state in engine.scheduler.running
                    if state.request_id in group.tables
                ]
                assert all(table.is_run for table in live)
        assert len(prefixes_of(engine)) > 2
