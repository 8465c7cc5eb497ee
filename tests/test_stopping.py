import string

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)

from specdec.errors import RequestError, UnsupportedError
from specdec.stopping import StopChecker
from specdec.types import SamplingParams

torch.set_num_threads(1)

LETTERS = list(string.ascii_letters + string.digits)
MERGED = ["st", "op", "stop", "sto", "pp", "er", "top", "las", "the", "abc", "def"]


def byte_level_tokenizer():
    """Every byte, and tokens that cross the borders of words: spaces, stop strings inside, halves of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*MERGED, " stop", " x stopper ", "\n\n", "é", "\n}", "a\n"]
    to_chars = dict(zip([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)], "x" * 188, strict=True))
    others = [byte for byte in range(256) if byte not in to_chars]
    char = {byte: chr(byte) for byte in to_chars} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    merged = ["".join(char[byte] for byte in piece.encode()) for piece in pieces]
    halves = ["".join(char[byte] for byte in half) for half in ("€".encode()[:2], "€".encode()[2:] + b"!", b"\xc3")]
    tokens = list(dict.fromkeys([*alphabet, *merged, *halves]))
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|end|>", special=True)])
    core.add_tokens([AddedToken("<a stop b>")])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def metaspace_tokenizer():
    """A Unigram vocabulary with leading-space marks, as SentencePiece writes them."""
    tokens = ["<unk>", *LETTERS, "▁", *MERGED, *(f"▁{piece}" for piece in MERGED), "!", "\n", "é", "▁é"]
    core = Tokenizer(models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def byte_fallback_tokenizer():
    """Llama-2 style: leading-space marks, and bytes for what the vocabulary lacks."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, "▁", *MERGED, "▁stop", "▁the"]
    core = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def wordpiece_tokenizer():
    """BERT style: the pieces without ## start a new word."""
    tokens = ["[UNK]", *LETTERS, *(f"##{c}" for c in LETTERS), *MERGED, *(f"##{piece}" for piece in MERGED)]
    core = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


TOKENIZERS = {
    "byte_level": byte_level_tokenizer(),
    "metaspace": metaspace_tokenizer(),
    "byte_fallback": byte_fallback_tokenizer(),
    "wordpiece": wordpiece_tokenizer(),
}


def checker(num_prompt_tokens=1, max_length=10_000, tokenizer=None, **params):
    params.setdefault("max_new_tokens", 5_000)
    return StopChecker(
        SamplingParams(**params), num_prompt_tokens=num_prompt_tokens, max_length=max_length, tokenizer=tokenizer
    )


def ids(*values):
    return np.array(values, dtype=np.int32)


def tokens(tokenizer, *names):
    found = tokenizer.convert_tokens_to_ids(list(names))
    assert None not in found
    return np.array(found, dtype=np.int32)


def plain_cut(criteria, token_ids, new_ids):
    """What plain decoding with transformers' criteria keeps: ask after every single token."""
    for index in range(len(new_ids)):
        seen = torch.from_numpy(np.concatenate([token_ids, new_ids[: index + 1]]).astype(np.int64))[None]
        if bool(StoppingCriteriaList(criteria)(seen, None)):
            return index + 1, True
    return len(new_ids), False


# ---- end-of-sequence ids and lengths ------------------------------------------------------------------------------


def test_without_any_rule_everything_is_kept():
    assert checker().cut(ids(1), [2, 3, 4]) == (3, None)
    assert checker().cut(ids(1), []) == (0, None)


@pytest.mark.parametrize("as_array", [False, True])
def test_the_first_of_several_end_ids_ends_the_output_and_is_kept(as_array):
    new = ids(5, 8, 9, 7) if as_array else [5, 8, 9, 7]
    assert checker(stop_token_ids=(9, 8)).cut(ids(8, 9), new) == (2, "stop")


def test_end_ids_in_the_committed_tokens_do_not_fire():
    assert checker(stop_token_ids=(9,)).cut(ids(9, 9), [5]) == (1, None)


def test_max_new_tokens_cuts_inside_a_block():
    rule = checker(num_prompt_tokens=3, max_new_tokens=4)
    assert rule.cut(ids(1, 1, 1), [2, 2, 2]) == (3, None)
    assert rule.cut(ids(1, 1, 1, 2), [2, 2, 2]) == (3, "length")
    assert rule.cut(ids(1, 1, 1, 2, 2), [2, 2, 2]) == (2, "length")
    assert rule.cut(ids(1, 1, 1, 2, 2, 2, 2), [2]) == (0, "length")


def test_max_length_counts_prompt_and_output():
    assert checker(num_prompt_tokens=3, max_length=5).cut(ids(1, 1, 1), [2, 2, 2]) == (2, "length")


def test_an_end_id_at_the_last_allowed_token_is_a_stop_and_behind_it_is_not_seen():
    rule = checker(num_prompt_tokens=1, max_new_tokens=2, stop_token_ids=(9,))
    assert rule.cut(ids(1), [5, 9]) == (2, "stop")
    assert rule.cut(ids(1), [5, 5, 9]) == (2, "length")


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(RequestError, match="it has 5 tokens and the maximal length is 5"):
        checker(num_prompt_tokens=5, max_length=5)


@settings(max_examples=60)
@given(
    new=st.lists(st.integers(0, 5), max_size=12),
    eos=st.lists(st.integers(0, 5), max_size=2),
    prompt=st.integers(1, 4),
    output=st.integers(0, 3),
    budget=st.integers(1, 9),
)
def test_ends_and_lengths_agree_with_transformers_after_every_token(new, eos, prompt, output, budget):
    committed = np.zeros(prompt + min(output, budget - 1), dtype=np.int32)
    criteria = [MaxLengthCriteria(prompt + budget), EosTokenCriteria(torch.tensor(eos, dtype=torch.long))]
    kept, ended = plain_cut(criteria, committed, np.array(new, dtype=np.int32))
    got, reason = checker(num_prompt_tokens=prompt, max_new_tokens=budget, stop_token_ids=tuple(eos)).cut(
        committed, new
    )
    assert (got, reason is not None) == (kept, ended)


# ---- stop strings -------------------------------------------------------------------------------------------------


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(RequestError, match=r"stop_strings need the model's tokenizer, got \('x',\)"):
        checker(stop_strings=("x",))


@pytest.mark.parametrize(
    "names",
    [["st", "op"], ["stop"], ["st", "op", "er"], ["s", "to", "pp"], ["las", "top"], ["las", "t", "o", "pp", "er"]],
)
def test_a_stop_string_is_found_across_token_boundaries(names):
    tokenizer = TOKENIZERS["byte_level"]
    names = [name for part in names for name in ([part] if part in tokenizer.get_vocab() else list(part))]
    new = tokens(tokenizer, "a", *names, "a", "a")
    expected = next(count for count in range(len(new)) if "stop" in tokenizer.decode(new[:count]))
    assert checker(stop_strings=("stop",), tokenizer=tokenizer).cut(ids(3), new) == (expected, "stop")


def test_a_token_with_the_stop_string_in_its_middle_fires():
    tokenizer = TOKENIZERS["byte_level"]
    new = tokens(tokenizer, "a", "ĠxĠstopperĠ", "a")
    assert checker(stop_strings=("stop",), tokenizer=tokenizer).cut(ids(3), new) == (2, "stop")


def test_an_added_token_with_spaces_holds_its_own_text():
    tokenizer = TOKENIZERS["byte_level"]
    new = tokens(tokenizer, "a", "<a stop b>", "a")
    assert checker(stop_strings=(" stop ",), tokenizer=tokenizer).cut(ids(3), new) == (2, "stop")


def test_a_stop_string_that_the_prompt_already_holds_does_not_fire_but_one_that_begins_there_does():
    tokenizer = TOKENIZERS["byte_level"]
    rule = checker(num_prompt_tokens=2, stop_strings=("stop", "xyz"), tokenizer=tokenizer)
    assert rule.cut(tokens(tokenizer, "a", "stop"), tokens(tokenizer, "a", "b")) == (2, None)
    assert rule.cut(tokens(tokenizer, "x", "st"), tokens(tokenizer, "op", "b")) == (1, "stop")


def test_a_short_stop_string_in_the_tail_kept_for_a_longer_one_does_not_fire_again():
    tokenizer = TOKENIZERS["byte_level"]
    rule = checker(num_prompt_tokens=1, stop_strings=("b", "a much longer string"), tokenizer=tokenizer)
    assert rule.cut(tokens(tokenizer, "a", "b"), tokens(tokenizer, "c", "a")) == (2, None)


def test_a_character_split_over_tokens_completes_a_stop_string():
    tokenizer = TOKENIZERS["byte_level"]
    new = tokens(tokenizer, "a", "âĤ", "¬!", "a")  # the three bytes of the euro sign, two and one
    assert tokenizer.decode(new[1:3]) == "€!"
    assert checker(stop_strings=("€",), tokenizer=tokenizer).cut(ids(3), new) == (3, "stop")
    assert checker(stop_strings=("€a",), tokenizer=tokenizer).cut(ids(3), new) == (4, None)


def test_bytes_of_a_fallback_vocabulary_complete_a_stop_string():
    tokenizer = TOKENIZERS["byte_fallback"]
    new = tokens(tokenizer, "a", "<0xE2>", "<0x82>", "<0xAC>", "a")
    assert checker(stop_strings=("€",), tokenizer=tokenizer).cut(ids(3), new) == (4, "stop")


def test_the_leading_space_of_a_metaspace_token_counts():
    tokenizer = TOKENIZERS["metaspace"]
    rule = checker(stop_strings=("e st",), tokenizer=tokenizer)
    assert rule.cut(ids(3), tokens(tokenizer, "▁the", "▁stop", "a")) == (2, "stop")
    assert rule.cut(ids(3), tokens(tokenizer, "▁the", "stop", "a")) == (3, None)


def test_ids_without_a_token_have_no_text_and_break_matches():
    tokenizer = TOKENIZERS["byte_level"]
    outside = len(tokenizer) + 50
    new = [*tokens(tokenizer, "st"), outside, *tokens(tokenizer, "op", "stop")]
    assert checker(stop_strings=("stop",), tokenizer=tokenizer).cut(ids(3), new) == (4, "stop")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40)
@given(data=st.data())
def test_stop_strings_agree_with_transformers_after_every_token(name, data):
    tokenizer = TOKENIZERS[name]
    vocab = sorted(tokenizer.get_vocab().values())
    likely = [tokenizer.get_vocab()[token] for token in tokenizer.get_vocab() if "st" in token or "op" in token]
    likely += [tokenizer.get_vocab()[token] for token in "stopaer" if token in tokenizer.get_vocab()]
    one = st.one_of(st.sampled_from(likely), st.sampled_from(vocab))
    committed = np.array(data.draw(st.lists(one, min_size=1, max_size=6)), dtype=np.int32)
    new = np.array(data.draw(st.lists(one, max_size=8)), dtype=np.int32)
    stops = data.draw(
        st.lists(st.sampled_from(["stop", "st", "o", " stop", "ters", "stopst", "é", "s t"]), min_size=1, max_size=2)
    )
    try:
        criterion = StopStringCriteria(tokenizer, stops)
    except ValueError:  # transformers refuses strings that no token of the vocabulary can end
        assume(False)
    kept, ended = plain_cut([criterion], committed, new)
    rule = checker(num_prompt_tokens=len(committed), stop_strings=tuple(stops), tokenizer=tokenizer)
    assert rule.cut(committed, new) == (kept, "stop" if ended else None)


@settings(max_examples=30)
@given(data=st.data())
def test_the_verdict_does_not_depend_on_how_tokens_are_grouped_into_blocks(data):
    tokenizer = TOKENIZERS["byte_level"]
    likely = tokens(tokenizer, "st", "op", "s", "t", "o", "p", "a", "âĤ", "¬!").tolist()
    new = data.draw(st.lists(st.sampled_from(likely), min_size=1, max_size=16))
    rule = checker(stop_strings=("stop", "€"), tokenizer=tokenizer, max_new_tokens=12)
    kept_at_once, reason_at_once = rule.cut(ids(3), new)
    sequence, reason = [3], None
    rest = list(new)
    while rest and reason is None:
        size = data.draw(st.integers(1, 4))
        kept, reason = rule.cut(np.array(sequence, dtype=np.int32), rest[:size])
        sequence += rest[:kept]
        rest = rest[size:]
    assert (len(sequence) - 1, reason) == (kept_at_once, reason_at_once)


def test_only_the_last_few_tokens_of_a_long_context_are_decoded():
    tokenizer = TOKENIZERS["byte_level"]
    rule = checker(num_prompt_tokens=1, stop_strings=("stop",), tokenizer=tokenizer)
    rule.cut(np.arange(200, dtype=np.int32), [100])
    assert len(rule._strings._pieces) <= len("stop")


# ---- the user's own criteria --------------------------------------------------------------------------------------


class StopAfter(StoppingCriteria):
    """Fires when a token was seen ``count`` times; notes every call."""

    def __init__(self, token, count):
        self.token, self.count, self.calls = token, count, []

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        assert input_ids.dtype == torch.int64
        self.calls.append(input_ids.shape)
        return (input_ids == self.token).sum(dim=-1) >= self.count


def test_a_user_criterion_is_asked_once_after_every_token_up_to_the_first_stop():
    criterion = StopAfter(7, 2)
    rule = checker(stopping_criteria=(criterion,))
    assert rule.cut(ids(7, 1), [2, 3, 7, 4]) == (3, "stop")
    assert criterion.calls == [(1, 3), (1, 4), (1, 5)]


def test_a_user_criterion_also_sees_the_token_at_which_another_rule_fires():
    criterion = StopAfter(7, 99)
    assert checker(stopping_criteria=(criterion,), stop_token_ids=(3,)).cut(ids(1), [2, 3, 4]) == (2, "stop")
    assert criterion.calls == [(1, 2), (1, 3)]


def test_a_criterion_may_return_a_bool_and_a_list_of_criteria_is_unpacked():
    rule = checker(stopping_criteria=(StoppingCriteriaList([lambda input_ids, scores: input_ids.shape[1] > 3]),))
    assert rule.cut(ids(1), [2, 3, 4, 5]) == (3, "stop")


def test_the_length_goes_before_a_criterion_that_would_fire_later():
    rule = checker(stopping_criteria=(StopAfter(7, 1),), max_new_tokens=2)
    assert rule.cut(ids(1), [2, 3, 7]) == (2, "length")


def test_the_length_and_end_criteria_of_transformers_become_the_built_in_rules():
    rule = checker(stopping_criteria=(MaxLengthCriteria(4), EosTokenCriteria([9])))
    assert rule.cut(ids(1), [2, 3, 4, 5]) == (3, "length")
    assert rule.cut(ids(1), [2, 9, 4, 5]) == (2, "stop")
    assert rule._criteria == ()
    # It is asked after a token was written, so one token comes out even if the prompt is already longer.
    assert checker(num_prompt_tokens=3, stopping_criteria=(MaxLengthCriteria(2),)).cut(ids(1, 1, 1), [5, 5]) == (
        1,
        "length",
    )


def test_a_criterion_that_needs_scores_is_refused():
    with pytest.raises(UnsupportedError, match="ConfidenceCriteria needs the scores"):
        checker(stopping_criteria=(ConfidenceCriteria(0.4),))


def test_what_is_not_a_criterion_is_refused():
    with pytest.raises(RequestError, match="stopping_criteria must be callables"):
        checker(stopping_criteria=(3,))
    with pytest.raises(RequestError, match="must return one bool for one sequence"):
        checker(stopping_criteria=(lambda input_ids, scores: torch.tensor([True, False]),)).cut(ids(1), [2])
