"""Appending to and deleting from the index: paged tokens with hash chains.

A context of each order hashes to a bucket; the bucket's head is the newest position with that context, and every
position links to the one before it (as in LZ77 match finders). Nothing is ever trusted: a match counts only after its
tokens were compared, so collisions, stale links and reused pages cost time, never correctness.

Tokens lie in pages of 64. Responses of concurrent requests grow interleaved, and a deleted one returns whole pages.
Appending a token writes one token and one link per order: constant time, no rebalancing, no rehashing.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from specdec.suffix_tree._layout import (
    BLOCK,
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
    R_SCRATCH,
    R_SEQUENCE,
    R_TOKENS,
    S_KEYS,
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
from specdec.suffix_tree.memory import Int32Array, Int64Array, int32_at, int64_at, kernel, prefetch

__all__ = [
    "append_tokens",
    "begin_cached",
    "bucket_key",
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
_KEY_MASK: Final = (1 << 31) - 1
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
def bucket_key(value: np.uint64) -> int:
    """The bits of a context hash that choose its bucket: enough for 2^31 positions, and never negative as an int32."""
    return int(np.int64((value * _FINAL) >> _SHIFT) & _KEY_MASK)


@kernel
def bucket_of(key: int, num_buckets: int, mask: int) -> int:
    """Bucket of a key under linear hashing: ``mask`` covers the larger of the two table sizes in use."""
    bucket = key & mask
    return bucket if bucket < num_buckets else bucket & (mask >> 1)


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
def _copy_bucket(heads: Int32Array, bucket: int, mask: int) -> None:
    """Open one more bucket: it starts as a copy of the bucket whose positions it will share from now on."""
    source = bucket & (mask >> 1)
    for k in range(NUM_ORDERS):
        heads[bucket * NUM_ORDERS + k] = heads[source * NUM_ORDERS + k]


@kernel
def _open_page(x: Int64Array, row: Int64Array) -> int:
    """Give a cached response a further page; its first position, or 0 if the index is full."""
    if x[X_NUM_FREE] > 0:
        x[X_NUM_FREE] -= 1
        page = np.int64(int32_at(x[X_FREE])[x[X_NUM_FREE]])
    elif x[X_NUM_PAGES] < x[X_MAX_PAGES]:
        page = x[X_NUM_PAGES]
        x[X_NUM_PAGES] += 1
    else:
        return 0
    before = row[R_POSITION] >> PAGE_BITS
    page_next = int32_at(x[X_PAGE_NEXT])
    int32_at(x[X_PAGE_OWNER])[page] = row[R_SEQUENCE]
    page_next[page] = 0
    int32_at(x[X_PAGE_PREV])[page] = before
    tokens = int32_at(x[X_TOKENS])
    for i in range(page << PAGE_BITS, (page + 1) << PAGE_BITS):
        tokens[i] = WIPED
    if before == 0:
        int32_at(x[X_FIRST_PAGE])[row[R_SEQUENCE]] = page
    else:
        page_next[before] = page
    return int(page << PAGE_BITS)


@kernel
def _next_position(x: Int64Array, row: Int64Array) -> int:
    """Move a cached response on by one position and return it; 0 if the index is full."""
    position = row[R_POSITION]
    if position == 0 or (position & PAGE_MASK) == PAGE_MASK:
        position = np.int64(_open_page(x, row))
        if position == 0:
            return 0
    else:
        position += 1
    row[R_POSITION] = position
    return int(position)


@kernel
def _chain(links: Int32Array, heads: Int32Array, position: int, k: int, key: int, num_buckets: int, mask: int) -> None:
    """Make ``position`` the newest of its chain of order k; without a key it is on none."""
    previous = np.int32(0)
    if key >= 0:
        head = bucket_of(key, num_buckets, mask) * NUM_ORDERS + k
        previous = heads[head]
        heads[head] = position
    links[position * NUM_ORDERS + k] = previous


@kernel
def _chain_cached(x: Int64Array, row: Int64Array, new: Int32Array, start: int, stop: int, keys: Int32Array) -> bool:
    """Append ``new[start:stop]`` to the cached response and chain each token under the contexts that end at it.

    ``keys`` are those of ``_append_own``. False: the index is full, and the response stays cached as far as it got.
    """
    tokens = int32_at(x[X_TOKENS])
    links = int32_at(x[X_LINKS])
    heads = int32_at(x[X_HEADS])
    num_buckets = x[X_NUM_BUCKETS]
    mask = x[X_BUCKET_MASK]
    num_positions = x[X_NUM_POSITIONS]
    fits = True
    for i in range(start, stop):
        position = _next_position(x, row)
        if position == 0:
            fits = False
            break
        tokens[position] = new[i]
        num_positions += 1
        if 2 * num_buckets < num_positions:
            if num_buckets > mask:
                mask = 2 * mask + 1
            _copy_bucket(heads, num_buckets, mask)
            num_buckets += 1
        for k in range(NUM_ORDERS):
            _chain(links, heads, position, k, keys[(i - start) * NUM_ORDERS + k], num_buckets, mask)
    x[X_NUM_BUCKETS] = num_buckets
    x[X_BUCKET_MASK] = mask
    x[X_NUM_POSITIONS] = num_positions
    return fits


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
    heads = int32_at(x[X_HEADS])
    for p in range(first, length):
        position = _next_position(x, row)
        if position == 0:
            row[R_SEQUENCE] = -row[R_SEQUENCE]
            return
        int32_at(x[X_TOKENS])[position] = tokens[p]
        x[X_NUM_POSITIONS] += 1
        for k in range(NUM_ORDERS):
            key = -1
            if p == length - 1 and length - first >= order_of(k):
                key = bucket_key(context_hash(tokens, p, order_of(k)))
            _chain(links, heads, position, k, key, x[X_NUM_BUCKETS], x[X_BUCKET_MASK])


@kernel
def _append_own(row: Int64Array, new: Int32Array, start: int, stop: int, keys: Int32Array) -> None:
    """Append ``new[start:stop]`` to the request's text, chain it, and write the keys of all contexts that end in it.

    Args:
        row: the request.
        new: tokens; at most BLOCK of them are taken.
        start: of those.
        stop: likewise.
        keys: [stop - start, NUM_ORDERS] out; -1 where there is not enough context.
    """
    tokens = int32_at(row[R_TOKENS])
    links = int32_at(row[R_LINKS])
    heads = int32_at(row[R_HEADS])
    mask = row[R_BUCKET_MASK]
    length = row[R_LENGTH]
    h1 = np.uint64(row[R_HASH])  # as far as there is context
    h2 = np.uint64(row[R_HASH + 1])
    h3 = np.uint64(row[R_HASH + 2])
    for i in range(stop - start):
        p = length + i
        token = new[start + i]
        tokens[p] = token
        h0 = first_hash(token)
        h1 = h1 * _BASE + h0
        h2 = h2 * _BASE + h0
        h3 = h3 * _BASE + h0
        if p > ORDER_1:
            h1 -= np.uint64(tokens[p - ORDER_1]) * _SCALE * _BASE_1
        if p > ORDER_2:
            h2 -= np.uint64(tokens[p - ORDER_2]) * _SCALE * _BASE_2
        if p > ORDER_3:
            h3 -= np.uint64(tokens[p - ORDER_3]) * _SCALE * _BASE_3
        key0 = bucket_key(h0)
        key1 = bucket_key(h1) if p >= ORDER_1 else -1
        key2 = bucket_key(h2) if p >= ORDER_2 else -1
        key3 = bucket_key(h3) if p >= ORDER_3 else -1
        _chain(links, heads, p, 0, key0, mask + 1, mask)
        _chain(links, heads, p, 1, key1, mask + 1, mask)
        _chain(links, heads, p, 2, key2, mask + 1, mask)
        _chain(links, heads, p, 3, key3, mask + 1, mask)
        base = i * NUM_ORDERS
        keys[base] = key0
        keys[base + 1] = key1
        keys[base + 2] = key2
        keys[base + 3] = key3
    row[R_HASH] = np.int64(h1)
    row[R_HASH + 1] = np.int64(h2)
    row[R_HASH + 2] = np.int64(h3)


@kernel
def _prefetch_heads(x: Int64Array, num_tokens: int, keys: Int32Array) -> None:
    """Ask for the heads that ``keys`` lead to: in a large index each lies in a cache line of its own, far away."""
    heads = x[X_HEADS]
    num_buckets = x[X_NUM_BUCKETS]
    mask = x[X_BUCKET_MASK]
    for i in range(num_tokens * NUM_ORDERS):
        if keys[i] >= 0:
            prefetch(heads + 4 * NUM_ORDERS * bucket_of(keys[i], num_buckets, mask))


@kernel
def append_tokens(row: Int64Array, new: Int32Array, start: int, stop: int, caching: bool) -> None:
    """Append ``new[start:stop]`` to the request's own text and, if ``caching``, to its cached response.

    Tokens are taken in blocks: first the keys of a whole block, so that the misses of its heads overlap.
    """
    x = int64_at(row[R_INDEX])
    keys = int32_at(row[R_SCRATCH] + 4 * S_KEYS)
    if caching:
        x[X_TICK] += 1
        int32_at(x[X_LAST_USED])[row[R_SEQUENCE]] = x[X_TICK]
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        _append_own(row, new, first, last, keys)
        if caching:
            _prefetch_heads(x, last - first, keys)
        if caching and not _chain_cached(x, row, new, first, last, keys):
            caching = False
            row[R_SEQUENCE] = -row[R_SEQUENCE]
        row[R_LENGTH] += last - first
    row[R_CHAINED] = row[R_POSITION] if caching else 0
    int32_at(row[R_TOKENS])[row[R_LENGTH]] = WIPED


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
