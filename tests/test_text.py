from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specdec.text import TextStream
from tests.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(max_size=40), st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_pieces_put_together_are_the_whole_text_however_the_tokens_come(text: str, sizes: list[int]):
    ids = TOKENIZER(text)["input_ids"]
    stream, pieces = TextStream(TOKENIZER), []
    begin = 0
    while begin < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.feed(ids[begin : begin + size]))
        begin += size
    assert "".join(pieces) + stream.flush() == text


@given(st.lists(st.integers(0, 256), max_size=30))
def test_any_tokens_give_what_decode_gives(ids: list[int]):
    stream = TextStream(TOKENIZER)
    shown = "".join(stream.feed([token_id]) for token_id in ids) + stream.flush()
    assert shown == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_is_held_back_until_it_is_complete():
    stream = TextStream(TOKENIZER)
    first, second = TOKENIZER("é")["input_ids"]
    assert [stream.feed([first]), stream.feed([second])] == ["", "é"]


def test_flush_gives_what_will_never_be_complete():
    stream = TextStream(TOKENIZER)
    assert stream.feed(TOKENIZER("aé")["input_ids"][:2]) == ""
    assert stream.flush() == "a\ufffd"
    assert stream.flush() == ""


def test_memory_and_work_do_not_grow_with_the_output():
    stream = TextStream(TOKENIZER)
    for _ in range(1000):
        stream.feed(TOKENIZER("word ")["input_ids"])
    assert len(stream._ids) < 10
