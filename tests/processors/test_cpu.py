"""The compiled loops against the torch operations that other devices use."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.processors import NodeBatch, cpu
from specdec.processors.counts import OutputPenalty, RepetitionPenalty
from specdec.processors.warpers import TopK, TopP
from specdec.types import SamplingParams
from tests.sampling_cases import VOCAB_SIZE, make_logits, make_state, make_tree

torch.set_num_threads(1)
CPU = torch.device("cpu")


def random_rows(seed, num_rows, vocab_size, round_to, share_banned):
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, 4, size=(num_rows, vocab_size))
    rows = np.round(rows / round_to) * round_to
    rows[rng.random(rows.shape) < share_banned] = -np.inf
    rows[:, int(rng.integers(vocab_size))] = 1.0
    return torch.from_numpy(rows.astype(np.float32))


ROWS = st.builds(
    random_rows,
    seed=st.integers(0, 10_000),
    num_rows=st.integers(1, 3),
    vocab_size=st.sampled_from([1, 2, 31, 200, 3000]),
    round_to=st.sampled_from([0.5, 1e-6]),
    share_banned=st.sampled_from([0.0, 0.6, 1.0]),
)


@given(rows=ROWS, k=st.integers(1, 300))
def test_top_k_keeps_what_torch_keeps(rows, k):
    k = torch.tensor([[float(k + row)] for row in range(len(rows))])
    expected = rows.clone()
    TopK.warp_torch(expected, k)
    TopK._warp(rows, k)
    assert torch.equal(rows, expected)


@given(rows=ROWS, p=st.floats(1e-9, 1 - 1e-7))
def test_top_p_keeps_what_a_stable_sort_keeps(rows, p):
    limit = torch.full((len(rows), 1), 1 - p)
    expected = rows.clone()
    TopP.warp_torch(expected, limit)
    kept = rows.clone()
    TopP._warp(kept, limit)
    if not torch.equal(kept, expected):  # only where a mass equals the limit within the rounding of the softmax
        sums = rows.double().softmax(-1).sort(-1).values.cumsum(-1)
        assert (sums - limit.double()).abs().min() < 2e-7
        assert ((kept.isneginf() ^ expected.isneginf()).sum(-1) <= 1).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, where the loops are not compiled
def test_top_p_does_not_break_on_what_is_not_a_number():
    rows = torch.tensor([[float("nan"), 1.0, 2.0], [float("inf"), 1.0, 2.0], [-float("inf")] * 3])
    TopP._warp(rows, torch.full((3, 1), 0.1))
    assert rows.shape == (3, 3)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), penalties=st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.2, 4)))
def test_penalties_are_those_of_the_torch_operations(seed, penalties):
    presence, frequency, repetition = penalties
    rng = np.random.default_rng(seed)
    states = [make_state(rng, SamplingParams(), name=f"r{i}") for i in range(3)]
    nodes = NodeBatch(states, [make_tree(rng, state) for state in states], CPU)
    logits = make_logits(rng, nodes.num_nodes)
    requests = [0, 2]
    for ops in (
        [RepetitionPenalty(repetition + r, states[r].token_ids, VOCAB_SIZE, CPU) for r in requests],
        [OutputPenalty(presence, frequency + r, states[r].output_ids, VOCAB_SIZE, CPU) for r in requests],
    ):
        expected, got = logits.clone(), logits.clone()
        type(ops[0]).apply_torch(ops, requests, nodes, expected)
        type(ops[0]).apply(ops, requests, nodes, got)
        assert torch.equal(got, expected)
        assert torch.equal(got[nodes.span(1)], logits[nodes.span(1)])


@pytest.mark.parametrize("token", [VOCAB_SIZE, -1, -VOCAB_SIZE - 1])
def test_a_draft_token_outside_the_vocabulary_is_no_memory_error(token):
    scores = np.zeros((2, VOCAB_SIZE), dtype=np.float32)
    ids, parents = np.array([1, token], dtype=np.int32), np.array([-1, 0], dtype=np.int32)
    cpu.penalise_repeated(scores, np.zeros(VOCAB_SIZE, dtype=bool), ids, parents, np.float32(2))
    cpu.subtract_counts(scores, np.zeros(VOCAB_SIZE, dtype=np.float32), ids, parents, np.float32(1), np.float32(1))
    assert (scores == 0).all()
