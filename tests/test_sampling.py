import numpy as np
import pytest
import torch
import transformers.generation.logits_process as hf

from specdec.processors import OutputPenaltyLogitsProcessor
from specdec.types import SamplingParams
from tests.sampling_cases import as_output, make_logits, make_state, make_tree, plain_scores, start

torch.set_num_threads(1)

PROMPT = 9
EOS = [3, 5]

# What each field of SamplingParams means, said with transformers' own classes.
FIELDS = {
    "temperature": (dict(temperature=0.7), lambda: hf.TemperatureLogitsWarper(0.7)),
    "top_k": (dict(top_k=5), lambda: hf.TopKLogitsWarper(5)),
    "top_k_larger_than_vocabulary": (dict(top_k=500), lambda: hf.TopKLogitsWarper(500)),
    "top_p": (dict(top_p=0.8), lambda: hf.TopPLogitsWarper(0.8)),
    "tiny_top_p": (dict(top_p=1e-6), lambda: hf.TopPLogitsWarper(1e-6)),
    "min_p": (dict(min_p=0.1), lambda: hf.MinPLogitsWarper(0.1)),
    "typical_p": (dict(typical_p=0.6), lambda: hf.TypicalLogitsWarper(0.6)),
    "epsilon_cutoff": (dict(epsilon_cutoff=0.02), lambda: hf.EpsilonLogitsWarper(0.02)),
    "eta_cutoff": (dict(eta_cutoff=0.05), lambda: hf.EtaLogitsWarper(0.05)),
    "repetition_penalty": (dict(repetition_penalty=1.3), lambda: hf.RepetitionPenaltyLogitsProcessor(1.3)),
    "presence_penalty": (dict(presence_penalty=0.9), lambda: OutputPenaltyLogitsProcessor(0.9, 0.0, PROMPT)),
    "frequency_penalty": (dict(frequency_penalty=-0.4), lambda: OutputPenaltyLogitsProcessor(0.0, -0.4, PROMPT)),
    "no_repeat_ngram_size_1": (dict(no_repeat_ngram_size=1), lambda: hf.NoRepeatNGramLogitsProcessor(1)),
    "no_repeat_ngram_size_2": (dict(no_repeat_ngram_size=2), lambda: hf.NoRepeatNGramLogitsProcessor(2)),
    "no_repeat_ngram_size_3": (dict(no_repeat_ngram_size=3), lambda: hf.NoRepeatNGramLogitsProcessor(3)),
    "min_new_tokens": (
        dict(min_new_tokens=6, stop_token_ids=tuple(EOS)),
        lambda: hf.MinNewTokensLengthLogitsProcessor(PROMPT, 6, EOS),
    ),
    "logit_bias": (
        dict(logit_bias={2: 1.5, 7: -3.0, 9: -float("inf")}),
        lambda: hf.SequenceBiasLogitsProcessor({(2,): 1.5, (7,): -3.0, (9,): -float("inf")}),
    ),
    "suppress_tokens": (dict(suppress_tokens=(1, 4)), lambda: hf.SuppressTokensLogitsProcessor([1, 4])),
    "forced_eos_token_ids": (
        dict(forced_eos_token_ids=tuple(EOS), max_new_tokens=7),
        lambda: hf.ForcedEOSTokenLogitsProcessor(PROMPT + 7, EOS),
    ),
    "bad_words_ids": (
        dict(bad_words_ids=((1,), (2, 3), (0, 1, 2), (3, 3), (5,)), stop_token_ids=(5,)),
        lambda: hf.NoBadWordsLogitsProcessor([[1], [2, 3], [0, 1, 2], [3, 3], [5]], eos_token_id=[5]),
    ),
}


def case(seed, params, count=3, num_output=4):
    rng = np.random.default_rng(seed)
    states = [make_state(rng, params, name=f"r{i}", num_output=num_output) for i in range(count)]
    trees = [make_tree(rng, state) for state in states]
    return states, trees, make_logits(rng, sum(map(len, trees)))


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_means_what_its_class_in_transformers_means(name):
    fields, build = FIELDS[name]
    fields = {"temperature": 1.0} | fields
    changed = 0
    for seed in range(12):
        states, trees, logits = case(seed, SamplingParams(**fields))
        expected = plain_scores(states, trees, logits, [build()])
        got = start(states).scores(states, trees, as_output(logits, trees))
        if "top_p" in name:  # which of several equal scores at the edge stay is left open by an unstable sort
            got, expected = got.sort().values, expected.sort().values
        assert torch.equal(got, expected)
        changed += not torch.equal(expected, logits)
    assert changed or "larger" in name
