from __future__ import annotations

import itertools

import numpy as np
import pytest

from specdec.drafters.tree_search import SearchLimits, TreeSearch
from specdec.types import DraftTree

V = 6


def law_after(path: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng((3, *path)).dirichlet(np.full(V, 0.5))


def grow(budget: int, limits: SearchLimits) -> tuple[DraftTree, int]:
    """The tree for the laws above, and how many levels were grown."""
    search = TreeSearch(0, budget, limits)
    paths: list[tuple[int, ...]] = [()]
    num_levels = 0
    while True:
        laws = np.array([law_after(path) for path in paths])
        ids = np.argsort(-laws, axis=1, kind="stable")[:, : limits.top_k]
        num_levels += 1
        frontier = search.add(ids, np.log(np.take_along_axis(laws, ids, axis=1)))
        if frontier is None:
            return search.tree(), num_levels
        assert frontier.depth == num_levels
        before = [(), *paths][1:] if num_levels > 1 else [()]
        paths = [
            (*(before[p] if p >= 0 else ()), int(t)) for p, t in zip(frontier.parents, frontier.token_ids, strict=True)
        ]


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    return [tuple(tree.token_ids[tree.path(node)[1:]].tolist()) for node in range(1, len(tree))]


def value(path: tuple[int, ...]) -> float:
    return float(np.prod([law_after(path[:i])[token] for i, token in enumerate(path)]))


def best_paths(budget: int, depth: int) -> set[tuple[int, ...]]:
    every = [path for size in range(1, depth + 1) for path in itertools.product(range(V), repeat=size)]
    return set(sorted(every, key=lambda path: -value(path))[:budget])


@pytest.mark.parametrize("budget", [1, 3, 6])
def test_a_search_as_wide_as_its_budget_finds_the_best_subtree_of_all(budget: int) -> None:
    tree, _ = grow(budget, SearchLimits(top_k=budget, width=budget, depth=4))
    tree.check(V)
    assert set(paths_of(tree)) == best_paths(budget, 4)
    assert tree.values is not None
    assert tree.values[1:].tolist() == pytest.approx([value(path) for path in paths_of(tree)], rel=1e-5)


def test_growth_stops_when_a_level_adds_too_little() -> None:
    full, levels = grow(12, SearchLimits(3, 3, 6))
    short, fewer = grow(12, SearchLimits(3, 3, 6, min_gain=0.95))
    assert fewer < levels
    assert short.depths().max() <= fewer
    values = (full.values, short.values)
    assert values[0] is not None
    assert values[1] is not None
    assert values[0].sum() > values[1].sum()


def test_a_chain_follows_the_best_child() -> None:
    tree, levels = grow(4, SearchLimits(1, 1, 9))
    assert tree.is_chain
    assert (len(tree), levels) == (5, 4)
    assert all(t == law_after(tuple(tree.token_ids[1:i].tolist())).argmax() for i, t in enumerate(tree.token_ids) if i)


def test_impossible_children_are_no_guesses_and_nothing_at_all_is_a_root() -> None:
    search = TreeSearch(7, 3, SearchLimits(2, 2, 1))
    assert search.add(np.array([[1, 2]]), np.array([[0.0, -np.inf]])) is None
    assert search.tree().token_ids.tolist() == [7, 1]
    assert len(TreeSearch(7, 0, SearchLimits(1, 1, 1)).tree()) == 1
