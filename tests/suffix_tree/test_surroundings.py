"""What is told about candidates, against plain lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.suffix_tree import _layout as at
from specdec.suffix_tree.cache import SuffixCache
from specdec.suffix_tree.matching import find_candidates
from specdec.suffix_tree.surroundings import survey

texts = st.lists(st.integers(0, 2), min_size=2, max_size=70)


def naive_match(text: list[int], end: int, own: list[int], last: int) -> int:
    length = 0
    while length <= min(end, last) and text[end - length] == own[last - length]:
        length += 1
    return length


def naive_bucket(length: int) -> int:
    return sum(length >= edge for edge in (1, 4, 8, 16))


@settings(max_examples=60, deadline=None)
@given(own=texts, cached=texts)
def test_the_match_behind_the_first_mismatch_is_the_longest_there(own: list[int], cached: list[int]):
    cache = SuffixCache(max_bytes=1 << 17)
    cache.insert("earlier", cached)
    cache.start("r", own, caching=False)
    live = cache._live["r"]
    c = np.zeros(at.CANDIDATE_ROWS * at.GROUPS, np.int32)
    count = find_candidates(cache._table.rows[live.slot], c)
    for i in range(count):
        survey(cache._table.rows[live.slot], c, i)
    rows = c.reshape(at.CANDIDATE_ROWS, at.GROUPS)[:, :count]
    tokens = dict(cache.index("").arrays())["tokens"].tolist()
    for position, length, source, _, beyond, distance in rows.T.tolist():
        # Both number their positions from 1; page 0 of the index is never used.
        text, end = (own, position - 1) if source == 0 else (tokens[64:], position - 64)
        exact = naive_match(text, end, own, len(own) - 1)
        assert length == min(exact, at.MAX_MATCH)
        if exact >= 32:
            assert beyond == 5
        else:
            more = naive_match(text, end - exact - 1, own, len(own) - exact - 2)
            assert beyond == naive_bucket(more)
        assert distance == (0 if source == 1 or len(own) - position <= 32 else 1)
