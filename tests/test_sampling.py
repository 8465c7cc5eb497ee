import numba
import numpy as np
import pytest
import torch
import transformers.generation.logits_process as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import philox, sampling
from specdec.errors import InternalError
from specdec.processors import cpu, ngrams
from specdec.rng import gumbel
from specdec.sampling import Sampler
from specdec.types import DraftTree, SamplingParams
from tests.sampling_cases import (
    VOCAB_SIZE,
    as_output,
    make_logits,
    make_state,
    make_tree,
    plain_scores,
    prefix_of,
    start,
)

torch.set_num_threads(1)

LOOPS = [philox.draw, ngrams._chain, ngrams._repeats, cpu.ban, cpu.keep_top_k, cpu.keep_top_p]
LOOPS += [cpu.penalise_repeated, cpu.subtract_counts]


def user_processor(input_ids, scores):
    return scores - 0.5 * (torch.arange(scores.shape[-1]) % 3 == input_ids.sum() % 3)


# One of each way through the sampler: nothing to do, noise only, warpers, prefixes, positions, a user's own.
RECIPES = [
    dict(),
    dict(temperature=1.0),
    dict(temperature=0.6, top_k=6, top_p=0.9, repetition_penalty=1.2),
    dict(temperature=1.3, min_p=0.05, typical_p=0.9, eta_cutoff=0.01),
    dict(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3, no_repeat_ngram_size=2),
    dict(temperature=0.9, no_repeat_ngram_size=1, bad_words_ids=((1, 2), (4,)), logit_bias={3: 2.0}),
    dict(min_new_tokens=7, stop_token_ids=(2, 5), forced_eos_token_ids=(6,), max_new_tokens=9),
    dict(temperature=1.1, logits_processors=(user_processor, hf.LogitNormalization())),
]


def make_batch(seed, recipes=RECIPES):
    rng = np.random.default_rng(seed)
    states = [
        make_state(rng, SamplingParams(seed=int(rng.integers(2**40)), **recipe), name=f"r{i}", num_output=i % 5)
        for i, recipe in enumerate(recipes)
    ]
    trees = [make_tree(rng, state) for state in states]
    return states, trees, make_logits(rng, sum(map(len, trees)))


def tokens_by_definition(states, trees, scores):
    """The argmax of scores, plus noise of the request's seed and the token's absolute position if it is sampled."""
    ids = []
    for state, tree in zip(states, trees, strict=True):
        params = state.request.sampling
        for node in range(len(tree)):
            row = scores[len(ids)]
            if params.temperature > 0:
                position = len(prefix_of(state, tree, node))
                row = row + gumbel([params.seed], [position], VOCAB_SIZE, device="cpu")[0]
            ids.append(int(row.argmax()))
    return ids


def split(states, trees, rows):
    """Each request alone, with its rows."""
    first = 0
    for state, tree in zip(states, trees, strict=True):
        yield [state], [tree], rows[first : first + len(tree)]
        first += len(tree)


@given(seed=st.integers(0, 10_000))
def test_the_token_of_a_node_is_the_argmax_of_scores_plus_noise_of_seed_and_position(seed):
    states, trees, logits = make_batch(seed)
    sampler = start(states)
    output = as_output(logits, trees)
    ids = sampler.target_ids(states, trees, output)
    assert ids.dtype == np.int32
    assert ids.tolist() == tokens_by_definition(states, trees, sampler.scores(states, trees, output))


@given(seed=st.integers(0, 10_000), chosen=st.lists(st.integers(0, len(RECIPES) - 1), min_size=1, max_size=6))
def test_a_request_gets_the_same_bits_alone_and_among_any_neighbours(seed, chosen):
    states, trees, logits = make_batch(seed, [RECIPES[i] for i in chosen])
    sampler = start(states)
    output = as_output(logits, trees)
    scores, ids = sampler.scores(states, trees, output), sampler.target_ids(states, trees, output)
    alone_scores, alone_ids = [], []
    for one_state, one_tree, rows in split(states, trees, logits):
        alone = as_output(rows, one_tree)
        alone_scores.append(sampler.scores(one_state, one_tree, alone))
        alone_ids += sampler.target_ids(one_state, one_tree, alone).tolist()
    assert torch.equal(scores.view(torch.int32), torch.cat(alone_scores).view(torch.int32))
    assert ids.tolist() == alone_ids


def test_nodes_of_one_prefix_length_share_their_noise_and_others_do_not():
    state = make_state(np.random.default_rng(0), SamplingParams(temperature=1.0, seed=5), num_prompt=3, num_output=0)
    #  root -> 1 -> 4
    #       -> 2 -> 4
    tree = DraftTree(np.array([0, 1, 2, 4, 4], dtype=np.int32), np.array([-1, 0, 0, 1, 2], dtype=np.int32))
    tree.token_ids[0] = state.token_ids[-1]
    scores = torch.zeros(5, VOCAB_SIZE)  # the draw is the argmax of the noise itself
    ids = start([state]).target_ids([state], [tree], as_output(scores, [tree])).tolist()
    noise = gumbel([5, 5, 5], [3, 4, 5], VOCAB_SIZE, device="cpu").argmax(-1).tolist()
    assert ids == [noise[0], noise[1], noise[1], noise[2], noise[2]]


def test_the_token_at_a_position_does_not_depend_on_how_it_was_reached():
    """Committed or still in the tree, deep or shallow: the same prefix and logits give the same token."""
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0.8, top_k=9, repetition_penalty=1.3, no_repeat_ngram_size=2, seed=3)
    state = make_state(rng, params)
    sampler = start([state])
    drafts = [1, 2, 0, 4]
    logits = make_logits(rng, 5)
    chain = DraftTree.chain(int(state.token_ids[-1]), drafts)
    at_once = sampler.target_ids([state], [chain], as_output(logits, [chain])).tolist()
    one_by_one = []
    for step, token in enumerate([*drafts, None]):
        root = DraftTree.root_only(int(state.token_ids[-1]))
        one_by_one += sampler.target_ids([state], [root], as_output(logits[step : step + 1], [root])).tolist()
        if token is not None:
            sampler.commit(state, [token])
            state.append([token])
    assert at_once == one_by_one


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), steps=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), max_size=5))
def test_what_is_kept_up_to_date_step_by_step_equals_a_fresh_start(seed, steps):
    states, _, _ = make_batch(seed)
    rng = np.random.default_rng(seed)
    sampler = start(states)
    for emitted in steps:
        for state in states:
            sampler.commit(state, np.array(emitted, dtype=np.int32) if seed % 2 else emitted)
            state.append(emitted)
        trees = [make_tree(rng, state) for state in states]
        logits = make_logits(rng, sum(map(len, trees)))
        output = as_output(logits, trees)
        assert torch.equal(sampler.scores(states, trees, output), start(states).scores(states, trees, output))


def test_a_long_output_grows_every_record():
    params = SamplingParams(no_repeat_ngram_size=2, frequency_penalty=0.1, repetition_penalty=1.1)
    rng = np.random.default_rng(0)
    state = make_state(rng, params, num_prompt=2, num_output=0)
    sampler = start([state])
    for _ in range(60):
        emitted = rng.integers(0, 30, size=4)
        sampler.commit(state, emitted)
        state.append(emitted)
    tree = make_tree(rng, state)
    output = as_output(make_logits(rng, len(tree)), [tree])
    assert torch.equal(sampler.scores([state], [tree], output), start([state]).scores([state], [tree], output))


def test_scores_are_a_float32_copy_and_the_logits_stay_as_they_were():
    states, trees, logits = make_batch(4)
    before = logits.clone()
    sampler = start(states)
    output = as_output(logits, trees)
    scores = sampler.scores(states, trees, output)
    sampler.target_ids(states, trees, output)
    assert scores.dtype == torch.float32
    assert torch.equal(logits, before)
    scores.zero_()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_processed_in_float32(dtype):
    states, trees, logits = make_batch(4)
    low = logits.to(dtype)
    sampler = start(states)
    expected = sampler.scores(states, trees, as_output(low.float(), trees))
    assert torch.equal(sampler.scores(states, trees, as_output(low, trees)), expected)
    ids = sampler.target_ids(states, trees, as_output(low, trees)).tolist()
    assert ids == tokens_by_definition(states, trees, expected)
    plain = [make_state(np.random.default_rng(0), SamplingParams())]
    rows = low[:1]
    root = [DraftTree.root_only(1)]
    assert start(plain).target_ids(plain, root, as_output(rows, root)).tolist() == [int(rows.argmax())]


def test_greedy_requests_without_processors_cost_one_argmax(monkeypatch):
    states, trees, logits = make_batch(0, [dict(), dict(stop_token_ids=(3,)), dict()])
    sampler = start(states)
    monkeypatch.setattr(sampling, "NodeBatch", None)
    ids = sampler.target_ids(states, trees, as_output(logits, trees))
    assert ids.dtype == np.int32
    assert ids.tolist() == logits.argmax(-1).tolist()


def test_a_processor_that_has_had_its_time_is_dropped_and_the_request_is_plain_again(monkeypatch):
    params = SamplingParams(min_new_tokens=2, stop_token_ids=(3,), begin_suppress_tokens=(1,))
    state = make_state(np.random.default_rng(0), params, num_output=0)
    sampler = start([state])
    tree = [make_tree(np.random.default_rng(0), state)]
    output = as_output(make_logits(np.random.default_rng(0), len(tree[0])), tree)
    assert sampler.scores([state], tree, output)[0, [1, 3]].tolist() == [-float("inf")] * 2
    sampler.commit(state, [5, 5])
    state.append([5, 5])
    monkeypatch.setattr(sampling, "NodeBatch", None)
    assert sampler.target_ids([state], tree, output).tolist() == output.logits.argmax(-1).tolist()


def test_nan_and_tied_scores_give_the_first_best_index_as_torch_does():
    states, trees, _ = make_batch(0, [dict()])
    logits = torch.zeros(len(trees[0]), VOCAB_SIZE)
    logits[0, 7] = float("nan")
    ids = start(states).target_ids(states, trees, as_output(logits, trees)).tolist()
    assert ids == logits.argmax(-1).tolist()
    assert ids[0] == 7


def test_the_seed_matters_and_neighbouring_seeds_differ():
    drawn = set()
    for seed in (0, 1, 2**64 - 1):
        state = make_state(np.random.default_rng(0), SamplingParams(temperature=1.0, seed=seed))
        tree = DraftTree.chain(int(state.token_ids[-1]), [0] * 11)
        drawn.add(tuple(start([state]).target_ids([state], [tree], as_output(torch.zeros(12, VOCAB_SIZE), [tree]))))
    assert len(drawn) == 3


def test_the_drawn_tokens_follow_the_law_of_transformers_by_chi_square():
    params = [SamplingParams(temperature=0.7, top_k=6, repetition_penalty=1.2, seed=seed) for seed in range(4000)]
    rng = np.random.default_rng(2)
    state = make_state(rng, params[0])
    root = DraftTree.root_only(int(state.token_ids[-1]))
    logits = make_logits(rng, 1, ties=False)
    classes = [hf.RepetitionPenaltyLogitsProcessor(1.2), hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(6)]
    law = plain_scores([state], [root], logits, classes)[0].double().softmax(-1)
    counts = np.zeros(VOCAB_SIZE)
    for one in params:
        object.__setattr__(state.request, "sampling", one)
        counts[start([state]).target_ids([state], [root], as_output(logits, [root]))[0]] += 1
    expected = (law * len(params)).numpy()
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic < 25.74  # at most 5 degrees of freedom, p = 1e-4


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled: NUMBA_DISABLE_JIT is set")
def test_warming_up_compiles_every_loop_and_leaves_no_request_behind():
    sampler = Sampler(VOCAB_SIZE)
    sampler.warmup()
    assert not sampler._live
    before = {loop: len(loop.signatures) for loop in LOOPS}
    assert all(before.values())
    states, trees, logits = make_batch(0)
    start(states).target_ids(states, trees, as_output(logits, trees))
    assert before == {loop: len(loop.signatures) for loop in LOOPS}


def test_stopped_requests_are_forgotten_and_unknown_ones_are_no_error():
    states, trees, logits = make_batch(0)
    sampler = start(states)
    sampler.stop([state.request_id for state in states] + ["never seen"])
    assert not sampler._live
    with pytest.raises(KeyError):
        sampler.target_ids(states, trees, as_output(logits, trees))


def test_logits_of_another_shape_are_an_internal_error():
    for recipes in (RECIPES, RECIPES[:1], RECIPES[1:2]):
        states, trees, logits = make_batch(0, recipes)
        sampler = start(states)
        with pytest.raises(InternalError, match="logits of shape"):
            sampler.target_ids(states, trees, as_output(logits[:, :-1], trees))
        with pytest.raises(InternalError, match="logits of shape"):
            sampler.target_ids(states, trees, as_output(torch.cat([logits, logits]), trees))
