from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.bench.tiny_data import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    Mixture,
    RowStream,
    load_corpus,
    train_tokenizer,
)
from specdec.errors import ConfigError, LoadError

FUNCTION = '''def area_of_{i}(width, height, scale=1):
    """Return the area number {i}."""
    total = width * height
    if scale != 1:
        total = total * scale
    return total + {i}


'''


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("src")
    for index in range(60):
        (root / f"part{index}.py").write_text("".join(FUNCTION.format(i=index * 10 + k) for k in range(5)))
    prose = root / "prose.txt.gz"
    prose.write_bytes(gzip.compress(b"A plain sentence about nothing much.\n" * 50))
    return load_corpus(root, prose)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(iter(corpus.files), 400)


def test_special_tokens_have_the_ids_that_the_data_uses(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(5))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, PAD)


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_any_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not any(token in text for token in SPECIAL_TOKENS):
        assert tokenizer.decode(ids) == text


def test_rows_depend_on_seed_and_step_only(corpus, tokenizer):
    first, second = (RowStream(corpus, tokenizer, seed=1) for _ in range(2))
    second.rows(0, 2, 64, Mixture())
    np.testing.assert_array_equal(first.rows(5, 2, 256, Mixture())[0], second.rows(5, 2, 256, Mixture())[0])
    assert (first.rows(5, 2, 256, Mixture())[0] != first.rows(6, 2, 256, Mixture())[0]).any()


def test_rows_are_full_and_weights_follow_the_mixture(corpus, tokenizer):
    mixture = Mixture(edit=1, plain=0, prose=0, drill=0, prompt_weight=0.25, answer_weight=1.0)
    ids, weights = RowStream(corpus, tokenizer, seed=0).rows(0, 4, 512, mixture)
    assert ids.shape == weights.shape == (4, 512)
    assert not (ids == PAD).any()
    for row, row_weights in zip(ids.tolist(), weights.tolist(), strict=True):
        start = row.index(ASSISTANT)
        assert set(row_weights[: start + 1]) == {0.25}
        assert set(row_weights[start + 1 : row.index(EOS) + 1]) == {1.0}


def test_a_drill_repeats_its_span_and_teaches_only_the_second_time(corpus, tokenizer):
    drill = Mixture(edit=0, plain=0, prose=0, drill=1, prompt_weight=0.5)
    ids, weights = RowStream(corpus, tokenizer, seed=0).rows(0, 1, 200, drill)
    row, row_weights = ids[0].tolist(), weights[0].tolist()
    middle, end = row.index(ASSISTANT), row.index(EOS)
    assert row[2:middle] == row[middle + 1 : end]
    assert row_weights[2] == 0.0
    assert row_weights[middle + 1] == 1.0


def test_plain_rows_hold_no_chat_tokens(corpus, tokenizer):
    ids, _ = RowStream(corpus, tokenizer, seed=0).rows(0, 4, 128, Mixture(edit=0, plain=1, prose=1, drill=0))
    assert ASSISTANT not in ids


def test_the_chat_template_matches_the_training_rows(tokenizer):
    messages = [{"role": "user", "content": "Do it."}, {"role": "assistant", "content": "Done."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|bos|><|user|>Do it.<|assistant|>Done.<|eos|>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|user|>Do it.<|assistant|>"


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="mixture shares must be >= 0 and not all 0"):
        Mixture(edit=0, plain=0, prose=0, drill=0)


def test_sources_without_functions_and_unreadable_prose_are_named(tmp_path):
    (tmp_path / "x.py").write_text("x = 1\n")
    with pytest.raises(LoadError, match="no Python functions or classes below"):
        load_corpus(tmp_path, None)
    (tmp_path / "part1.py").write_text(FUNCTION.format(i=1))
    (tmp_path / "plain.gz").write_text("not gzip")
    with pytest.raises(LoadError, match="prose must be a gzip file"):
        load_corpus(tmp_path, tmp_path / "plain.gz")
