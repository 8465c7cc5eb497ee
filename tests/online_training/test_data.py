"""Examples: what a file may hold, which texts share a batch, and in what order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from specdec.errors import ConfigError, LoadError
from specdec.online_training.data import BatchOrder, Example, collate, frequent_ids, read_examples
from specdec.online_training.regenerate import read_prompts
from tests.tiny_models import byte_tokenizer


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_ids_texts_and_messages_are_read(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    file = write(
        tmp_path / "a.jsonl",
        {"token_ids": [5, 6, 7], "prompt_length": 1},
        {"prompt": "ab", "response": "cd"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"token_ids": list(range(12)), "prompt_length": 10},  # cut: nothing of the answer is left
    )
    first, second, third = read_examples([file], max_length=10, vocab_size=257, tokenizer=tokenizer)
    assert (first.token_ids.tolist(), first.prompt_length) == ([5, 6, 7], 1)
    assert (tokenizer.decode(second.token_ids), second.prompt_length) == ("abcd", 2)
    assert (tokenizer.decode(third.token_ids), third.prompt_length) == ("<u>hi<a>yo", 8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1"),
        ({"token_ids": [1, 300], "prompt_length": 1}, r"\[0, 257\)"),
        ({"token_ids": [1, 2], "prompt_length": 3}, "prompt_length must be in 1..2, got 3"),
        ({"prompt": "a", "response": "b"}, "tokenizer"),
        ({"text": "a"}, "must hold token_ids"),
        ([1], "must hold an object, got list"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: object, message: str):
    tokenizer = byte_tokenizer() if row == {"text": "a"} else None
    with pytest.raises(LoadError, match=message):
        read_examples([write(tmp_path / "a.jsonl", row)], max_length=8, vocab_size=257, tokenizer=tokenizer)


def test_every_epoch_has_every_example_once_in_batches_that_fit_and_any_batch_can_be_asked_for():
    lengths = np.random.default_rng(0).integers(3, 60, 101).tolist()
    order = BatchOrder(lengths, tokens_per_batch=128, seed=3)
    per_epoch = order.count(1)
    epochs = []
    for first, end in ((0, per_epoch), (per_epoch, order.count(2))):
        batches = [order.at(index) for index in range(first, end)]
        assert sorted(i for batch in batches for i in batch) == list(range(101))
        assert all(max(lengths[i] for i in batch) * len(batch) <= 128 for batch in batches)
        epochs.append(batches)
    assert epochs[0] != epochs[1]
    assert BatchOrder(lengths, tokens_per_batch=128, seed=3).at(per_epoch + 2) == epochs[1][2]
    assert order.at(0) == epochs[0][0]  # going back
    with pytest.raises(ConfigError, match="need examples"):
        BatchOrder([], tokens_per_batch=8, seed=0)


def test_a_batch_counts_answers_only_and_pads_on_the_right():
    batch = collate([Example(np.array([4, 5, 6], np.int32), 1), Example(np.array([7, 8], np.int32), 1)])
    assert batch.token_ids.tolist() == [[4, 5, 6], [7, 8, 0]]
    assert batch.weights.tolist() == [[0, 1, 1], [0, 1, 0]]


def test_a_draft_vocabulary_holds_the_most_frequent_tokens_of_the_answers():
    example = Example(np.array([9, 9, 9, 3, 3, 5, 5, 1], np.int32), 3)
    ids = frequent_ids([example], 2, 10)
    assert ids is not None
    assert ids.tolist() == [3, 5]
    assert frequent_ids([example], 10, 10) is None


def test_prompts_are_read_and_a_wrong_one_is_named(tmp_path: Path):
    file = write(tmp_path / "p.jsonl", {"prompt_ids": [1, 2]}, {"prompt": "ab"})
    assert [ids.tolist() for ids in read_prompts(file, byte_tokenizer())][0] == [1, 2]
    with pytest.raises(LoadError, match="prompt 1"):
        read_prompts(write(tmp_path / "q.jsonl", {"text": "a"}), byte_tokenizer())
