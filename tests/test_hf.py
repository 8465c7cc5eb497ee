"""``generate(custom_generate=speculate(...))`` against ``generate`` itself, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import specdec
from specdec.errors import ConfigError, UnsupportedError
from specdec.hf import SpeculativeOutput
from specdec.toy import RandomTreeDrafter
from tests.tiny_models import byte_tokenizer, tiny_llama

TEXT = "def f(x):\n    return x + 1\n\ndef g(x):\n    return x + 2\n\n"


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def batch(tokenizer):
    """Three ragged prompts, padded on the left."""
    rows = [tokenizer.encode(TEXT), tokenizer.encode("abcabcabcabc"), tokenizer.encode("x")]
    width = max(map(len, rows))
    ids = torch.tensor([[7] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 7}


def drafters():
    return ["none", "ngram", RandomTreeDrafter(257, seed=3)]


GREEDY_OPTIONS = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "min new tokens": {"min_new_tokens": 5},
    "no repeat n-gram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[10, 11], [12]]},
    "suppress at begin": {"begin_suppress_tokens": [3, 5], "suppress_tokens": [9]},
    "forced end": {"forced_eos_token_id": 5},
    "exponential decay": {"exponential_decay_length_penalty": (3, 1.4)},
}


@pytest.mark.parametrize("options", GREEDY_OPTIONS.values(), ids=GREEDY_OPTIONS)
@pytest.mark.parametrize("drafter", drafters(), ids=["none", "ngram", "random"])
def test_greedy_text_of_a_padded_batch_is_that_of_generate(model, batch, drafter, options):
    expected = model.generate(**batch, do_sample=False, max_new_tokens=20, **options)
    got = model.generate(
        **batch, do_sample=False, max_new_tokens=20, **options, custom_generate=specdec.speculate(drafter)
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("drafter", drafters(), ids=["none", "ngram", "random"])
def test_end_of_sequence_pads_the_rest_of_a_row(model, batch, drafter):
    plain = model.generate(**batch, do_sample=False, max_new_tokens=20, eos_token_id=None)
    # The token that one row writes third ends that row, and the others wherever they write it.
    eos = int(plain[0, batch["input_ids"].shape[1] + 2])
    expected = model.generate(**batch, do_sample=False, max_new_tokens=20, eos_token_id=[eos, 256])
    got = model.generate(
        **batch, do_sample=False, max_new_tokens=20, eos_token_id=[eos, 256], custom_generate=specdec.speculate(drafter)
    )
    assert torch.equal(got, expected)
    assert (got[0] == 7).any()


def test_sampled_text_depends_on_the_seed_and_not_on_the_drafter(model, batch):
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 16}
    texts = [
        model.generate(**batch, **options, num_return_sequences=2, custom_generate=specdec.speculate(d, seed=seed))
        for seed in (5, 6)
        for d in drafters()
    ]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(texts[3], texts[4])
    assert not torch.equal(texts[0], texts[3])
    assert len(texts[0]) == 6
    assert not torch.equal(texts[0][0], texts[0][1])  # the two sequences of one prompt differ


def test_torch_manual_seed_repeats_a_sampled_call_without_a_seed(model, batch):
    def run():
        torch.manual_seed(11)
        return model.generate(**batch, do_sample=True, max_new_tokens=8, custom_generate=specdec.speculate("ngram"))

    assert torch.equal(run(), run())


def test_output_of_return_dict_carries_our_statistics(model, batch):
    out = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=20,
        return_dict_in_generate=True,
        custom_generate=specdec.speculate("ngram"),
    )
    assert isinstance(out, SpeculativeOutput)
    assert len(out.speculation) == 3
    for stats in out.speculation:
        assert stats.num_new_tokens == 20
        assert stats.num_steps + stats.num_accepted == 20
        assert stats.acceptance_length == 20 / stats.num_steps
        assert 0 <= stats.acceptance_rate <= 1


class _Recorder:
    def __init__(self):
        self.pieces = []
        self.ended = False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer_gets_what_generates_own_streamer_gets(model, batch):
    one = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1], "pad_token_id": 7}
    theirs, ours = _Recorder(), _Recorder()
    model.generate(**one, do_sample=False, max_new_tokens=12, streamer=theirs)
    model.generate(**one, do_sample=False, max_new_tokens=12, custom_generate=specdec.speculate("ngram", streamer=ours))
    assert ours.pieces == theirs.pieces
    assert ours.ended


def test_stop_string_ends_the_text_where_generate_ends_it(model, batch, tokenizer):
    one = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1], "pad_token_id": 7}
    free = model.generate(**one, do_sample=False, max_new_tokens=24, eos_token_id=None)
    tail = free[0, one["input_ids"].shape[1] :].tolist()
    stop = next(text for text in map(tokenizer.decode, tail[2:]) if text.isascii())
    expected = model.generate(
        **one, do_sample=False, max_new_tokens=24, eos_token_id=None, stop_strings=[stop], tokenizer=tokenizer
    )
    got = model.generate(
        **one,
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=None,
        custom_generate=specdec.speculate("ngram", stop_strings=[stop], tokenizer=tokenizer),
    )
    assert torch.equal(got, expected)
    assert got.shape[1] < free.shape[1]


class _BanLast(LogitsProcessor):
    """Forbids the last token of the prefix: wrong wherever the prefix is not the node's own."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[torch.arange(len(scores)), input_ids[:, -1]] = -float("inf")
        return scores


class _StopAtLength(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("drafter", drafters(), ids=["none", "ngram", "random"])
def test_user_processor_and_criterion_are_honoured_token_by_token(model, batch, drafter):
    one = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1], "pad_token_id": 7}
    width = one["input_ids"].shape[1]
    options = {
        "do_sample": False,
        "max_new_tokens": 20,
        "logits_processor": LogitsProcessorList([_BanLast()]),
        "stopping_criteria": StoppingCriteriaList([_StopAtLength(width + 9)]),
    }
    expected = model.generate(**one, **options)
    got = model.generate(**one, **options, custom_generate=specdec.speculate(drafter))
    assert torch.equal(got, expected)
    assert got.shape[1] == width + 9


def test_one_speculation_object_serves_many_calls(model, batch):
    fast = specdec.speculate("ngram")
    expected = model.generate(**batch, do_sample=False, max_new_tokens=9)
    for _ in range(3):
        assert torch.equal(model.generate(**batch, do_sample=False, max_new_tokens=9, custom_generate=fast), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams must be 1, got 3"),
        ({"return_dict_in_generate": True, "output_scores": True}, "per-step outputs .* output_scores"),
        ({"prompt_lookup_num_tokens": 3}, "use speculate"),
    ],
)
def test_what_cannot_work_is_refused_with_one_clear_error(model, batch, options, message):
    with pytest.raises(UnsupportedError, match=message):
        model.generate(**batch, max_new_tokens=4, **options, custom_generate=specdec.speculate("ngram"))


def test_a_streamer_of_a_batch_is_refused(model, batch):
    with pytest.raises(UnsupportedError, match="a streamer takes one sequence, got a batch of 3"):
        model.generate(**batch, max_new_tokens=4, custom_generate=specdec.speculate("ngram", streamer=_Recorder()))


def test_encoder_decoder_models_are_refused():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration is an encoder-decoder"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, custom_generate=specdec.speculate("ngram"))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("nonsense",), {}, "drafter must be one of .*none.*, got 'nonsense'"),
        (("ngram",), {"stop_strings": ["x"]}, "stop_strings need a tokenizer"),
        (("ngram",), {"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        (("ngram",), {"drafter_options": {"wrong": 1}}, "drafter 'ngram': .*wrong"),
    ],
)
def test_bad_options_of_speculate_name_the_value_and_the_rule(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        specdec.speculate(*arguments, **options)


def test_negative_budget_is_refused_at_the_edge(model, batch):
    with pytest.raises(ConfigError, match="budget must be >= 0, got -1"):
        model.generate(**batch, max_new_tokens=2, custom_generate=specdec.speculate("ngram", budget=-1))
