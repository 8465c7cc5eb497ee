from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters.acceptance import AcceptanceModel
from specdec.errors import ConfigError
from specdec.toy import RandomTreeDrafter
from specdec.types import DraftTree, Request, RequestState


def chain(*ids: int, values: list[float] | None = None) -> DraftTree:
    tree = DraftTree.chain(7, list(ids))
    tree.values = np.array([1.0, *(values or [0.5**d for d in range(1, len(ids) + 1)])], np.float32)
    return tree


def ids_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    return {tuple(tree.token_ids[tree.path(node)].tolist()) for node in range(len(tree))}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_a_merged_tree_is_the_union_of_all_paths(seed: int, num_sources: int) -> None:
    state = RequestState(Request("r", ids_of(3, 1)))
    trees = [RandomTreeDrafter(3, seed=seed + i).propose([state], [10])[0] for i in range(num_sources)]
    model = AcceptanceModel(num_sources)
    merged = model.merge("r", trees)
    whole = merged.best(1000)
    whole.check(3)
    assert paths(whole) == set().union(*(paths(tree) for tree in trees))
    assert (whole.values[1:] <= whole.values[whole.parents[1:]]).all()
    for node in range(1, len(whole)):
        path = tuple(whole.token_ids[whole.path(node)].tolist())
        assert merged.masks[node] == sum(1 << s for s, tree in enumerate(trees) if path in paths(tree))
    part = merged.best(4)
    part.check(3)
    assert part.values[1:].sum() == pytest.approx(np.sort(whole.values[1:])[::-1][:4].sum(), abs=1e-5)


def test_siblings_never_promise_more_than_one_token() -> None:
    model = AcceptanceModel(2)
    merged = model.merge("r", [chain(1, values=[0.9]), chain(2, values=[0.9])])
    assert merged.values[1:].sum() == pytest.approx(1.0, abs=1e-5)


def test_what_sources_claim_becomes_what_is_observed() -> None:
    rng, model = np.random.default_rng(0), AcceptanceModel(2)
    for step in range(3000):
        merged = model.merge(f"{step}", [chain(1, 2, values=[0.95, 0.9]), chain(5, values=[0.05])])
        if step == 2500:
            late = AcceptanceModel(2)
            late._bins, model._bins = model._bins, late._bins  # the diagram of what was predicted from here on
        right = rng.random()
        truth = (
            ids_of(1, 2, 9)
            if right < 0.15
            else ids_of(1, 9)
            if right < 0.3
            else ids_of(5, 9)
            if right < 0.7
            else ids_of(9)
        )
        model.learn(f"{step}", merged, truth)
    merged = model.merge("new", [chain(1, 2, values=[0.95, 0.9]), chain(5, values=[0.05])])
    assert merged.chances[1:].tolist() == pytest.approx([0.3, 0.5, 0.4], abs=0.12)
    assert model.calibration_error() < 0.06
    assert sum(point.count for point in model.reliability()) > 900


def test_agreement_of_two_sources_is_learned_apart() -> None:
    rng, model = np.random.default_rng(1), AcceptanceModel(2)
    for _ in range(1500):
        agree = rng.random() < 0.5
        merged = model.merge("r", [chain(1, values=[0.5]), chain(1 if agree else 2, values=[0.5])])
        hit = rng.random() < (0.9 if agree else 0.2)
        model.learn("r", merged, ids_of(1 if hit else 9))
    together = model.merge("x", [chain(1, values=[0.5]), chain(1, values=[0.5])])
    alone = model.merge("x", [chain(1, values=[0.5]), DraftTree.root_only(7)])
    assert together.chances[1] > 0.75
    assert alone.chances[1] < 0.4


def test_a_confident_liar_is_found_out_within_50_steps() -> None:
    model = AcceptanceModel(1)
    for _ in range(50):
        model.learn("r", model.merge("r", [chain(1, 1, 1, 1, values=[0.999] * 4)]), ids_of(9))
    assert model.merge("new", [chain(1, 1, 1, 1, values=[0.999] * 4)]).values[1] < 0.1


def test_nodes_behind_the_known_tokens_teach_nothing() -> None:
    model = AcceptanceModel(1)
    before = model.weights.copy()
    merged = model.merge("r", [chain(1, 2, 3)])
    model.learn("r", merged, ids_of(1))  # what comes after 1 is not known
    changed = np.abs(model.weights - before).sum(axis=(0, 2)) > 0
    assert changed.tolist() == [True, False, False, False, False, False]


def test_what_only_one_source_had_is_counted_for_it() -> None:
    model = AcceptanceModel(2)
    merged = model.merge("r", [chain(1, 2), chain(1, 2, 3, 4)])
    assert model.learn("r", merged, ids_of(1, 2, 3, 9))[:2].tolist() == [0, 1]
    assert model.learn("r", merged, ids_of(9))[:2].tolist() == [0, 0]
    assert model.learn("r", merged, ids_of(1, 2, 3, 4), 3)[:2].tolist() == [0, 1]  # 4 was right and not verified


def test_a_request_is_told_from_the_others_and_forgotten() -> None:
    model = AcceptanceModel(1)
    for _ in range(10):
        model.learn("bad", model.merge("bad", [chain(1)]), ids_of(9))
        model.learn("good", model.merge("good", [chain(1)]), ids_of(1))
    assert model.merge("bad", [chain(1)]).values[1] < model.merge("good", [chain(1)]).values[1] - 0.2
    model.forget("bad")
    assert model.merge("bad", [chain(1)]).values[1] == model.merge("new", [chain(1)]).values[1]


def test_the_number_of_sources_is_checked() -> None:
    with pytest.raises(ConfigError, match="1 to 8 sources, got 9"):
        AcceptanceModel(9)
