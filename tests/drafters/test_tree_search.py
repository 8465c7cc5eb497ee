from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from specdec.drafters.levels import MAX_KERNEL_K, best_children, pack_best
from specdec.drafters.tree_search import LevelCosts, SearchLimits, TreeSearch
from specdec.kernels.top_k import MAX_K
from specdec.types import DraftTree, Request, RequestState, SamplingParams

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


def grown_depth(costs: LevelCosts | None, gains: list[float]) -> int:
    """Levels that a chain search scores whose tokens are right with these chances, one after the other."""
    search, depth = TreeSearch(7, 10, SearchLimits(1, 1, 10, costs=costs)), 0
    for gain in gains:
        depth += 1
        if search.add(np.array([[depth]]), np.log([[gain]])) is None:
            break
    return depth


def test_measured_costs_end_a_search_where_a_level_no_longer_pays():
    sure, doubtful = [0.95] * 10, [0.6] * 10
    assert grown_depth(None, sure) == grown_depth(None, doubtful) == 10
    free, cheap, dear = LevelCosts(0.0, 10.0), LevelCosts(1.0, 10.0), LevelCosts(10.0, 10.0)
    assert grown_depth(free, doubtful) == 10
    assert grown_depth(cheap, sure) > grown_depth(cheap, doubtful) > 1
    assert grown_depth(dear, sure) == grown_depth(dear, doubtful) == 1


def test_the_stop_is_near_the_best_depth_by_enumeration():
    for chance, level in ((0.9, 0.5), (0.8, 1.0), (0.7, 2.0), (0.6, 0.3)):
        rates = [sum(chance**i for i in range(depth + 1)) / (10 + (depth - 1) * level) for depth in range(1, 11)]
        chosen = grown_depth(LevelCosts(level, 10.0), [chance] * 10)
        assert rates[chosen - 1] > 0.98 * max(rates)


@pytest.mark.parametrize(("width", "count"), [(4096, 3), (4096, 10), (151_936, 10), (5000, 4), (300, 300)])
def test_the_best_children_of_wide_rows_are_found_by_blocks_as_by_sorting(width: int, count: int) -> None:
    """Also where all of them stand in one block, or each in another."""
    rows = torch.randn(6, width, generator=torch.Generator().manual_seed(width + count))
    rows[1, 128 : 128 + count] += 9
    rows[2, :: width // count] += 9
    ids, log_probs = best_children(rows, [RequestState(Request("a", np.array([1])))] * 6, [1] * 6, count)
    order = np.argsort(-rows.numpy(), axis=1, kind="stable")[:, :count]
    assert ids.tolist() == order.tolist()
    law = rows.double().log_softmax(-1).numpy()
    np.testing.assert_allclose(log_probs, np.take_along_axis(law, order, axis=1), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_best_children_are_those_that_the_kernel_packs(temperature: float) -> None:
    rows = torch.randn(3, 700, generator=torch.Generator().manual_seed(1))
    states = [RequestState(Request("a", np.array([1]), SamplingParams(temperature=temperature, seed=3)))] * 3
    packed = pack_best(rows, 5, backend="triton")
    assert packed.shape == (3, 2, 5)
    ids, log_probs = best_children(rows, states, [1, 1, 2], 5, best=packed)
    other_ids, others = best_children(rows, states, [1, 1, 2], 5)
    assert ids.dtype == other_ids.dtype
    assert np.array_equal(ids, other_ids)
    np.testing.assert_allclose(log_probs, others, rtol=1e-5)


def test_the_kernel_s_limit_is_stated_where_triton_may_be_missing() -> None:
    assert MAX_KERNEL_K == MAX_K
