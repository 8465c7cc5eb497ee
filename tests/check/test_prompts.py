from __future__ import annotations

from pathlib import Path

import pytest

from specdec.check.prompts import BUILTIN_PROMPTS, encode, read_prompts
from specdec.errors import ConfigError, LoadError
from tests.tiny_models import byte_tokenizer


def test_built_in_prompts_are_of_several_kinds_and_lengths():
    assert len(BUILTIN_PROMPTS) >= 8
    assert len({len(text) for text in BUILTIN_PROMPTS.values()}) >= 8


def test_json_lines_hold_strings_or_objects(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one"\n\n{"prompt": "two", "id": 7}\n')
    assert read_prompts(file) == {"line 1": "one", "line 3": "two"}


def test_three_dashes_separate_the_prompts_of_a_text(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("first\nwith two lines\n---\n\n---\n  second\n")
    assert read_prompts(file) == {"prompt 1": "first\nwith two lines", "prompt 3": "  second"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1 must be JSON"),
        ("a.jsonl", '"x"\n{"text": "two"}', 'line 2 must be a string or an object with a string "prompt"'),
        ("a.jsonl", "\n", "must hold at least one"),
        ("a.txt", "---\n", "must hold at least one"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(LoadError, match=r"cannot read the prompts in .*nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")


def test_long_prompts_are_cut_and_foreign_ones_left_out_with_a_note():
    tokenizer = byte_tokenizer()
    prompts, notes = encode({"long": "abcdef", "empty": ""}, tokenizer, vocab_size=257, max_tokens=4)
    assert [prompt.name for prompt in prompts] == ["long"]
    assert tokenizer.decode(prompts[0].token_ids) == "cdef"
    assert len(notes) == 2
    assert "cut to its last 4 of 6 tokens" in notes[0]
    assert "'empty' is left out" in notes[1]


def test_no_usable_prompt_is_an_error():
    with pytest.raises(ConfigError, match="at least one prompt must be usable"):
        encode({"é": "é"}, byte_tokenizer(), vocab_size=100, max_tokens=9)
