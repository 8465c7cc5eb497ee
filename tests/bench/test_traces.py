from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from specdec.bench.traces import episode_half, read_calls, tokenize_calls
from specdec.errors import LoadError

POOL = {
    "trace": "t1",
    "pool": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": ""},
    ],
    "calls": [
        {"turn": 0, "prompt": [[0, 2]], "response": 2},
        {"turn": 1, "prompt": [[0, 1], [2, 4]], "response": 4},
    ],
}
CALL = {"trace": "t2", "messages": [{"role": "user", "content": "hi"}], "response": "hello"}
PLAIN = {"prompt": [1, 2, 3], "response": [4, 5]}


def encode(text: str) -> list[int]:
    return list(text.encode())


def write(path, *records):
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["calls.jsonl", "calls.jsonl.gz"])
def test_the_three_forms_are_told_apart_line_by_line(tmp_path, name):
    calls = list(read_calls(write(tmp_path / name, POOL, CALL, PLAIN)))
    assert [call.trace for call in calls] == ["t1", "t1", "t2", ""]
    assert calls[1].parts == ("<|system|>\nbe brief\n", "<|assistant|>\nhello\n", "<|user|>\nbye\n")
    assert calls[3].parts == ((1, 2, 3),)


def test_calls_become_tokens_and_empty_answers_are_left_out(tmp_path):
    found = list(tokenize_calls(read_calls(write(tmp_path / "a.jsonl", POOL, PLAIN)), encode, max_prompt=6))
    assert len(found) == 2
    assert found[0].prompt_ids.tolist() == encode("er|>\nhi\n")[-6:]
    assert found[1].prompt_ids.tolist() == [1, 2, 3]
    assert found[1].response_ids.dtype == np.int32


def test_malformed_lines_are_an_error_or_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", PLAIN, "{broken", {"prompt": 3, "response": "x"}, {"nothing": 1}, CALL)
    with pytest.raises(LoadError, match="line 2"):
        list(read_calls(path))
    skipped: list[str] = []
    assert len(list(read_calls(path, skipped=skipped))) == 2
    assert [note.split(":")[0] for note in skipped] == ["line 2", "line 3", "line 4"]


def test_a_truncated_or_missing_file_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", *[POOL] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LoadError, match="is damaged"):
        list(read_calls(path))
    with pytest.raises(LoadError, match="no trace file"):
        list(read_calls(tmp_path / "none.jsonl"))


def test_episodes_fall_into_two_fixed_halves():
    halves = [episode_half(f"episode {n}") for n in range(200)]
    assert 70 < sum(halves) < 130
    assert halves == [episode_half(f"episode {n}") for n in range(200)]
