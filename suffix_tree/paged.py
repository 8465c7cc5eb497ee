"""Appending to and deleting from the index: paged tokens with hash chains.

A context of each order hashes to a bucket; the bucket's head is the newest position with that context, and every
position links to the one before it (as in LZ77 match finders). Nothing is ever trusted: a match counts only after its
tokens were compared, so collisions, stale links and reused pages cost time, never correctness.

Tokens lie in pages of 64. Responses of concurrent requests grow interleaved, and a deleted one returns whole pages.
Appending a token writes one token and one link per order: constant time, no rebalancing, no rehashing.
"""

from __future__ import annotations

import numpy as np

from specdec.suffix_tree._layout import (
    NUM_ORDERS,
    ORDER_0,
    ORDER_1,
    ORDER_2,
    ORDER_3,
    PAGE_BITS,
    PAGE_MASK,
    PAGE_SIZE,
    R_BUCKET_MASK,
    R_CHAINED,
    R_HASH,
    R_HEADS,
    R_INDEX,
    R_LENGTH,
    R_LINKS,
    R_POSITION,
    R_SEQUENCE,
    R_TOKENS,
    TAIL,
    WIPED,
    X_BUCKET_MASK,
    X_FIRST_PAGE,
    X_FREE,
    X_HEADS,
    X_LAST_USED,
    X_LINKS,
    X_MAX_PAGES,
    X_NUM_BUCKETS,
    X_NUM_FREE,
    X_NUM_PAGES,
    X_NUM_POSITIONS,
    X_NUM_RECYCLED,
    X_PAGE_NEXT,
    X_PAGE_OWNER,
    X_PAGE_PREV,
    X_TICK,
    X_TOKENS,
)
from specdec.suffix_tree.memory import Int32Array, Int64Array, int32_at, int64_at, kernel

__all__ = [
    "append_tokens",
    "begin_cached",
    "bucket_of",
    "context_hash",
    "first_hash",
    "free_pages",
    "order_of",
    "position_after",
    "position_before",
]

_SCALE = np.uint64(0xBF58476D1CE4E5B9)  # odd constants of the splitmix64 finaliser
_BASE = np.uint64(0x9E3779B97F4A7C15)
_FINAL = np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(24)
_BASE_1 = np.uint64(pow(int(_BASE), ORDER_1, 1 << 64))  # weight of the token that leaves a rolling window
_BASE_2 = np.uint64(pow(int(_BASE), ORDER_2, 1 << 64))
_BASE_3 = np.uint64(pow(int(_BASE), ORDER_3, 1 << 64))


@kernel
def order_of(k: int) -> int:
    """Context length of order k."""
    if k == 0:
        return ORDER_0
    if k == 1:
        return ORDER_1
    return ORDER_2 if k == 2 else ORDER_3


@kernel
def position_after(position: int, page_next: Int32Array) -> int:
    """The position that follows in the same response; 0 at its end."""
    if (position & PAGE_MASK) == PAGE_MASK:
        return int(page_next[position >> PAGE_BITS] << PAGE_BITS)
    return position + 1


@kernel
def position_before(position: int, page_prev: Int32Array) -> int:
    """The position that comes before in the same response; 0 at its beginning."""
    if (position & PAGE_MASK) == 0:
        page = page_prev[position >> PAGE_BITS]
        return ((page << PAGE_BITS) | PAGE_MASK) if page > 0 else 0
    return position - 1


@kernel
def bucket_of(value: np.uint64, num_buckets: int, mask: int) -> int:
    """Bucket of a context hash under linear hashing: ``mask`` covers the larger of the two table sizes in use."""
    bucket = np.int64((value * _FINAL) >> _SHIFT) & mask
    return int(bucket if bucket < num_buckets else bucket & (mask >> 1))


@kernel
def context_hash(tokens: Int32Array, position: int, order: int) -> np.uint64:
    """Polynomial hash of the ``order`` tokens that end at ``position``; the rolling loops below compute the same."""
    value = np.uint64(0)
    weight = _SCALE
    for back in range(order):
        value += np.uint64(tokens[position - back]) * weight
        weight *= _BASE
    return value


@kernel
def first_hash(token: int) -> np.uint64:
    """``context_hash`` of the context of one token."""
    return np.uint64(token) * _SCALE


@kernel
def _grow_buckets(x: Int64Array, heads: Int32Array) -> None:
    """Open one more bucket: it starts as a copy of the bucket whose positions it will share from now on."""
    count = x[X_NUM_BUCKETS]
    mask = x[X_BUCKET_MASK]
    if count > mask:
        mask = 2 * mask + 1
        x[X_BUCKET_MASK] = mask
    source = count & (mask >> 1)
    for k in range(NUM_ORDERS):
        heads[count * NUM_ORDERS + k] = heads[source * NUM_ORDERS + k]
    x[X_NUM_BUCKETS] = count + 1


@kernel
def _next_position(x: Int64Array, row: Int64Array, token: int) -> int:
    """Store a token at the end of a cached response and return its position; 0 if the index is full."""
    position = row[R_POSITION]
    if position == 0 or (position & PAGE_MASK) == PAGE_MASK:
        owner = int32_at(x[X_PAGE_OWNER])
        page_next = int32_at(x[X_PAGE_NEXT])
        page_prev = int32_at(x[X_PAGE_PREV])
        if x[X_NUM_FREE] > 0:
            x[X_NUM_FREE] -= 1
            page = np.int64(int32_at(x[X_FREE])[x[X_NUM_FREE]])
        elif x[X_NUM_PAGES] < x[X_MAX_PAGES]:
            page = x[X_NUM_PAGES]
            x[X_NUM_PAGES] += 1
        else:
            return 0
        owner[page] = row[R_SEQUENCE]
        page_next[page] = 0
        page_prev[page] = position >> PAGE_BITS
        tokens = int32_at(x[X_TOKENS])
        for i in range(page << PAGE_BITS, (page + 1) << PAGE_BITS):
            tokens[i] = WIPED
        if position == 0:
            int32_at(x[X_FIRST_PAGE])[row[R_SEQUENCE]] = page
        else:
            page_next[position >> PAGE_BITS] = page
        position = page << PAGE_BITS
    else:
        position += 1
    int32_at(x[X_TOKENS])[position] = token
    row[R_POSITION] = position
    x[X_NUM_POSITIONS] += 1
    return int(position)


@kernel
def _link(x: Int64Array, links: Int32Array, heads: Int32Array, position: int, k: int, value: np.uint64) -> None:
    head = bucket_of(value, x[X_NUM_BUCKETS], x[X_BUCKET_MASK]) * NUM_ORDERS + k
    links[position * NUM_ORDERS + k] = heads[head]
    heads[head] = position


@kernel
def _append_cached(
    x: Int64Array,
    row: Int64Array,
    token: int,
    available: int,
    h0: np.uint64,
    h1: np.uint64,
    h2: np.uint64,
    h3: np.uint64,
) -> bool:
    """Append one token to the cached response and chain it under the contexts (hashes h0..h3) that end at it.

    ``available`` is how many tokens of context there are, the token included. False: the index is full, and the
    response stays cached as far as it got.
    """
    position = _next_position(x, row, token)
    if position == 0:
        return False
    links = int32_at(x[X_LINKS])
    heads = int32_at(x[X_HEADS])
    if 2 * x[X_NUM_BUCKETS] < x[X_NUM_POSITIONS]:
        _grow_buckets(x, heads)
    base = position * NUM_ORDERS
    links[base + 1] = 0
    links[base + 2] = 0
    links[base + 3] = 0
    _link(x, links, heads, position, 0, h0)
    if available >= ORDER_1:
        _link(x, links, heads, position, 1, h1)
    if available >= ORDER_2:
        _link(x, links, heads, position, 2, h2)
    if available >= ORDER_3:
        _link(x, links, heads, position, 3, h3)
    return True


@kernel
def begin_cached(x: Int64Array, row: Int64Array) -> None:
    """Open the request's cached response with the tail of its prompt.

    Only the last prompt token is chained: it lets another request with the same question predict the first token of
    the answer. The tokens before it are context for verification.
    """
    tokens = int32_at(row[R_TOKENS])
    length = row[R_LENGTH]
    first = max(1, length - TAIL)
    links = int32_at(x[X_LINKS])
    for p in range(first, length):
        position = _next_position(x, row, tokens[p])
        if position == 0:
            row[R_SEQUENCE] = -row[R_SEQUENCE]
            return
        for k in range(NUM_ORDERS):
            links[position * NUM_ORDERS + k] = 0
            if p == length - 1 and length - first >= order_of(k):
                _link(x, links, int32_at(x[X_HEADS]), position, k, context_hash(tokens, p, order_of(k)))


@kernel
def _link_own(links: Int32Array, heads: Int32Array, mask: int, position: int, k: int, value: np.uint64) -> None:
    head = (np.int64((value * _FINAL) >> _SHIFT) & mask) * NUM_ORDERS + k
    links[position * NUM_ORDERS + k] = heads[head]
    heads[head] = position


@kernel
def append_tokens(row: Int64Array, new: Int32Array, start: int, stop: int, caching: bool) -> None:
    """Append ``new[start:stop]`` to the request's own text and, if ``caching``, to its cached response."""
    tokens = int32_at(row[R_TOKENS])
    links = int32_at(row[R_LINKS])
    heads = int32_at(row[R_HEADS])
    mask = row[R_BUCKET_MASK]
    length = row[R_LENGTH]
    x = int64_at(row[R_INDEX])
    if caching:
        x[X_TICK] += 1
        int32_at(x[X_LAST_USED])[row[R_SEQUENCE]] = x[X_TICK]
    h1 = np.uint64(row[R_HASH])  # as far as there is context
    h2 = np.uint64(row[R_HASH + 1])
    h3 = np.uint64(row[R_HASH + 2])
    for i in range(start, stop):
        p = length + i - start
        tokens[p] = new[i]
        h0 = first_hash(new[i])
        h1 = h1 * _BASE + h0
        h2 = h2 * _BASE + h0
        h3 = h3 * _BASE + h0
        if p > ORDER_1:
            h1 -= np.uint64(tokens[p - ORDER_1]) * _SCALE * _BASE_1
        if p > ORDER_2:
            h2 -= np.uint64(tokens[p - ORDER_2]) * _SCALE * _BASE_2
        if p > ORDER_3:
            h3 -= np.uint64(tokens[p - ORDER_3]) * _SCALE * _BASE_3
        base = p * NUM_ORDERS
        links[base + 1] = 0
        links[base + 2] = 0
        links[base + 3] = 0
        _link_own(links, heads, mask, p, 0, h0)
        if p >= ORDER_1:
            _link_own(links, heads, mask, p, 1, h1)
        if p >= ORDER_2:
            _link_own(links, heads, mask, p, 2, h2)
        if p >= ORDER_3:
            _link_own(links, heads, mask, p, 3, h3)
        if caching and not _append_cached(x, row, new[i], p, h0, h1, h2, h3):
            caching = False
            row[R_SEQUENCE] = -row[R_SEQUENCE]
    row[R_HASH] = np.int64(h1)
    row[R_HASH + 1] = np.int64(h2)
    row[R_HASH + 2] = np.int64(h3)
    row[R_CHAINED] = row[R_POSITION] if caching else 0
    row[R_LENGTH] = length + stop - start
    tokens[row[R_LENGTH]] = WIPED


@kernel
def free_pages(x: Int64Array, first_page: int) -> int:
    """Return the pages of a deleted response; its tokens are wiped. Returns how many positions were held."""
    tokens = int32_at(x[X_TOKENS])
    page_next = int32_at(x[X_PAGE_NEXT])
    owner = int32_at(x[X_PAGE_OWNER])
    free = int32_at(x[X_FREE])
    page = np.int64(first_page)
    held = 0
    while page > 0:
        base = page << PAGE_BITS
        for i in range(base, base + PAGE_SIZE):
            if tokens[i] != WIPED:
                held += 1
            tokens[i] = WIPED
        following = np.int64(page_next[page])
        page_next[page] = 0
        owner[page] = 0
        free[x[X_NUM_FREE]] = page
        x[X_NUM_FREE] += 1
        x[X_NUM_RECYCLED] += 1
        page = following
    x[X_NUM_POSITIONS] -= held
    return held
