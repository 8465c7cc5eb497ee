from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters._ngram_index import MAX_MATCH, NUM_RANKS
from specdec.drafters.ngram import NgramDrafter, _Rates
from specdec.errors import ConfigError, InternalError
from specdec.protocols import Drafter
from specdec.types import DraftTree, Request, RequestState, SamplingParams, StepEvent, VerifyResult
from tests.oracles import ngram_copies, ngram_paths


def state_of(prompt: Sequence[int], request_id: str = "a", max_new_tokens: int = 16) -> RequestState:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return RequestState(Request(request_id, np.array(prompt, dtype=np.int32), sampling))


def draft(prompt: Sequence[int], budget: int, **options: float) -> DraftTree:
    drafter = NgramDrafter(**options)  # type: ignore[arg-type]
    state = state_of(prompt)
    drafter.start([state])
    [tree] = drafter.propose([state], [budget])
    tree.check(vocab_size=1000)
    return tree


def tokens(tree: DraftTree) -> list[int]:
    """The draft tokens of a chain."""
    assert tree.is_chain
    return tree.token_ids[1:].tolist()


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    return [tuple(tree.token_ids[tree.path(node)[1:]].tolist()) for node in range(1, len(tree))]


def event(state: RequestState, accepted: Sequence[int], bonus: int) -> StepEvent:
    """What `observe` reads: the request and what the target chose."""
    ids = np.array(accepted, dtype=np.int32)
    result = VerifyResult(ids, ids, bonus)
    return StepEvent(state, None, result, None, 0, ids, None)  # type: ignore[arg-type]


def test_the_continuation_of_the_last_tokens_is_copied() -> None:
    tree = draft([1, 2, 3, 4, 5, 6, 2, 3], 3, max_branches=1, min_value=0)
    assert tree.token_ids[0] == 3
    assert tokens(tree) == [4, 5, 6]


def test_a_longer_match_wins_over_a_more_recent_one() -> None:
    assert tokens(draft([1, 2, 3, 7, 9, 2, 3, 8, 0, 1, 2, 3], 1, max_branches=1)) == [7]


def test_of_equal_matches_the_most_recent_wins() -> None:
    assert tokens(draft([5, 1, 7, 6, 1, 8, 0, 1], 1, max_branches=1)) == [8]


def test_a_match_longer_than_the_longest_ngram_counts_in_full() -> None:
    text = [1, 2, 3, 4, 10, 9, 3, 4, 11, 1, 2, 3, 4]
    assert tokens(draft(text, 1, max_n=2, max_branches=1)) == [10]


def test_a_period_is_continued_beyond_the_end_of_the_text() -> None:
    assert tokens(draft([9, 1, 2, 3, 1, 2, 3], 8, max_branches=1, min_value=0)) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_different_continuations_become_branches_and_common_prefixes_merge() -> None:
    # 1 2 ─┬─ 3 ─┬─ 5
    #      │     └─ 4
    #      └─ 6
    tree = draft([1, 2, 6, 6, 9, 1, 2, 3, 4, 8, 1, 2, 3, 5, 7, 1, 2], 5, max_draft_tokens=2, min_value=0)
    assert set(paths(tree)) == {(3,), (3, 5), (3, 4), (6,), (6, 6)}


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 2, 3, 4]])
def test_text_without_repetition_gives_the_root_alone(text: list[int]) -> None:
    tree = draft(text, 8)
    assert (tree.token_ids.tolist(), tree.parents.tolist()) == ([text[-1]], [-1])


def test_an_ngram_shorter_than_the_shortest_wanted_is_no_match() -> None:
    assert len(draft([1, 2, 3, 4, 3], 8, min_n=2)) == 1


def test_budget_zero_gives_the_root_alone_and_loses_no_token_of_the_index() -> None:
    drafter, state = NgramDrafter(min_value=0, max_branches=1), state_of([7, 1, 2])
    drafter.start([state])
    state.append([3, 4])
    assert len(drafter.propose([state], [0])[0]) == 1
    state.append([1, 2])
    assert tokens(drafter.propose([state], [2])[0]) == [3, 4]


def test_a_smaller_budget_gives_the_first_nodes_of_a_larger_one() -> None:
    text = np.random.default_rng(3).integers(0, 3, 200).tolist()
    full = draft(text, 24)
    for budget in range(24):
        tree = draft(text, budget)
        assert tree.token_ids.tolist() == full.token_ids[: budget + 1].tolist()
        assert tree.parents.tolist() == full.parents[: budget + 1].tolist()


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    cuts=st.lists(st.integers(1, 79), max_size=6),
    min_n=st.integers(1, 3),
    num_orders=st.integers(1, 3),
    branches=st.integers(1, 4),
    more_candidates=st.integers(0, 5),
    budget=st.integers(1, 12),
    max_depth=st.integers(1, 8),
    min_value=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_trees_equal_those_of_a_full_search_however_the_text_arrived(
    text: list[int],
    cuts: list[int],
    min_n: int,
    num_orders: int,
    branches: int,
    more_candidates: int,
    budget: int,
    max_depth: int,
    min_value: float,
) -> None:
    drafter = NgramDrafter(
        min_n=min_n,
        max_n=min_n + num_orders - 1,
        max_draft_tokens=max_depth,
        max_branches=branches,
        max_candidates=branches + more_candidates,
        min_value=min_value,
    )
    bounds = [*sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    state = state_of(text[: bounds[0]], max_new_tokens=1)  # little room at first, so the index grows
    drafter.start([state])
    for start, stop in zip(bounds, bounds[1:], strict=False):
        drafter.propose([state], [3])
        state.append(text[start:stop])
    [tree] = drafter.propose([state], [budget])
    tree.check(vocab_size=4)
    copies = ngram_copies(text, range(min_n, min_n + num_orders), branches + more_candidates, branches)
    prior = _Rates().values.reshape(MAX_MATCH + 1, NUM_RANKS)
    expected = ngram_paths(
        text,
        copies,
        (budget, max_depth, min_value),
        lambda in_common, rank: prior[min(in_common, MAX_MATCH), min(rank, NUM_RANKS - 1)],
    )
    assert paths(tree) == [path for path, _ in expected]
    assert tree.values is not None
    assert tree.values.dtype == np.float32
    np.testing.assert_allclose(tree.values[1:], [value for _, value in expected], rtol=1e-6)
    assert (np.diff(tree.values) <= 0).all()  # best first


def test_requests_of_a_batch_do_not_see_each_other() -> None:
    drafter = NgramDrafter(min_value=0, max_branches=1)
    states = [state_of([1, 2, 3, 1], "a"), state_of([1, 5, 6, 1], "b"), state_of([1, 7, 8, 1], "c")]
    drafter.start(states)
    assert [tokens(tree) for tree in drafter.propose([states[2], states[0]], [1, 2])] == [[7], [2, 3]]
    drafter.stop(["a", "unknown"])
    assert [tokens(tree) for tree in drafter.propose([states[1]], [1])] == [[5]]
    drafter.stop(["b", "c"])
    assert drafter.nbytes == 0


def test_a_request_that_was_not_started_is_named() -> None:
    with pytest.raises(InternalError, match="request 'ghost' was not started"):
        NgramDrafter().propose([state_of([1], "ghost")], [1])


def test_a_later_tree_stays_as_it_was_when_the_next_one_is_made() -> None:
    drafter, state = NgramDrafter(min_value=0), state_of([1, 2, 3, 1, 2, 3])
    drafter.start([state])
    [first] = drafter.propose([state], [4])
    before = first.token_ids.tolist(), first.parents.tolist()
    state.append([5, 1])
    drafter.propose([state], [4])
    assert (first.token_ids.tolist(), first.parents.tolist()) == before


def test_values_follow_what_was_accepted() -> None:
    drafter, state = NgramDrafter(min_value=0, max_branches=1), state_of([1, 2, 3, 4, 1, 2])
    drafter.start([state])

    def value() -> float:
        [tree] = drafter.propose([state], [1])
        assert tree.values is not None
        return float(tree.values[1])

    prior = value()
    for _ in range(200):
        drafter.propose([state], [1])
        drafter.observe([event(state, [3], 9)])
    high = value()
    for _ in range(400):
        drafter.propose([state], [1])
        drafter.observe([event(state, [], 9)])
    low = value()
    assert low < prior < high
    assert high > 0.95
    assert low < 0.35  # 200 hits in 600 tries, and the later count more
    for _ in range(20000):
        drafter.observe([event(state, [], 9)])
    assert value() == pytest.approx(prior, rel=1e-3)  # old observations are forgotten: what is not tried comes back


def test_the_token_after_the_accepted_path_is_learned_from_too() -> None:
    drafter, state = NgramDrafter(min_value=0, max_branches=1), state_of([1, 2, 3, 4, 1, 2])
    drafter.start([state])
    [tree] = drafter.propose([state], [2])
    drafter.observe([event(state, [], 3)])  # a pruned tree: the first node was right although nothing was accepted
    tries = drafter._rates[""]._tries.reshape(MAX_MATCH + 1, NUM_RANKS)
    hits = drafter._rates[""]._hits.reshape(MAX_MATCH + 1, NUM_RANKS)
    assert len(tree) == 3
    assert (tries[2, 0], hits[2, 0], tries[3, 0]) == pytest.approx((1, 1, 0), rel=0.01)


def test_an_outcome_is_counted_once_and_never_for_a_tree_that_was_dropped() -> None:
    drafter, state = NgramDrafter(), state_of([1, 2, 3, 4, 1, 2])
    drafter.start([state])
    drafter.propose([state], [2])
    drafter.propose([state], [0])  # the first tree was not verified
    drafter.observe([event(state, [3], 4)])
    assert drafter._rates[""]._tries.sum() == 0
    drafter.propose([state], [1])
    drafter.observe([event(state, [3], 4)])
    drafter.observe([event(state, [3], 4)])
    assert drafter._rates[""]._tries.sum() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_n": 0}, "min_n must be >= 1, got 0"),
        ({"min_n": 3, "max_n": 2}, r"max_n must be in \[min_n, 16\] with min_n = 3, got 2"),
        ({"max_n": 17}, r"max_n must be in \[min_n, 16\] with min_n = 1, got 17"),
        ({"max_draft_tokens": 0}, "max_draft_tokens must be >= 1, got 0"),
        ({"max_branches": 0}, "max_branches must be >= 1, got 0"),
        ({"max_candidates": 2}, "max_candidates must be >= max_branches = 4, got 2"),
        ({"min_value": 1.5}, r"min_value must be in \[0, 1\], got 1.5"),
        ({"min_value": float("nan")}, r"min_value must be in \[0, 1\], got nan"),
    ],
)
def test_a_wrong_option_is_named_with_its_rule(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NgramDrafter(**options)  # type: ignore[arg-type]


def test_it_is_a_drafter_and_warmup_changes_nothing_it_learned() -> None:
    drafter = NgramDrafter()
    drafter.warmup()
    assert isinstance(drafter, Drafter)
    assert not drafter._rates
    assert not drafter.needs.needs_match


def test_it_runs_without_compilation() -> None:
    here = os.path.abspath(__file__)
    names = "full_search or period or branches or accepted"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", here, "-k", names]
    done = subprocess.run(command, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout
