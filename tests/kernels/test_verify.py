"""Drawing and walking in Triton's interpreter: token for token what the engine draws with torch, whatever is fused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.kernels.node_laws import MAX_TOP_K, Law, NodeLaws
from specdec.kernels.truncation import find_floors
from specdec.kernels.verify import draw_tokens, verify_trees
from specdec.processors.warpers import Temperature
from specdec.rng import gumbel
from specdec.sampling import Sampler
from specdec.types import Request, RequestState, SamplingParams, TargetOutput
from specdec.verifier.match import match_walk
from tests.oracles import random_tree

CPU = torch.device("cpu")


@pytest.mark.parametrize(("vocab_size", "sizes"), [(5, [1]), (1000, [1, 4, 30]), (1031, [7, 1]), (17001, [3, 9])])
def test_verification_draws_the_engine_s_tokens_and_walks_as_the_engine_does(vocab_size, sizes):
    rng = np.random.default_rng(vocab_size)
    trees = [random_tree(rng, vocab_size, size - 1) for size in sizes]
    cu_nodes = np.cumsum([0, *map(len, trees)]).astype(np.int32)
    num_nodes = int(cu_nodes[-1])
    logits = torch.from_numpy(rng.standard_normal((num_nodes, vocab_size)).astype(np.float32)) * 3
    logits[rng.integers(0, num_nodes), : vocab_size // 2] = float("-inf")
    heat, seeds = rng.choice([0.0, 0.7, 1.0], len(trees)), rng.integers(0, 2**64, len(trees), dtype=np.uint64)
    positions = rng.integers(0, 2**40, num_nodes)
    temperatures = torch.from_numpy(np.repeat(heat, np.diff(cu_nodes))).float()
    scores = logits / torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    noise = gumbel(np.repeat(seeds, np.diff(cu_nodes)), positions, vocab_size, device="cpu")
    wanted = torch.where(temperatures[:, None] > 0, scores + noise, scores).argmax(-1).int().numpy()
    token_ids = np.concatenate([tree.token_ids for tree in trees])
    parents = np.concatenate([tree.parents for tree in trees])
    for node in range(num_nodes):  # make acceptance likely
        if parents[node] >= 0 and rng.random() < 0.6:
            tree = int(np.searchsorted(cu_nodes, node, side="right")) - 1
            token_ids[node] = wanted[cu_nodes[tree] + parents[node]]
    nodes, cu_accepted, bonus = match_walk(wanted, token_ids, parents, cu_nodes)
    kept = np.zeros(num_nodes, dtype=np.int8)
    for tree, first in enumerate(cu_nodes[:-1]):
        kept[first + np.array([0, *nodes[cu_accepted[tree] : cu_accepted[tree + 1]]])] = 1
    laws = NodeLaws(
        [Law(int(seed), temperature=t) if t else Law() for seed, t in zip(seeds, heat, strict=True)],
        np.diff(cu_nodes).tolist(), positions, vocab_size, CPU,
    )  # fmt: skip
    for backend in ("triton", "torch"):
        got = verify_trees(
            logits, torch.from_numpy(token_ids), torch.from_numpy(parents), torch.from_numpy(cu_nodes), laws,
            backend=backend,
        )  # fmt: skip
        for have, want in zip(got, (wanted, kept, np.diff(cu_accepted), bonus), strict=True):
            assert np.array_equal(have.numpy(), want), backend


def greedy(num_nodes: int, vocab_size: int) -> NodeLaws:
    return NodeLaws([Law()], [num_nodes], np.zeros(num_nodes, dtype=np.int64), vocab_size, CPU)


def test_the_first_of_equal_logits_wins_across_blocks():
    logits = torch.zeros(1, 20000)
    logits[0, [9000, 1500, 17000]] = 2.0
    assert draw_tokens(logits, greedy(1, 20000), backend="triton").tolist() == [1500]


FUSED = {
    "greedy": {},
    "bias": {"logit_bias": {3: 4.0, 7: -2.0, 90: float("-inf")}},
    "greedy, penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "temperature": {"temperature": 0.7},
    "top-k": {"temperature": 1.0, "top_k": 7},
    "top-k of equal scores": {"temperature": 1.5, "top_k": 3},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "a small nucleus": {"temperature": 2.0, "top_p": 0.05},
    "min-p": {"temperature": 1.2, "min_p": 0.1},
    "all truncations": {"temperature": 1.4, "top_k": 30, "top_p": 0.7, "min_p": 0.02},
    "everything": {
        "temperature": 1.1, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": -0.3, "logit_bias": {1: 1.5, 200: 9.0},
    },
}  # fmt: skip
UNFUSED = {
    "no token twice": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[4], [5, 6]]},
    "suppressed": {"suppress_tokens": (3, 4)},
    "typical": {"temperature": 1.0, "typical_p": 0.9},
    "epsilon": {"temperature": 0.9, "epsilon_cutoff": 0.01},
    "k too large": {"temperature": 1.0, "top_k": MAX_TOP_K + 1},
    "own processor": {"logits_processors": (lambda ids, scores: scores + 1,)},
}


def drawn(sampler: Sampler, states, trees, logits, cu_nodes):
    for state in states:
        sampler.start(state)
    return sampler.target_ids(states, trees, TargetOutput(logits, cu_nodes))


# Over several blocks only what truncates: the interpreter takes its time.
@pytest.mark.parametrize(("vocab_size", "first"), [(211, 0), (5003, list(FUSED).index("all truncations"))])
def test_fused_processors_draw_the_tokens_of_torch_s(vocab_size, first):
    rng = np.random.default_rng(vocab_size)
    states, trees = [], []
    for index, (name, options) in enumerate([*FUSED.items(), *UNFUSED.items()][first:]):
        prompt = rng.integers(0, vocab_size, 9).astype(np.int32)
        state = RequestState(Request(name, prompt, SamplingParams(seed=index * 2**50, max_new_tokens=90, **options)))
        state.append([3, 1, 3, *rng.integers(0, 12, 4).tolist()])
        states.append(state)
        trees.append(random_tree(rng, 12, 4))  # tokens that are written and seen again and again
    cu_nodes = np.cumsum([0, *map(len, trees)], dtype=np.int32)
    logits = torch.from_numpy(rng.standard_normal((cu_nodes[-1], vocab_size)).astype(np.float32)) * 2
    logits[:, :60] += 2
    logits[3::5] = logits[3::5].round()  # many equal scores
    logits[5::7, 70:] = float("-inf")
    torch_s, triton_s = Sampler(vocab_size, kernels="torch"), Sampler(vocab_size, kernels="triton")
    wanted = drawn(torch_s, states, trees, logits, cu_nodes)
    found = drawn(triton_s, states, trees, logits, cu_nodes)
    for row, state in enumerate(states):
        own = slice(cu_nodes[row], cu_nodes[row + 1])
        assert np.array_equal(found[own], wanted[own]), state.request_id
        is_fused = triton_s._live[state.request_id].law is not None
        assert is_fused == (state.request_id in FUSED or (state.request_id == "k too large" and vocab_size == 211))
    for sampler in (torch_s, triton_s):  # the tables follow what is written
        for state in states:
            sampler.commit(state, [int(wanted[0]) % 12, 5])
    for state in states:
        state.append([int(wanted[0]) % 12, 5])
    output = TargetOutput(logits, cu_nodes)
    again = [sampler.target_ids(states, trees, output) for sampler in (torch_s, triton_s)]
    assert np.array_equal(*again)
    assert not np.array_equal(again[0], wanted)


@pytest.mark.parametrize("k", [2, 40])
def test_the_kth_largest_is_found_wherever_the_large_ones_lie(k):
    """All in one group of the first look, which the search must then find one by one."""
    logits = torch.randn(2, 3 * 4096, generator=torch.Generator().manual_seed(k))
    logits[1, 17::4096] += torch.tensor([50.0, 60.0, 70.0])
    laws = NodeLaws([Law(5, top_k=k, temperature=9.0)], [2], np.arange(2), logits.shape[1], CPU)
    floors = torch.empty(3, 2)
    find_floors[(2,)](
        logits, laws.nodes, laws.numbers, laws.addresses, floors, floors, 2, logits.shape[1], logits.shape[1],
        BLOCK=4096, TABLES=False, RECIPROCAL=False,
    )  # fmt: skip
    scores = logits / 9.0
    assert torch.equal(floors[0], torch.topk(scores, k).values[:, -1])
    assert torch.equal(floors[1:], torch.stack([floors[0], scores.amax(-1)]))


def test_the_reference_is_the_engine_s_torch_path():
    rng = np.random.default_rng(1)
    tree = random_tree(rng, 12, 30)
    logits = torch.from_numpy(rng.standard_normal((len(tree), 300)).astype(np.float32)) * 2
    options = FUSED["everything"]
    state = RequestState(Request("a", np.arange(9, dtype=np.int32), SamplingParams(seed=3, **options)))
    sampler = Sampler(300, kernels="triton")
    cu_nodes = np.array([0, len(tree)], dtype=np.int32)
    found = drawn(sampler, [state], [tree], logits, cu_nodes)
    law = sampler._live["a"].law
    depth = np.zeros(len(tree), dtype=np.int64)
    for node in range(1, len(tree)):
        depth[node] = depth[tree.parents[node]] + 1
    laws = NodeLaws([law], [len(tree)], 9 + depth, 300, CPU, token_ids=tree.token_ids, parents=tree.parents)
    assert np.array_equal(draw_tokens(logits, laws, backend="torch").numpy(), found)


def test_a_greedy_request_with_a_temperature_is_not_fused():
    """Division may make two scores equal, and then the first of them wins."""
    from specdec.processors import fused_law

    assert fused_law([Temperature(0.7)], None, 50) is None
    assert fused_law([Temperature(0.7)], 3, 50) is not None
    assert fused_law([Temperature(0.7), Temperature(0.7)], 3, 50) is None


def test_what_the_kernel_would_read_wrongly_is_refused():
    ones = np.zeros(2, dtype=np.int64)
    for law, message in (
        (Law(1, temperature=0.0), "temperature must be above 0, got 0.0"),
        (Law(1, top_k=MAX_TOP_K + 1), "top_k must be in"),
        (Law(seen=torch.zeros(9, dtype=torch.bool)), r"seen must have shape \(10\), got \(9,\)"),
        (Law(counts=torch.zeros(10, dtype=torch.int32)), "counts must be torch.float32"),
        (Law(bias=torch.zeros(20)[::2]), "bias must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            NodeLaws([law], [2], ones, 10, CPU, token_ids=ones, parents=ones - 1)
    with pytest.raises(ValueError, match="sizes must be 1 with sum 2"):
        NodeLaws([Law()], [3], ones, 10, CPU)
    with pytest.raises(ValueError, match="penalties need token_ids and parents"):
        NodeLaws([Law(bias=torch.zeros(10))], [2], ones, 10, CPU)
    with pytest.raises(ValueError, match=r"logits must have shape \(any, 10\), got \(2, 11\)"):
        draw_tokens(torch.zeros(2, 11), greedy(2, 10), backend="triton")
