from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import InternalError
from specdec.protocols import Verifier
from specdec.toy import ScriptedSampler
from specdec.types import DraftTree, IntArray, Request, RequestState, TargetOutput
from specdec.verifier.match import MatchVerifier, match_walk
from tests.oracles import match_path, random_tree


def ids(*values: int) -> IntArray:
    return np.array(values, dtype=np.int32)


def output_for(trees: Sequence[DraftTree]) -> TargetOutput:
    """An output whose logits nobody reads."""
    cu_nodes = np.cumsum([0, *map(len, trees)], dtype=np.int32)
    return TargetOutput(logits=None, cu_nodes=cu_nodes)  # type: ignore[arg-type]


def verify(trees: Sequence[DraftTree], script: Sequence[int]) -> list[tuple[list[int], list[int], int]]:
    states = [RequestState(Request(f"r{i}", ids(0))) for i in range(len(trees))]
    results = MatchVerifier(ScriptedSampler([script])).verify(states, trees, output_for(trees))
    return [(r.accepted_nodes.tolist(), r.accepted_ids.tolist(), r.bonus_id) for r in results]


# root 9 ─┬─ 1 ─┬─ 3 ── 6
#         │     └─ 4
#         └─ 2 ─── 3
TREE = DraftTree(ids(9, 1, 2, 3, 4, 3, 6), ids(-1, 0, 0, 1, 1, 2, 3))


@pytest.mark.parametrize(
    ("script", "nodes", "accepted", "bonus"),
    [
        ([5, 0, 0, 0, 0, 0, 0], [], [], 5),  # nothing matches: the bonus token alone
        ([1, 4, 9, 9, 8, 9, 9], [1, 4], [1, 4], 8),
        ([2, 9, 3, 9, 9, 7, 9], [2, 5], [2, 3], 7),
        ([1, 3, 9, 6, 9, 9, 2], [1, 3, 6], [1, 3, 6], 2),  # to the leaf, then the bonus token
        ([1, 6, 6, 6, 6, 6, 6], [1], [1], 6),  # 6 is in the tree, but not below node 1
        ([2, 3, 4, 3, 3, 3, 3], [2], [2], 4),  # 4 is a child of node 1 only
    ],
)
def test_the_walk_descends_while_a_child_carries_the_drawn_token(
    script: list[int], nodes: list[int], accepted: list[int], bonus: int
) -> None:
    assert verify([TREE], script) == [(nodes, accepted, bonus)]


def test_a_root_alone_gives_only_the_bonus_token() -> None:
    assert verify([DraftTree.root_only(3)], [3]) == [([], [], 3)]


def test_a_chain_is_kept_up_to_its_first_wrong_token() -> None:
    assert verify([DraftTree.chain(0, [5, 6, 7])], [5, 6, 1, 7]) == [([1, 2], [5, 6], 1)]


def test_trees_of_a_batch_do_not_mix() -> None:
    trees = [DraftTree.chain(0, [1]), DraftTree.root_only(1), DraftTree.chain(0, [1, 1])]
    assert verify(trees, [1, 1, 1, 1, 1, 2]) == [([1], [1], 1), ([], [], 1), ([1, 2], [1, 1], 2)]


def test_an_empty_batch_has_no_results() -> None:
    assert verify([], []) == []


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_trees=st.integers(1, 6))
def test_the_flat_walk_equals_the_slow_walk_of_each_tree(seed: int, num_trees: int) -> None:
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, vocab_size=3, max_draft_tokens=12) for _ in range(num_trees)]
    script = rng.integers(0, 3, sum(map(len, trees))).tolist()
    cu_nodes = output_for(trees).cu_nodes
    expected = []
    for tree, first in zip(trees, cu_nodes, strict=False):
        nodes, bonus = match_path(tree, script[first : first + len(tree)])
        expected.append((nodes, tree.token_ids[nodes].tolist(), bonus))
    assert verify(trees, script) == expected


@pytest.mark.parametrize("script", [[1], [1, 1, 1]])
def test_a_sampler_that_draws_the_wrong_number_of_tokens_is_named(script: list[int]) -> None:
    with pytest.raises(InternalError, match=rf"scored 2 nodes of 1 trees, the sampler drew {len(script)} tokens"):
        verify([DraftTree.chain(0, [1])], script)


def test_requests_are_passed_on_to_the_sampler() -> None:
    sampler = ScriptedSampler([])
    verifier = MatchVerifier(sampler)
    assert isinstance(verifier, Verifier)
    state = RequestState(Request("a", ids(1, 2)))
    verifier.start(state)
    verifier.commit(state, [4, 5])
    verifier.stop(["a"])
    assert sampler.calls == [("start", "a"), ("commit", ("a", [4, 5])), ("stop", ["a"])]


def test_warmup_compiles_the_walk() -> None:
    MatchVerifier(ScriptedSampler([])).warmup()
    assert match_walk(ids(1, 4), ids(0, 1), ids(-1, 0), ids(0, 2))[2].tolist() == [4]


def test_the_walk_runs_without_compilation() -> None:
    code = (
        "import numpy as np; from specdec.verifier.match import match_walk\n"
        "a = lambda *v: np.array(v, dtype=np.int32)\n"
        "n, c, b = match_walk(a(1, 5, 0, 0), a(7, 1, 3, 2), a(-1, 0, 0, 1), a(0, 4))\n"
        "assert (n.tolist(), c.tolist(), b.tolist()) == ([1], [0, 1], [5])\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env={"NUMBA_DISABLE_JIT": "1"})
