import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.processors import NodeBatch
from specdec.types import DraftTree, SamplingParams
from tests.sampling_cases import make_state, make_tree, prefix_of

torch.set_num_threads(1)


def batch(seed, count):
    rng = np.random.default_rng(seed)
    states = [make_state(rng, SamplingParams(), num_prompt=int(rng.integers(1, 6)), num_output=2) for _ in range(count)]
    trees = [make_tree(rng, state) for state in states]
    return states, trees, NodeBatch(states, trees, torch.device("cpu"))


def every_node(states, trees):
    return [(r, node) for r, tree in enumerate(trees) for node in range(len(tree))]


@given(seed=st.integers(0, 10_000), count=st.integers(1, 4))
def test_depths_lengths_and_prefixes_are_those_of_each_node_alone(seed, count):
    states, trees, nodes = batch(seed, count)
    assert nodes.num_nodes == sum(map(len, trees))
    for row, (r, node) in enumerate(every_node(states, trees)):
        prefix = prefix_of(states[r], trees[r], node)
        assert nodes.request_of_row[row] == r
        assert nodes.depths[row] == trees[r].depths()[node]
        assert nodes.prefix_lengths[row] == len(prefix)
        assert nodes.prefix_ids(row).tolist() == [prefix]


@given(seed=st.integers(0, 10_000), count=st.integers(1, 4), length=st.integers(1, 12))
def test_tails_are_the_ends_of_the_prefixes_padded_in_front(seed, count, length):
    states, trees, nodes = batch(seed, count)
    for r in range(count):
        for node, tail in enumerate(nodes.tails(r, length).tolist()):
            prefix = prefix_of(states[r], trees[r], node)
            assert tail == ([-1] * length + prefix)[-length:]


@given(seed=st.integers(0, 10_000), data=st.data())
def test_path_tokens_are_the_draft_tokens_on_the_way_to_each_row(seed, data):
    states, trees, nodes = batch(seed, 4)
    requests = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1)))
    rows, tokens = nodes.path_tokens(requests)
    expected = []
    row = 0
    for r in requests:
        for node in range(len(trees[r])):
            expected += [(row, int(trees[r].token_ids[i])) for i in trees[r].path(node)[1:]]
            row += 1
    assert sorted(zip(rows.tolist(), tokens.tolist(), strict=True)) == sorted(expected)


def test_rows_of_neighbours_are_a_slice_and_of_others_an_index():
    states, trees, nodes = batch(3, 4)
    assert nodes.rows([1, 2]) == slice(len(trees[0]), sum(map(len, trees[:3])))
    index = nodes.rows([0, 2])
    everything = list(range(nodes.num_nodes))
    assert index.tolist() == everything[nodes.span(0)] + everything[nodes.span(2)]
    assert nodes.per_row([1.5, 2.5], [0, 2]).flatten().tolist() == [1.5] * len(trees[0]) + [2.5] * len(trees[2])
    assert nodes.local_request([0, 2]).tolist() == [0] * len(trees[0]) + [1] * len(trees[2])


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_chain_on_a_long_context_costs_no_walk_through_it(num_drafts):
    state = make_state(np.random.default_rng(0), SamplingParams(), num_prompt=5000, num_output=0)
    nodes = NodeBatch([state], [DraftTree.chain(int(state.token_ids[-1]), range(num_drafts))], torch.device("cpu"))
    assert nodes.prefix_lengths.tolist() == list(range(5000, 5001 + num_drafts))
    assert nodes.tails(0, 2)[-1].tolist() == state.token_ids[-2:].tolist() if num_drafts == 0 else [1, 2]
