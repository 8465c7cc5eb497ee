from __future__ import annotations

import numpy as np

from specdec.drafters.successors import TEMPLATE, SuccessorTable


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def row(*best: int) -> np.ndarray:
    return np.array([*best, *range(90, 98 - len(best))], np.int32)


def test_the_template_is_the_published_one():
    assert [len(level) for level in TEMPLATE.levels] == [1, 8, 21, 25, 15, 8, 3]
    assert TEMPLATE.width == 8
    assert (TEMPLATE.parents[1:] < np.arange(1, 81)).all()


def test_a_draft_follows_the_best_successors():
    table = SuccessorTable()
    table.update(ids(1, 2, 3), ids(0, 1, 2), [1, 2], np.stack([row(2, 5), row(3, 6), row(4, 7)]), "r")
    tokens, parents, values, nodes = table.fill(1, 3)
    assert tokens.tolist() == [1, 2, 5, 3]
    assert parents.tolist() == [-1, 0, 0, 1]
    assert (np.diff(values[[0, 1, 3]]) < 0).all()
    assert nodes[0] == 0


def test_unseen_tokens_are_not_drafted_and_no_budget_means_no_draft():
    table = SuccessorTable()
    assert table.fill(3, 80)[0].tolist() == [3]
    table.update(ids(3), ids(0), [], row(4, 5)[None], "r")
    assert table.fill(3, 0)[0].tolist() == [3]
    assert len(table.fill(3, 80)[0]) == 9  # the eight successors, whose own are unseen


def test_siblings_are_different_and_budgets_are_prefixes():
    rng = np.random.default_rng(0)
    table = SuccessorTable()
    successors = np.stack([rng.permutation(50)[:8] for _ in range(50)]).astype(np.int32)
    table.update(np.arange(50, dtype=np.int32), np.arange(50, dtype=np.int32), [], successors, "r")
    for budget in (1, 7, 33, 80):
        tokens, parents, values, _ = table.fill(7, budget)
        assert len(tokens) == budget + 1
        assert len({(p, t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)}) == budget + 1
        assert (values[1:] <= values[parents[1:]]).all()


def test_accepted_rows_win_over_rejected_ones_and_deeper_over_shallower():
    table = SuccessorTable()
    # The token 4 is on the accepted path at depth 1 and rejected at depth 2.
    table.update(ids(1, 4, 5, 4), ids(0, 1, 1, 2), [1], np.stack([row(1), row(11), row(12), row(13)]), "r")
    assert table.rows[4, 0] == 11
    table.update(ids(1, 4, 5, 4), ids(0, 1, 1, 2), [], np.stack([row(1), row(21), row(22), row(23)]), "r")
    assert table.rows[4, 0] == 23


def test_a_prompt_seeds_tokens_without_a_row_latest_first():
    table = SuccessorTable()
    table.seed(ids(1, 2, 1, 3, 1, 2), "r")
    assert table.rows[1, :3].tolist() == [2, 3, -1]
    table.seed(ids(1, 9), "s")
    assert table.rows[1, 0] == 2


def test_measured_acceptance_decides_which_nodes_a_small_budget_takes():
    table = SuccessorTable()
    table.update(ids(1), ids(0), [], row(2, 3)[None], "r")
    for _ in range(100):  # the second successor is always right, the first one never
        tokens, parents, _, nodes = table.fill(1, 2)
        table.count(nodes, parents, [tokens.tolist().index(3)])
    assert table.fill(1, 1)[0].tolist() == [1, 3]


def test_forgetting_clears_only_own_rows():
    table = SuccessorTable()
    table.update(ids(1), ids(0), [], row(2)[None], "a")
    table.update(ids(2), ids(0), [], row(3)[None], "b")
    assert table.forget("a")
    assert not table.forget("a")
    assert table.rows[1, 0] == -1
    assert table.rows[2, 0] == 3
