"""What surrounds a candidate: does its match go on behind the first mismatch, and how far back does it lie.

A short match that is the rest of a long one, broken by a single changed token, is the mark of an edited copy: such a
candidate is right far more often than its match length says. That shows only if the comparison goes on behind the
mismatch.
"""

from __future__ import annotations

from specdec.suffix_tree._layout import (
    GROUPS,
    PAGE_MASK,
    R_INDEX,
    R_LENGTH,
    R_SHARED,
    R_TOKENS,
    X_PAGE_PREV,
    X_TOKENS,
)
from specdec.suffix_tree.memory import Int32Array, Int64Array, int32_at, int64_at, kernel
from specdec.suffix_tree.paged import position_before

__all__ = ["BEYONDS", "DISTANCES", "UNKNOWN", "survey"]

UNKNOWN = -1  # the bucket of a candidate that was not looked at yet
BEYONDS = 6  # buckets of the match behind the first mismatch
DISTANCES = 8  # buckets of the distance within the request's own text
_LONG = 32  # a match of so many tokens needs no second one
_ENOUGH = 16  # tokens compared behind the mismatch
_NEAR = 32  # tokens: the first distance; each further bucket reaches four times as far


@kernel
def _bucket(length: int) -> int:
    if length < 4:
        return 0 if length == 0 else 1
    return 2 if length < 8 else (3 if length < _ENOUGH else 4)


@kernel
def _beyond_own(tokens: Int32Array, position: int, last: int, length: int) -> int:
    if length >= _LONG:
        return BEYONDS - 1
    skipped = length + 1
    more = 0
    while (
        position - skipped - more > 0
        and more < _ENOUGH
        and (tokens[position - skipped - more] == tokens[last - skipped - more])
    ):
        more += 1
    return _bucket(more)


@kernel
def _beyond_cached(x: Int64Array, position: int, tokens: Int32Array, last: int, length: int) -> int:
    if length >= _LONG:
        return BEYONDS - 1
    cached = int32_at(x[X_TOKENS])
    page_prev = int32_at(x[X_PAGE_PREV])
    skipped = length + 1
    if (position & PAGE_MASK) >= skipped:
        position -= skipped
    else:
        for _ in range(skipped):
            position = position_before(position, page_prev)
    more = 0
    while (
        position > 0
        and last - skipped - more > 0
        and more < _ENOUGH
        and (cached[position] == tokens[last - skipped - more])
    ):
        more += 1
        position = position_before(position, page_prev)
    return _bucket(more)


@kernel
def _distance(num_tokens: int) -> int:
    bucket = 0
    limit = _NEAR
    while num_tokens > limit and bucket < DISTANCES - 1:
        bucket += 1
        limit *= 4
    return bucket


@kernel
def survey(row: Int64Array, c: Int32Array, i: int) -> None:
    """Write the buckets of candidate i: of its match behind the first mismatch and of its distance.

    Args:
        row: the request.
        c: rows of GROUPS int32: position, match length and source are read, the fifth and sixth row are written.
        i: the candidate. Few candidates are ever the best of their token, so only these are looked at.
    """
    tokens = int32_at(row[R_TOKENS])
    last = row[R_LENGTH] - 1
    position = c[i]
    length = c[GROUPS + i]
    source = c[2 * GROUPS + i]
    if source == 0:
        c[4 * GROUPS + i] = _beyond_own(tokens, position, last, length)
        c[5 * GROUPS + i] = _distance(last - position)
    else:
        x = int64_at(row[R_INDEX] if source == 1 else row[R_SHARED])
        c[4 * GROUPS + i] = _beyond_cached(x, position, tokens, last, length)
        c[5 * GROUPS + i] = 0  # responses lie in no order
