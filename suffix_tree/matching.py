"""Finding where the present context occurred before.

Candidates are earlier positions whose text agrees with the request's last tokens, longest contexts first, newest
first. Three sources are searched: the request's own text, the tenant's earlier responses, and the shared tier.

A match grows by no more than the tokens that were appended. Where the longest match of the last search was short,
longer contexts are therefore not searched at all. (Another request may have brought a longer one meanwhile: contexts of
one and two tokens are always searched, and what they find reaches as far as it goes.)

The longest match is also followed incrementally: a *pin* is the position that the best earlier match has reached, and
each appended token either advances it or drops it. So a match is never lost to a bounded walk, however long it is or
however many newer occurrences of its last tokens there are.
"""

from __future__ import annotations

import numpy as np

from specdec.suffix_tree._layout import (
    ENOUGH_CANDIDATES,
    GROUPS,
    MAX_CANDIDATES,
    MAX_MATCH,
    MAX_WALK,
    NUM_ORDERS,
    PAGE_BITS,
    R_BEST_LENGTH,
    R_CHAINED,
    R_HASH,
    R_INDEX,
    R_LENGTH,
    R_LINKS,
    R_PIN,
    R_PIN_CACHED,
    R_PIN_CACHED_LENGTH,
    R_PIN_EPOCH,
    R_PIN_LENGTH,
    R_REACH,
    R_REACH_CACHED,
    R_SEQUENCE,
    R_SHARED,
    R_TOKENS,
    SHORT_WALK,
    X_BUCKET_MASK,
    X_HEADS,
    X_LAST_USED,
    X_LINKS,
    X_NUM_BUCKETS,
    X_NUM_RECYCLED,
    X_PAGE_NEXT,
    X_PAGE_OWNER,
    X_PAGE_PREV,
    X_TICK,
    X_TOKENS,
)
from specdec.suffix_tree.memory import Int32Array, Int64Array, int32_at, int64_at, kernel, prefetch
from specdec.suffix_tree.paged import bucket_key, bucket_of, first_hash, order_of, position_after, position_before
from specdec.suffix_tree.surroundings import UNKNOWN

__all__ = ["advance_pins", "find_candidates", "prefetch_chains"]

_FAR = 1 << 30  # longer than any match


@kernel
def _own_match(tokens: Int32Array, position: int, last: int) -> int:
    """How many tokens before and at ``position`` equal those before and at ``last``, at most MAX_MATCH."""
    length = 0
    limit = min(MAX_MATCH, position)
    while length < limit and tokens[position - length] == tokens[last - length]:
        length += 1
    return length


@kernel
def _cached_match(cached: Int32Array, page_prev: Int32Array, position: int, tokens: Int32Array, last: int) -> int:
    """The same for a position of an index."""
    length = 0
    limit = min(MAX_MATCH, last)
    while length < limit and position > 0 and cached[position] == tokens[last - length]:
        length += 1
        position = position_before(position, page_prev)
    return length


@kernel
def advance_pins(row: Int64Array, new: Int32Array, start: int, stop: int) -> None:
    """Follow the longest matches over ``new[start:stop]``, before these tokens are appended."""
    row[R_REACH] += stop - start
    row[R_REACH_CACHED] += stop - start
    pin = row[R_PIN]
    tokens = int32_at(row[R_TOKENS])
    i = start
    while pin > 0 and i < stop:
        # The match may run into the tokens that are being appended: they lie at R_LENGTH and beyond.
        ahead = pin + 1 - row[R_LENGTH]
        following = tokens[pin + 1] if ahead < 0 else new[start + ahead]
        pin = pin + 1 if following == new[i] else 0
        i += 1
    row[R_PIN] = pin
    row[R_PIN_LENGTH] = row[R_PIN_LENGTH] + stop - start if pin > 0 else 0
    pin = row[R_PIN_CACHED]
    x = int64_at(row[R_INDEX])
    if pin > 0 and row[R_PIN_EPOCH] == x[X_NUM_RECYCLED]:
        cached = int32_at(x[X_TOKENS])
        page_next = int32_at(x[X_PAGE_NEXT])
        i = start
        while pin > 0 and i < stop:
            pin = position_after(pin, page_next)
            if cached[pin] != new[i]:
                pin = 0
            i += 1
        row[R_PIN_CACHED] = pin
        row[R_PIN_CACHED_LENGTH] = row[R_PIN_CACHED_LENGTH] + stop - start if pin > 0 else 0
    else:
        row[R_PIN_CACHED] = 0


@kernel
def _add(c: Int32Array, count: int, position: int, length: int, source: int, rank: int) -> int:
    """Note a candidate in ``c``, row by row."""
    c[count] = position
    c[GROUPS + count] = length
    c[2 * GROUPS + count] = source
    c[3 * GROUPS + count] = rank
    c[4 * GROUPS + count] = UNKNOWN
    return count + 1


@kernel
def _find_own(row: Int64Array, c: Int32Array, count: int) -> int:
    tokens = int32_at(row[R_TOKENS])
    links = int32_at(row[R_LINKS])
    last = row[R_LENGTH] - 1
    shorter = _FAR
    rank = 0
    pin = row[R_PIN]
    if pin > 0:
        count = _add(c, count, pin, row[R_PIN_LENGTH], 0, 0)
        rank = 1
    for step in range(NUM_ORDERS):
        k = NUM_ORDERS - 1 - step
        order = order_of(k)
        if order > row[R_REACH]:
            continue
        position = links[last * NUM_ORDERS + k]
        most = MAX_WALK if k > 0 else SHORT_WALK
        walked = 0
        while position > 0 and walked < most and rank < MAX_CANDIDATES:
            walked += 1
            length = _own_match(tokens, position, last)
            if order <= length < shorter and position != pin:
                count = _add(c, count, position, length, 0, rank)
                rank += 1
            position = links[position * NUM_ORDERS + k]
        if rank >= ENOUGH_CANDIDATES:
            break
        shorter = order
    return count


@kernel
def _is_new(c: Int32Array, first: int, count: int, position: int) -> bool:
    for i in range(first, count):  # noqa: SIM110 - numba compiles no generators
        if c[i] == position:
            return False
    return True


@kernel
def _chain_of(row: Int64Array, x: Int64Array, source: int, k: int) -> int:
    """The newest position of the chain of order k that the present context belongs to."""
    if source == 1 and row[R_SEQUENCE] > 0 and row[R_CHAINED] > 0:
        return int(int32_at(x[X_LINKS])[row[R_CHAINED] * NUM_ORDERS + k])  # behind what the request itself wrote last
    value = first_hash(int32_at(row[R_TOKENS])[row[R_LENGTH] - 1]) if k == 0 else np.uint64(row[R_HASH + k - 1])
    return int(int32_at(x[X_HEADS])[bucket_of(bucket_key(value), x[X_NUM_BUCKETS], x[X_BUCKET_MASK]) * NUM_ORDERS + k])


@kernel
def _find_cached(row: Int64Array, x: Int64Array, source: int, c: Int32Array, count: int) -> int:
    tokens = int32_at(row[R_TOKENS])
    last = row[R_LENGTH] - 1
    cached = int32_at(x[X_TOKENS])
    links = int32_at(x[X_LINKS])
    page_next = int32_at(x[X_PAGE_NEXT])
    page_prev = int32_at(x[X_PAGE_PREV])
    owner = int32_at(x[X_PAGE_OWNER])
    own = abs(row[R_SEQUENCE]) if source == 1 else -1
    shorter = _FAR
    rank = 0
    first = count
    pin = row[R_PIN_CACHED] if source == 1 and row[R_PIN_EPOCH] == x[X_NUM_RECYCLED] else 0
    if pin > 0:
        count = _add(c, count, pin, row[R_PIN_CACHED_LENGTH], source, 0)
        rank = 1
    for step in range(NUM_ORDERS):
        k = NUM_ORDERS - 1 - step
        order = order_of(k)
        if order > last or (source == 1 and k > 1 and order > row[R_REACH_CACHED]):
            continue
        position = _chain_of(row, x, source, k)
        most = MAX_WALK if k > 0 else SHORT_WALK
        walked = 0
        while position > 0 and walked < most and rank < MAX_CANDIDATES:
            walked += 1
            # What the request itself wrote is found in its own text already.
            if owner[position >> PAGE_BITS] != own and cached[position_after(position, page_next)] >= 0:
                length = _cached_match(cached, page_prev, position, tokens, last)
                if order <= length < shorter and _is_new(c, first, count, position):
                    count = _add(c, count, position, length, source, rank)
                    rank += 1
            position = links[position * NUM_ORDERS + k]
        if rank >= ENOUGH_CANDIDATES:
            break
        shorter = order
    return count


@kernel
def find_candidates(row: Int64Array, c: Int32Array) -> int:
    """Fill ``c`` with earlier occurrences of the present context and renew the pins.

    Args:
        row: the request.
        c: [CANDIDATE_ROWS * GROUPS] int32 out: rows of position, match length, source, rank (0 = newest of the
            longest order of its source), UNKNOWN until ``survey`` has looked at it.

    Returns:
        How many candidates were found.
    """
    if row[R_LENGTH] < 2:
        return 0
    own = _find_own(row, c, 0)
    count = own
    if row[R_INDEX] != 0:
        count = _find_cached(row, int64_at(row[R_INDEX]), 1, c, count)
    cached = count
    if row[R_SHARED] != 0:
        count = _find_cached(row, int64_at(row[R_SHARED]), 2, c, count)
    row[R_PIN] = 0
    row[R_PIN_CACHED] = 0
    best = 0
    for i in range(own):
        if c[GROUPS + i] > best:
            best = c[GROUPS + i]
            row[R_PIN] = c[i]
    row[R_PIN_LENGTH] = best
    row[R_REACH] = best
    best = 0
    for i in range(own, cached):
        if c[GROUPS + i] > best:
            best = c[GROUPS + i]
            row[R_PIN_CACHED] = c[i]
    row[R_PIN_CACHED_LENGTH] = best
    row[R_REACH_CACHED] = best
    if row[R_PIN_CACHED] > 0:
        x = int64_at(row[R_INDEX])
        row[R_PIN_EPOCH] = x[X_NUM_RECYCLED]
        x[X_TICK] += 1
        int32_at(x[X_LAST_USED])[int32_at(x[X_PAGE_OWNER])[row[R_PIN_CACHED] >> PAGE_BITS]] = x[X_TICK]
    row[R_BEST_LENGTH] = max(row[R_PIN_LENGTH], best)
    return count


@kernel
def prefetch_chains(row: Int64Array) -> None:
    """Ask for the memory where the searches of ``find_candidates`` begin: the first position of each chain."""
    links = int32_at(row[R_LINKS])
    last = row[R_LENGTH] - 1
    x = int64_at(row[R_INDEX])
    chained = row[R_SEQUENCE] > 0 and row[R_CHAINED] > 0
    for k in range(NUM_ORDERS):
        position = np.int64(links[last * NUM_ORDERS + k])
        prefetch(row[R_LINKS] + 4 * NUM_ORDERS * position)
        prefetch(row[R_TOKENS] + 4 * position)
        if chained:
            position = np.int64(_chain_of(row, x, 1, k))
            prefetch(x[X_LINKS] + 4 * NUM_ORDERS * position)
            prefetch(x[X_TOKENS] + 4 * position)
