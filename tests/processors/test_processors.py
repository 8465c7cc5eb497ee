"""Every processor against its class in transformers, applied to each node alone with the node's true prefix."""

import numpy as np
import pytest
import torch
import transformers.generation.logits_process as hf
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList, WatermarkingConfig

from specdec.errors import RequestError, UnsupportedError
from specdec.processors import OutputPenaltyLogitsProcessor, PerNode
from specdec.types import DraftTree, SamplingParams
from tests.sampling_cases import (
    VOCAB_SIZE,
    as_output,
    make_logits,
    make_state,
    make_tree,
    plain_scores,
    reachable,
    start,
)

torch.set_num_threads(1)

PROMPT = 9
EOS = [3, 5]
INF = float("inf")

# Name -> (fields of SamplingParams or None, what they mean in transformers' own classes, does it run per node?)
CASES = {
    "temperature": (dict(temperature=0.7), lambda: hf.TemperatureLogitsWarper(0.7), False),
    "top_k": (dict(top_k=5), lambda: hf.TopKLogitsWarper(5), False),
    "top_k of all": (dict(top_k=500), lambda: hf.TopKLogitsWarper(500), False),
    "top_k, four stay": (None, lambda: hf.TopKLogitsWarper(2, min_tokens_to_keep=4), False),
    "top_k, -5 for the others": (None, lambda: hf.TopKLogitsWarper(2, filter_value=-5.0), True),
    "top_p": (dict(top_p=0.8), lambda: hf.TopPLogitsWarper(0.8), False),
    "tiny top_p": (dict(top_p=1e-9), lambda: hf.TopPLogitsWarper(1e-9), False),
    "almost all top_p": (dict(top_p=1 - 1e-6), lambda: hf.TopPLogitsWarper(1 - 1e-6), False),
    "top_p, four stay": (None, lambda: hf.TopPLogitsWarper(0.1, min_tokens_to_keep=4), True),
    "min_p": (dict(min_p=0.1), lambda: hf.MinPLogitsWarper(0.1), False),
    "typical_p": (dict(typical_p=0.6), lambda: hf.TypicalLogitsWarper(0.6), False),
    "typical_p, four stay": (None, lambda: hf.TypicalLogitsWarper(0.1, min_tokens_to_keep=4), True),
    "epsilon_cutoff": (dict(epsilon_cutoff=0.02), lambda: hf.EpsilonLogitsWarper(0.02), False),
    "large epsilon_cutoff": (dict(epsilon_cutoff=0.99), lambda: hf.EpsilonLogitsWarper(0.99), False),
    "eta_cutoff": (dict(eta_cutoff=0.05), lambda: hf.EtaLogitsWarper(0.05), False),
    "repetition_penalty": (dict(repetition_penalty=1.3), lambda: hf.RepetitionPenaltyLogitsProcessor(1.3), False),
    "repetition_penalty after 4": (None, lambda: hf.RepetitionPenaltyLogitsProcessor(1.3, 4), False),
    "repetition_penalty after 12": (None, lambda: hf.RepetitionPenaltyLogitsProcessor(1.3, 12), True),
    "presence_penalty": (dict(presence_penalty=0.9), lambda: OutputPenaltyLogitsProcessor(0.9, 0.0, PROMPT), False),
    "frequency_penalty": (dict(frequency_penalty=-0.4), lambda: OutputPenaltyLogitsProcessor(0.0, -0.4, PROMPT), False),
    "no_repeat_ngram_size 1": (dict(no_repeat_ngram_size=1), lambda: hf.NoRepeatNGramLogitsProcessor(1), False),
    "no_repeat_ngram_size 2": (dict(no_repeat_ngram_size=2), lambda: hf.NoRepeatNGramLogitsProcessor(2), False),
    "no_repeat_ngram_size 3": (dict(no_repeat_ngram_size=3), lambda: hf.NoRepeatNGramLogitsProcessor(3), False),
    "no_repeat_ngram_size 30": (dict(no_repeat_ngram_size=30), lambda: hf.NoRepeatNGramLogitsProcessor(30), False),
    "min_new_tokens": (
        dict(min_new_tokens=6, stop_token_ids=tuple(EOS)),
        lambda: hf.MinNewTokensLengthLogitsProcessor(PROMPT, 6, EOS),
        False,
    ),
    "min_length": (None, lambda: hf.MinLengthLogitsProcessor(15, [*EOS, 10_000]), False),
    "logit_bias": (
        dict(logit_bias={2: 1.5, 7: -3.0, 9: -INF}),
        lambda: hf.SequenceBiasLogitsProcessor({(2,): 1.5, (7,): -3.0, (9,): -INF}),
        False,
    ),
    "sequence_bias": (
        None,
        lambda: hf.SequenceBiasLogitsProcessor(
            [[[2], 1.5], [[1, 2], 0.3], [[3, 2], 0.7], [[0, 1, 2], 0.1], [[2, 4], -INF], [[4, 4, 4, 4, 1], 2.0]]
        ),
        False,
    ),
    "suppress_tokens": (dict(suppress_tokens=(1, 4)), lambda: hf.SuppressTokensLogitsProcessor([1, 4]), False),
    "suppress_tokens outside": (None, lambda: hf.SuppressTokensLogitsProcessor([1, 4, 999]), False),
    "begin_suppress_tokens": (None, lambda: hf.SuppressTokensAtBeginLogitsProcessor([1, 4], 14), False),
    "forced_bos_token_id": (None, lambda: hf.ForcedBOSTokenLogitsProcessor(4), False),
    "forced_eos_token_ids": (
        dict(forced_eos_token_ids=tuple(EOS), max_new_tokens=7),
        lambda: hf.ForcedEOSTokenLogitsProcessor(PROMPT + 7, EOS),
        False,
    ),
    "bad_words_ids": (
        dict(bad_words_ids=((1,), (2, 3), (0, 1, 2), (3, 3), (5,)), stop_token_ids=(5,)),
        lambda: hf.NoBadWordsLogitsProcessor([[1], [2, 3], [0, 1, 2], [3, 3], [5]], eos_token_id=[5]),
        False,
    ),
    "remove_invalid_values": (None, lambda: hf.InfNanRemoveLogitsProcessor(), False),
    "renormalize_logits": (None, lambda: hf.LogitNormalization(), False),
    "exponential_decay": (None, lambda: hf.ExponentialDecayLengthPenalty((5, 1.2), EOS, PROMPT), True),
    "top_h": (None, lambda: hf.TopHLogitsWarper(0.5), True),
    "watermark": (None, lambda: WatermarkingConfig(context_width=2).construct_processor(VOCAB_SIZE, "cpu"), True),
    "prefix_allowed_tokens_fn": (
        None,
        lambda: hf.PrefixConstrainedLogitsProcessor(lambda batch, ids: [int(ids.sum()) % 7, 8 + len(ids) % 5], 1),
        True,
    ),
}


def batch(seed, params, count=3, num_output=4, ties=True):
    rng = np.random.default_rng(seed)
    states = [make_state(rng, params, name=f"r{i}", num_prompt=PROMPT, num_output=num_output) for i in range(count)]
    trees = [make_tree(rng, state) for state in states]
    logits = make_logits(rng, sum(map(len, trees)), ties=ties)
    return states, trees, logits


def same(got, expected, name=""):
    """Bit for bit; of equal scores at the edge of a top-p, an unstable sort keeps any."""
    if "top_p" in name:
        got, expected = got.sort(dim=-1).values, expected.sort(dim=-1).values
    return torch.equal(got, expected)


@pytest.mark.parametrize(
    ("name", "as_field"),
    [(name, as_field) for name, (fields, _, _) in CASES.items() for as_field in {fields is not None, False}],
)
def test_every_processor_does_what_its_class_in_transformers_does(name, as_field):
    fields, build, runs_per_node = CASES[name]
    changed = False
    for seed in range(10):
        params = SamplingParams(**{"temperature": 1.0} | fields) if as_field else None
        states, trees, logits = batch(seed, params or SamplingParams(temperature=1.0, logits_processors=(build(),)))
        expected = plain_scores(states, trees, logits, [build()])
        sampler = start(states)
        got = sampler.scores(states, trees, as_output(logits, trees))
        rows = reachable(trees, expected) if runs_per_node else slice(None)
        assert same(got[rows], expected[rows], name)
        ops = sampler._live["r0"].ops
        assert [isinstance(op, PerNode) for op in ops] in ([], [runs_per_node])
        changed |= not torch.equal(expected, logits)
    assert changed or name in (
        "top_k of all",
        "no_repeat_ngram_size 30",
        "forced_bos_token_id",
        "remove_invalid_values",
    )


def test_the_first_token_is_forced_after_a_prompt_of_one_token():
    params = SamplingParams(forced_bos_token_id=4, begin_suppress_tokens=(6, 4))
    rng = np.random.default_rng(0)
    states = [make_state(rng, params, num_prompt=1, num_output=0)]
    trees = [make_tree(rng, states[0])]
    logits = make_logits(rng, len(trees[0]))
    # With a forced first token the "begin" is the one after it.
    classes = [hf.ForcedBOSTokenLogitsProcessor(4), hf.SuppressTokensAtBeginLogitsProcessor([6, 4], 2)]
    got = start(states).scores(states, trees, as_output(logits, trees))
    assert torch.equal(got, plain_scores(states, trees, logits, classes))
    assert got[0].argmax() == 4


def test_invalid_values_are_removed_as_in_transformers():
    states, trees, logits = batch(0, SamplingParams(logits_processors=(hf.InfNanRemoveLogitsProcessor(),)))
    logits[0, :4] = torch.tensor([float("nan"), INF, -INF, -float("nan")])
    expected = plain_scores(states, trees, logits, [hf.InfNanRemoveLogitsProcessor()])
    assert torch.equal(start(states).scores(states, trees, as_output(logits, trees)), expected)


def test_repetition_penalty_passes_over_prompt_tokens_outside_the_output_vocabulary():
    rng = np.random.default_rng(0)
    state = make_state(rng, SamplingParams(repetition_penalty=2.0, no_repeat_ngram_size=1), num_prompt=5)
    state.token_ids[1] = VOCAB_SIZE + 3
    tree = make_tree(rng, state)
    logits = make_logits(rng, len(tree))
    classes = [hf.RepetitionPenaltyLogitsProcessor(2.0), hf.NoRepeatNGramLogitsProcessor(1)]
    expected = plain_scores([state], [tree], logits, classes)
    assert torch.equal(start([state]).scores([state], [tree], as_output(logits, [tree])), expected)


BUILDERS = st.one_of(
    st.floats(0.2, 3).map(lambda x: hf.TemperatureLogitsWarper(x)),
    st.integers(1, 40).map(lambda x: hf.TopKLogitsWarper(x)),
    st.floats(0.05, 0.99).map(lambda x: hf.TopPLogitsWarper(x)),
    st.floats(0.001, 0.9).map(lambda x: hf.MinPLogitsWarper(x)),
    st.floats(0.05, 0.95).map(lambda x: hf.TypicalLogitsWarper(x)),
    st.floats(0.001, 0.9).map(lambda x: hf.EpsilonLogitsWarper(x)),
    st.floats(0.001, 0.9).map(lambda x: hf.EtaLogitsWarper(x)),
    st.floats(0.3, 3).map(lambda x: hf.RepetitionPenaltyLogitsProcessor(x)),
    st.integers(1, 4).map(lambda x: hf.NoRepeatNGramLogitsProcessor(x)),
    st.tuples(st.floats(-2, 2), st.floats(-2, 2)).map(lambda x: OutputPenaltyLogitsProcessor(*x, PROMPT)),
    st.dictionaries(
        st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple), st.floats(-9, 9), min_size=1, max_size=5
    ).map(lambda x: hf.SequenceBiasLogitsProcessor(x)),
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=4).map(
        lambda x: hf.NoBadWordsLogitsProcessor(x)
    ),
    st.integers(8, 18).map(lambda x: hf.MinLengthLogitsProcessor(x, EOS)),
    st.integers(10, 18).map(lambda x: hf.ForcedEOSTokenLogitsProcessor(x, [6])),
    st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda x: hf.SuppressTokensLogitsProcessor(x)),
    st.integers(10, 16).map(lambda x: hf.SuppressTokensAtBeginLogitsProcessor([2, 4], x)),
    st.just(hf.LogitNormalization()),
)


@settings(max_examples=150)
@given(seed=st.integers(0, 10_000), mine=st.lists(BUILDERS, max_size=5), other=st.lists(BUILDERS, max_size=3))
def test_any_order_of_any_processors_is_kept_per_request(seed, mine, other):
    states, trees, logits = batch(seed, SamplingParams(), ties=False)
    lists = {"r0": mine, "r1": other, "r2": mine[::-1]}
    for state in states:
        params = SamplingParams(temperature=1.0, logits_processors=(LogitsProcessorList(lists[state.request_id]),))
        object.__setattr__(state.request, "sampling", params)
    try:
        expected = plain_scores(states, trees, logits, lists)
    except ValueError:  # transformers' own eta warper refuses a row in which every token is forbidden already
        reject()
    got = start(states).scores(states, trees, as_output(logits, trees))
    assert torch.equal(got.isneginf(), expected.isneginf())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


# ---- the order of the whole list ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return LlamaForCausalLM(config)


def hf_list(model, custom=(), **config):
    """The list that `generate` would prepare."""
    generation = GenerationConfig(max_length=PROMPT + 7, eos_token_id=EOS, pad_token_id=0, **config)
    model._prepare_special_tokens(generation)
    return model._get_logits_processor(
        generation, input_ids_seq_length=PROMPT, logits_processor=LogitsProcessorList(custom), device="cpu"
    )


CONFIG = dict(
    do_sample=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.95, epsilon_cutoff=1e-3,
    eta_cutoff=2e-3, repetition_penalty=1.4, no_repeat_ngram_size=2, bad_words_ids=[[1], [2, 3]], min_new_tokens=5,
    forced_eos_token_id=EOS, suppress_tokens=[4], begin_suppress_tokens=[6], sequence_bias=[[[2], 1.5], [[8], -2.0]],
)  # fmt: skip
FIELDS = dict(
    temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.95, epsilon_cutoff=1e-3, eta_cutoff=2e-3,
    repetition_penalty=1.4, no_repeat_ngram_size=2, bad_words_ids=((1,), (2, 3)), min_new_tokens=5, max_new_tokens=7,
    forced_eos_token_ids=tuple(EOS), suppress_tokens=(4,), begin_suppress_tokens=(6,), logit_bias={2: 1.5, 8: -2.0},
    stop_token_ids=tuple(EOS),
)  # fmt: skip


def user_processor(input_ids, scores):
    """Not idempotent and not linear, so that its place in the list shows."""
    return torch.where(scores > 0, scores * scores, scores) + input_ids[:, -1:] % 3


@pytest.mark.parametrize(
    "custom",
    [
        (),
        (user_processor,),
        (hf.RepetitionPenaltyLogitsProcessor(2.5), user_processor),
        (user_processor, hf.NoBadWordsLogitsProcessor([[0]]), hf.TemperatureLogitsWarper(3.0)),
    ],
    ids=["none", "a function", "in the place of a field", "in the place of a field, and a warper before the warpers"],
)
@pytest.mark.parametrize("num_output", [0, 1, 5, 6])
def test_the_fields_make_the_list_that_generate_would_prepare(model, custom, num_output):
    states, trees, logits = batch(1, SamplingParams(**FIELDS, logits_processors=custom), num_output=num_output)
    expected = plain_scores(states, trees, logits, hf_list(model, custom, **CONFIG))
    got = start(states).scores(states, trees, as_output(logits, trees))
    rows = reachable(trees, expected) if custom else slice(None)
    assert same(got[rows], expected[rows], "top_p")


def test_greedy_skips_what_only_sampling_uses(model):
    states, trees, logits = batch(
        1, SamplingParams(**FIELDS | {"temperature": 0.0}, logits_processors=(user_processor,))
    )
    expected = plain_scores(states, trees, logits, hf_list(model, (user_processor,), **CONFIG | {"do_sample": False}))
    rows = reachable(trees, expected)
    assert torch.equal(start(states).scores(states, trees, as_output(logits, trees))[rows], expected[rows])


def test_the_list_that_generate_prepared_may_be_passed_as_objects(model):
    prepared = hf_list(model, (user_processor,), **CONFIG)
    states, trees, logits = batch(2, SamplingParams(temperature=1.0, logits_processors=tuple(prepared)))
    expected = plain_scores(states, trees, logits, prepared)
    sampler = start(states)
    rows = reachable(trees, expected)
    assert same(sampler.scores(states, trees, as_output(logits, trees))[rows], expected[rows], "top_p")
    assert sum(isinstance(op, PerNode) for op in sampler._live["r0"].ops) == 1  # the user's own


# ---- users' own processors ----------------------------------------------------------------------------------------


class Recorder:
    """Notes the prefixes it is called with and bans a token that depends on the whole prefix."""

    def __init__(self):
        self.prefixes = []

    def __call__(self, input_ids, scores):
        assert input_ids.dtype == torch.int64
        assert scores.dtype == torch.float32
        assert scores.shape == (1, VOCAB_SIZE)
        self.prefixes.append(tuple(input_ids[0].tolist()))
        scores[:, int(input_ids.sum()) % VOCAB_SIZE] = -INF  # in place, as many do
        return scores


def test_a_users_processor_sees_each_nodes_true_prefix_once():
    recorder = Recorder()
    states, trees, logits = batch(3, SamplingParams(logits_processors=(recorder,)))
    before = logits.clone()
    got = start(states).scores(states, trees, as_output(logits, trees))
    oracle = Recorder()
    expected = plain_scores(states, trees, logits, [oracle])
    rows = reachable(trees, expected)
    assert torch.equal(got[rows], expected[rows])
    assert recorder.prefixes == [
        prefix for prefix, wanted in zip(oracle.prefixes, rows.tolist(), strict=True) if wanted
    ]
    assert len(recorder.prefixes) > len(trees)
    assert torch.equal(logits, before)


def even_numbers_only(input_ids, scores):
    """A grammar of even tokens, which fails on a text that it never allowed."""
    assert (input_ids[0, PROMPT:] % 2 == 0).all(), "this prefix cannot occur"
    scores[:, 1::2] = -INF
    return scores


def even_case(*more):
    state = make_state(
        np.random.default_rng(0), SamplingParams(logits_processors=(even_numbers_only, *more)), num_output=0
    )
    #  root -> 2 -> 3 -> 4      3 is impossible, so is what comes below it
    #            -> 6
    #       -> 1
    ids, parents = [int(state.token_ids[-1]), 2, 3, 4, 6, 1], [-1, 0, 1, 2, 1, 0]
    tree = DraftTree(np.array(ids, dtype=np.int32), np.array(parents, dtype=np.int32))
    return [state], [tree], make_logits(np.random.default_rng(0), 6)


def test_a_processor_is_not_shown_prefixes_that_the_law_makes_impossible():
    states, trees, logits = even_case()
    scores = start(states).scores(states, trees, as_output(logits, trees))
    expected = logits.clone()
    expected[:, 1::2] = -INF
    assert torch.equal(scores[[0, 1, 4]], expected[[0, 1, 4]])


@pytest.mark.parametrize("later", [lambda input_ids, scores: scores.nan_to_num(), hf.InfNanRemoveLogitsProcessor()])
def test_it_is_shown_all_prefixes_if_a_later_processor_might_make_them_possible_again(later):
    states, trees, logits = even_case(later)
    with pytest.raises(AssertionError, match="this prefix cannot occur"):
        start(states).scores(states, trees, as_output(logits, trees))


class HalfTemperature(hf.TemperatureLogitsWarper):
    """A user's subclass of a known class: only its own code says what it does."""

    def __call__(self, input_ids, scores):
        return super().__call__(input_ids, scores) / 2


def test_a_subclass_of_a_known_class_is_the_users_own():
    states, trees, logits = batch(3, SamplingParams(logits_processors=(HalfTemperature(0.5),)))
    assert torch.equal(start(states).scores(states, trees, as_output(logits, trees)), logits / 0.5 / 2)


@pytest.mark.parametrize("result", [torch.zeros(VOCAB_SIZE), torch.zeros(1, 3), None])
def test_a_processor_that_returns_something_else_is_named(result):
    states, trees, logits = batch(3, SamplingParams(logits_processors=(lambda input_ids, scores: result,)))
    with pytest.raises(RequestError, match=r"must return scores of shape \(1, 31\), function returned"):
        start(states).scores(states, trees, as_output(logits, trees))


@pytest.mark.parametrize(
    "name",
    [
        "SynthIDTextWatermarkLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "AlternatingCodebooksLogitsProcessor",
        "WhisperTimeStampLogitsProcessor",
    ],
)
@pytest.mark.parametrize("is_subclass", [False, True])
def test_a_processor_that_a_tree_cannot_have_is_refused_by_name(name, is_subclass):
    kind = getattr(hf, name)
    if is_subclass:
        kind = type("Mine", (kind,), {})
    processor = object.__new__(kind)
    states, _, _ = batch(3, SamplingParams(logits_processors=(processor,)))
    with pytest.raises(UnsupportedError, match=f"{name} cannot be applied to draft trees"):
        start(states)


def test_every_class_of_transformers_is_either_known_or_refused():
    """A new class of a new release must not slip through as a user's own."""
    from specdec.processors.objects import _COMPILERS, _PURE, from_object

    names = {name for name, kind in vars(hf).items() if isinstance(kind, type) and issubclass(kind, hf.LogitsProcessor)}
    assert (set(_COMPILERS) | _PURE) - names == {"OutputPenaltyLogitsProcessor"}
    for name in names - set(_COMPILERS) - _PURE:
        with pytest.raises(UnsupportedError):
            from_object(None, object.__new__(getattr(hf, name)))


def test_padding_in_a_repetition_penalty_is_refused_and_no_padding_is_fine():
    padded = hf.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([0, 2]))
    states, _, _ = batch(0, SamplingParams(logits_processors=(padded,)))
    with pytest.raises(UnsupportedError, match="left padding is no part of a request's prompt"):
        start(states)
    unpadded = hf.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([0]))
    states, trees, logits = batch(0, SamplingParams(logits_processors=(unpadded,)))
    expected = plain_scores(states, trees, logits, [unpadded])
    assert torch.equal(start(states).scores(states, trees, as_output(logits, trees)), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(logit_bias={31: 1.0}), r"logit_bias must hold token ids in \[0, 31\), got 31"),
        (dict(logit_bias={1: float("nan")}), "logit_bias must hold numbers, got nan for token 1"),
        (dict(suppress_tokens=(2, -1)), r"suppress_tokens must hold token ids in \[0, 31\), got -1"),
        (dict(begin_suppress_tokens=(99,)), "begin_suppress_tokens must hold token ids"),
        (dict(bad_words_ids=((1, 31),)), "bad_words_ids must hold token ids"),
        (dict(bad_words_ids=((1,), ())), "bad_words_ids must hold non-empty lists"),
        (dict(forced_bos_token_id=31), "forced_bos_token_id must hold token ids"),
        (dict(forced_eos_token_ids=(1, 31)), "forced_eos_token_ids must hold token ids"),
        (dict(logits_processors=(3,)), r"logits_processors must be callables .*, got 3"),
        (
            dict(logits_processors=(hf.SequenceBiasLogitsProcessor({(1, 40): 1.0}),)),
            r"SequenceBiasLogitsProcessor must hold token ids in \[0, 31\), got 40",
        ),
    ],
)
def test_bad_parameters_are_refused_with_the_value_and_the_rule(fields, message):
    states, _, _ = batch(0, SamplingParams(**fields))
    with pytest.raises(RequestError, match=message):
        start(states)


def test_end_ids_outside_the_vocabulary_are_passed_over_as_in_transformers():
    states, trees, logits = batch(0, SamplingParams(min_new_tokens=9, stop_token_ids=(50_256,)))
    assert torch.equal(start(states).scores(states, trees, as_output(logits, trees)), logits)
