from __future__ import annotations

import numpy as np

from specdec.check.hostile import HostileDrafter
from specdec.types import Request, RequestState

VOCAB = 50
OUTPUT = list(range(10, 30))


def state_after(num_output: int, request_id: str = "a") -> RequestState:
    state = RequestState(Request(request_id, np.array([1, 2, 3], dtype=np.int32)))
    if num_output:
        state.append(OUTPUT[:num_output])
    return state


def right_depth(tree_tokens: list[int], parents: list[int], future: list[int]) -> int:
    """How far the tree follows a future from its root."""
    node, depth = 0, 0
    for token in future:
        children = [i for i in range(1, len(parents)) if parents[i] == node and tree_tokens[i] == token]
        if not children:
            break
        node, depth = children[0], depth + 1
    return depth


def test_trees_are_trees_and_keep_the_budget():
    drafter = HostileDrafter({"a": [OUTPUT]}, VOCAB)
    for num_output in range(19):
        for budget in (0, 1, 5, 12):
            [tree] = drafter.propose([state_after(num_output)], [budget])
            tree.check(VOCAB)
            assert tree.num_draft_tokens <= budget
            assert tree.token_ids[0] == state_after(num_output).token_ids[-1]


def test_right_paths_of_many_lengths_are_hidden_among_wrong_nodes():
    drafter = HostileDrafter({"a": [OUTPUT]}, VOCAB)
    depths, has_branches = set(), False
    for num_output in range(15):
        [tree] = drafter.propose([state_after(num_output)], [10])
        depths.add(right_depth(tree.token_ids.tolist(), tree.parents.tolist(), OUTPUT[num_output:]))
        has_branches |= not tree.is_chain
    assert {0, 1, 2, 3} <= depths
    assert has_branches


def test_outputs_that_do_not_go_on_from_here_are_not_used():
    drafter = HostileDrafter({"a": [[7] * 20]}, VOCAB)
    tokens = [t for n in range(1, 15) for t in drafter.propose([state_after(n)], [10])[0].token_ids[1:].tolist()]
    assert tokens.count(7) < 10  # by chance only: 1 in 50


def test_a_tree_does_not_depend_on_the_neighbours():
    drafter = HostileDrafter({"a": [OUTPUT], "b": [OUTPUT]}, VOCAB)
    alone = drafter.propose([state_after(3, "b")], [8])[0]
    together = drafter.propose([state_after(1, "a"), state_after(3, "b")], [8, 8])[1]
    assert alone.token_ids.tolist() == together.token_ids.tolist()
    assert alone.parents.tolist() == together.parents.tolist()
