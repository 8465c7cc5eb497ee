"""Arrival traces: each published layout by hand, and what is broken in them."""

from __future__ import annotations

import gzip

import pytest

from specdec.bench.arrivals import Arrival, read_arrivals
from specdec.bench.loaders.streams import Skips
from specdec.errors import LoadError

LAYOUTS = {
    "own.csv": "timestamp_s,prompt_tokens,response_tokens,session_id,cached_prompt_tokens\n"
    "5.0,10,3,s1,\n7.5,20,4,s1,12\n",
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,10,3\n2023-11-16 18:15:49.1805900,20,4\n",
    "burst.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,10,3,13,Conversation log\n7.5,GPT-4,20,4,24,API log\n",
    "mooncake.jsonl": '{"timestamp": 0, "input_length": 10, "output_length": 3, "hash_ids": [0, 1]}\n'
    '{"timestamp": 2500, "input_length": 20, "output_length": 4, "hash_ids": [0, 2]}\n',
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_gives_seconds_from_the_first_request(tmp_path, name):
    file = tmp_path / f"{name}.gz"
    file.write_bytes(gzip.compress(LAYOUTS[name].encode()))
    session = "s1" if name == "own.csv" else ""
    assert list(read_arrivals(file)) == [Arrival(0.0, 10, 3, session), Arrival(2.5, 20, 4, session)]


@pytest.mark.parametrize(
    ("name", "row"), [("own.csv", "x,1,2,,\n"), ("own.csv", "1,-5,2,,\n"), ("azure.csv", "noon,1,2\n"),
                      ("burst.csv", "3,GPT-4\n"), ("mooncake.jsonl", "{broken\n")],
)  # fmt: skip
def test_a_faulty_row_is_counted_or_one_clear_error(tmp_path, name, row):
    file = tmp_path / name
    file.write_text(LAYOUTS[name] + row + LAYOUTS[name].splitlines()[-1] + "\n")
    skips = Skips()
    assert len(list(read_arrivals(file, skips=skips))) == 3
    assert dict(skips.counts) == {"malformed row": 1}
    with pytest.raises(LoadError, match=f"{name}, row 3: malformed row"):
        list(read_arrivals(file))


def test_unknown_columns_are_named(tmp_path):
    file = tmp_path / "other.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(LoadError, match=r"unknown arrival columns \['a', 'b'\]"):
        list(read_arrivals(file, skips=Skips()))
