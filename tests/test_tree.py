"""Draft trees against slow and obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.tree import DraftTree
from tests.oracles import random_tree

SEEDS = st.integers(0, 2**32 - 1)


def tree_of(token_ids: list[int], parents: list[int], **rest: object) -> DraftTree:
    return DraftTree(np.array(token_ids, dtype=np.int32), np.array(parents, dtype=np.int32), **rest)  # type: ignore[arg-type]


#   7 -> 1 -> 4
#     -> 2 -> 5
#          -> 6
LITERAL = tree_of([7, 1, 2, 4, 5, 6], [-1, 0, 0, 1, 2, 2])


def test_a_literal_tree() -> None:
    assert len(LITERAL) == 6
    assert LITERAL.num_draft_tokens == 5
    assert LITERAL.depths().tolist() == [0, 1, 1, 2, 2, 2]
    assert LITERAL.path(5) == [0, 2, 5]
    assert LITERAL.path(0) == [0]
    assert LITERAL.ancestor_mask().astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 1, 0],
        [1, 0, 1, 0, 0, 1],
    ]
    assert not LITERAL.is_chain
    LITERAL.check(8)


@given(seed=SEEDS)
def test_depths_paths_and_masks_agree_on_random_trees(seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed), 9, 20)
    tree.check(9)
    depths, mask = tree.depths(), tree.ancestor_mask()
    for node in range(len(tree)):
        path = tree.path(node)
        assert path[0] == 0
        assert path[-1] == node
        assert all(tree.parents[child] == parent for parent, child in zip(path, path[1:], strict=False))
        assert depths[node] == len(path) - 1
        assert np.flatnonzero(mask[node]).tolist() == path


@given(seed=SEEDS)
def test_is_chain_means_that_no_node_has_two_children(seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed), 50, 4)
    assert tree.is_chain == (len(set(tree.parents.tolist())) == len(tree))


def test_root_only_and_chain() -> None:
    assert DraftTree.root_only(3).parents.tolist() == [-1]
    assert DraftTree.root_only(3).is_chain
    chain = DraftTree.chain(3, [4, 5])
    assert chain.token_ids.tolist() == [3, 4, 5]
    assert chain.parents.tolist() == [-1, 0, 1]
    assert chain.is_chain
    assert DraftTree.chain(3, []).num_draft_tokens == 0


def test_to_chain_follows_the_first_child_without_values() -> None:
    chain = LITERAL.to_chain()
    assert chain.token_ids.tolist() == [7, 1, 4]
    chain.check(8)


def test_to_chain_follows_the_best_values_and_keeps_what_belongs_to_the_nodes() -> None:
    tree = tree_of(
        [7, 1, 2, 4, 5, 6],
        [-1, 0, 0, 1, 2, 2],
        values=np.array([1, 0.3, 0.6, 0.3, 0.2, 0.4], dtype=np.float32),
        sources=np.array([0, 1, 2, 1, 2, 3], dtype=np.uint8),
    )
    chain = tree.to_chain()
    assert chain.token_ids.tolist() == [7, 2, 6]
    assert chain.parents.tolist() == [-1, 0, 1]
    assert chain.values is not None
    assert chain.values.tolist() == pytest.approx([1, 0.6, 0.4])
    assert chain.sources is not None
    assert chain.sources.tolist() == [0, 2, 3]


def test_to_chain_follows_the_first_draw_where_draft_laws_are_stated() -> None:
    chain = tree_of(
        [7, 1, 2, 4, 5, 6],
        [-1, 0, 0, 1, 2, 2],
        values=np.array([1, 0.3, 0.6, 0.3, 0.2, 0.4], dtype=np.float32),
        draft_probs=torch.arange(6.0)[:, None].expand(6, 8),
    ).to_chain()
    assert chain.token_ids.tolist() == [7, 1, 4]
    assert chain.draft_probs is not None
    assert chain.draft_probs[:, 0].tolist() == [0, 1, 3]


def test_equal_draws_are_allowed_where_draft_laws_are_stated() -> None:
    tree_of([1, 2, 2], [-1, 0, 0], draft_probs=torch.ones(3, 9)).check(9)


@given(seed=SEEDS)
def test_to_chain_is_a_root_to_leaf_path(seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed), 9, 20)
    chain = tree.to_chain()
    assert chain.is_chain
    leaves = set(range(len(tree))) - set(tree.parents.tolist())
    assert any(tree.token_ids[tree.path(leaf)].tolist() == chain.token_ids.tolist() for leaf in leaves)


ONE = np.ones(2, dtype=np.float32)
BAD_TREES = [
    (tree_of([], []), "a tree needs a root with parents[0] = -1 and as many parents as token_ids"),
    (tree_of([1], [0]), "a tree needs a root with parents[0] = -1 and as many parents as token_ids"),
    (tree_of([1, 2], [-1]), "a tree needs a root with parents[0] = -1 and as many parents as token_ids"),
    (tree_of([1, 2], [-1, 1]), "parents must satisfy 0 <= parents[i] < i, got [-1, 1]"),
    (tree_of([1, 2], [-1, -1]), "parents must satisfy 0 <= parents[i] < i, got [-1, -1]"),
    (tree_of([1, 9], [-1, 0]), "token ids must be in [0, 9), got [1, 9]"),
    (tree_of([1, -1], [-1, 0]), "token ids must be in [0, 9), got [1, -1]"),
    (tree_of([1, 2, 2], [-1, 0, 0]), "siblings must carry different tokens"),
    (tree_of([1, 2, 3], [-1, 0, 0], values=ONE), "values must have one row per node, got 2 for 3 nodes"),
    (tree_of([1, 2], [-1, 0], values=ONE / 2), "values must be in [0, 1] and 1 at the root, got [0.5, 0.5]"),
    (tree_of([1], [-1], sources=np.zeros(2, np.uint8)), "sources must have one row per node, got 2 for 1 nodes"),
]


@pytest.mark.parametrize(("tree", "message"), BAD_TREES, ids=[m for _, m in BAD_TREES])
def test_check_names_the_broken_rule(tree: DraftTree, message: str) -> None:
    with pytest.raises(ValueError, match="^") as caught:
        tree.check(9)
    assert str(caught.value) == message


def test_equal_tokens_under_different_parents_are_allowed() -> None:
    tree_of([1, 2, 3, 2], [-1, 0, 0, 2]).check(9)
