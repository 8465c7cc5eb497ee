"""The Triton programs of tree attention: ``_attend`` over pieces of the keys, ``_merge`` of the pieces."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend", "merge"]


@triton.jit  # type: ignore[untyped-decorator]
def _locate(CuQueries, num_requests, tile, TOKENS: tl.constexpr, RB: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which request a tile of ``TOKENS`` queries belongs to (at least R: to none), and its first query there."""
    r = tl.arange(0, RB)
    live = r < num_requests
    count = tl.load(CuQueries + r + 1, mask=live, other=0) - tl.load(CuQueries + r, mask=live, other=0)
    count = tl.cdiv(count, TOKENS)
    is_past = tl.cumsum(count, 0) <= tile
    return tl.sum(is_past.to(tl.int32), 0), (tile - tl.sum(tl.where(is_past, count, 0), 0)) * TOKENS


@triton.jit  # type: ignore[untyped-decorator]
def _absorb(  # type: ignore[no-untyped-def]
    q, K, V, slot, inside, visible, m, total, acc, d, dv, sk_s, sv_s, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys in the online softmax. A row that sees none of them keeps its state bit for bit."""
    k = tl.load(K + slot[None, :] * sk_s + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
    x = tl.dot(q, k, input_precision=PRECISION) * scale
    if CAP:
        e = tl.exp(-2.0 * tl.abs(x / softcap))
        x = softcap * tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    x = tl.where(visible, x, float("-inf"))
    top = tl.maximum(m, tl.max(x, 1))
    finite = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp(x - finite[:, None])
    fade = tl.exp(m - finite)
    v = tl.load(V + slot[:, None] * sv_s + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
    acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return top, total * fade + tl.sum(p, 1), acc


@triton.jit  # type: ignore[untyped-decorator]
def _in_reach(where, position, window, chunk, WINDOW: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BM, BN]: may a query at ``position`` see keys at ``where``, none of which comes after it on its path?"""
    if WINDOW:
        return where[None, :] > position[:, None] - window
    return where[None, :] >= (position // chunk * chunk)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _absorb_shared(  # type: ignore[no-untyped-def]
    q, K, V, Slots, Words, TreePositions, position, live, context, first, begin, stop, end, m, total, acc, d, dv,
    sk_s, sv_s, scale, softcap, window, chunk,
    BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks of keys that all queries of the tile share: the context, and the tree under its ancestor bits."""
    for start in range(begin, end, BN):
        place = start + tl.arange(0, BN)
        node = place - context
        inside = (place >= first) & (place < stop)
        slot = tl.load(Slots + place, mask=inside, other=0).to(tl.int64)
        visible = live[:, None] & inside[None, :]
        if start + BN > context:  # the block touches the tree
            in_tree = live[:, None] & (inside & (node >= 0))[None, :]
            word = tl.load(Words + (node // 32)[None, :], mask=in_tree, other=0)
            visible = visible & ((node < 0)[None, :] | (((word >> (node % 32)[None, :]) & 1) != 0))
        if WINDOW or CHUNK:
            own = tl.load(TreePositions + node, mask=inside & (node >= 0), other=0)
            where = tl.where(node >= 0, own, place)
            visible = visible & _in_reach(where, position, window, chunk, WINDOW, CHUNK)
        m, total, acc = _absorb(
            q, K, V, slot, inside, visible, m, total, acc, d, dv, sk_s, sv_s, scale, softcap, D, DV, CAP, PRECISION
        )
    return m, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _absorb_paths(  # type: ignore[no-untyped-def]
    q, K, V, Slots, Paths, Own, token_0, token, num, position, live, context, first, begin, stop, m, total, acc, d, dv,
    s_paths, sk_s, sv_s, scale, softcap, window, chunk,
    TOKENS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each query's own path, its keys in the places of their positions: as if it had been decoded alone."""
    for t in range(TOKENS):
        mine = token_0 + t
        last = tl.load(Own + mine, mask=mine < num, other=-1)
        for start in range(begin, tl.minimum(stop, last + 1), BN):
            place = start + tl.arange(0, BN)
            inside = (place >= first) & (place <= last)
            key = tl.load(Paths + mine * s_paths + place - context, mask=inside & (place >= context), other=0)
            slot = tl.load(Slots + tl.where(place >= context, context + key, place), mask=inside, other=0).to(tl.int64)
            visible = (live & (token == mine))[:, None] & inside[None, :]
            if WINDOW or CHUNK:
                visible = visible & _in_reach(place, position, window, chunk, WINDOW, CHUNK)
            m, total, acc = _absorb(
                q, K, V, slot, inside, visible, m, total, acc, d, dv, sk_s, sv_s, scale, softcap, D, DV, CAP, PRECISION
            )
    return m, total, acc


# What changes from step to step must not make the compiler specialise: a request would wait for it.
@triton.jit(do_not_specialize=["window", "chunk", "num_requests", "s_slots", "s_words", "s_paths", "rows_all"])  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    Q, K, V, Part, Stats, CuQueries, CuKeys, Contexts, Firsts, Rows, Slots, Positions, Ancestors, Paths, Sinks,
    scale, softcap, window, chunk, num_requests, sq_t, sq_h, sk_s, sk_h, sv_s, sv_h, s_slots, s_words, s_paths,
    rows_all, num_heads,
    RB: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT_KEYS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    CAP: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of queries of one request, one KV head, one piece of the keys: unscaled sums, their maxima and weights.

    ``SPLIT_KEYS``: 0, or for strict attention the keys of a piece, which then begins at a multiple of it.
    """
    kv_head, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    TOKENS: tl.constexpr = BM // G
    request, token_0 = _locate(CuQueries, num_requests, tl.program_id(0), TOKENS, RB)
    if request >= num_requests:  # filler of a fixed grid
        return
    q0, key_0 = tl.load(CuQueries + request), tl.load(CuKeys + request)
    num, num_keys = tl.load(CuQueries + request + 1) - q0, tl.load(CuKeys + request + 1) - key_0
    context, first = tl.load(Contexts + request), tl.load(Firsts + request)
    Slots += tl.load(Rows + request).to(tl.int64) * s_slots
    Own = Positions + key_0 + num_keys - num  # of the queries
    row = tl.arange(0, BM)
    token, head = token_0 + row // G, kv_head * G + row % G
    live = (row < TOKENS * G) & (token < num)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    K += kv_head * sk_h
    V += kv_head * sv_h
    at = (q0 + token).to(tl.int64)
    q = tl.load(
        Q + at[:, None] * sq_t + head[:, None] * sq_h + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
    )
    position = tl.load(Own + token, mask=live, other=0)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if SINK:  # one more logit, without a value; one split owns it
        m = tl.where(split == 0, tl.load(Sinks + head, mask=live, other=0.0), m)
        total += tl.where(split == 0, 1.0, 0.0)
    acc = tl.zeros([BM, BDV], tl.float32)
    low = first  # no query of the request sees a key before it
    if WINDOW:
        low = tl.maximum(low, context + 1 - window)
    if CHUNK:
        low = tl.maximum(low, context // chunk * chunk)
    low = low // BN * BN
    end = context + num_keys
    if SPLIT_KEYS:  # strict: blocks and splits lie at fixed positions, and the tree is left to the second loop
        begin, stop = split * SPLIT_KEYS, split * SPLIT_KEYS + SPLIT_KEYS
        shared = tl.minimum(stop, context // BN * BN)
        begin = tl.maximum(begin, low)
    else:
        per = tl.cdiv(tl.cdiv(end - low, BN), splits) * BN
        begin = low + split * per
        stop = tl.minimum(begin + per, end)
        shared = stop
    m, total, acc = _absorb_shared(
        q, K, V, Slots, Ancestors + at[:, None] * s_words, Positions + key_0, position, live, context, first, begin,
        stop, shared, m, total, acc, d, dv, sk_s, sv_s, scale, softcap, window, chunk,
        BN, D, DV, WINDOW, CHUNK, CAP, PRECISION,
    )  # fmt: skip
    if SPLIT_KEYS:
        m, total, acc = _absorb_paths(
            q, K, V, Slots, Paths + q0.to(tl.int64) * s_paths, Own, token_0, token, num, position, live, context, first,
            tl.maximum(begin, context // BN * BN), stop, m, total, acc, d, dv, s_paths, sk_s, sv_s, scale, softcap,
            window, chunk, TOKENS, BN, D, DV, WINDOW, CHUNK, CAP, PRECISION,
        )  # fmt: skip
    at = split * rows_all + at * num_heads + head
    tl.store(Part + at[:, None] * DV + dv[None, :], acc, mask=live[:, None] & (dv < DV)[None, :])
    tl.store(Stats + at, m, mask=live)
    tl.store(Stats + splits * rows_all + at, total, mask=live)


@triton.jit(do_not_specialize=["num_requests", "rows_all", "splits"])  # type: ignore[untyped-decorator]
def merge(  # type: ignore[no-untyped-def]
    Part, Stats, Out, CuQueries, num_requests, rows_all, num_heads, splits,
    BS: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
) -> None:  # fmt: skip
    """``BS`` splits at a time, in order: empty ones behind them change nothing. Tokens of nobody become zero."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * num_heads + tl.program_id(1)
    s, dv = tl.arange(0, BS), tl.arange(0, BDV)
    out = tl.zeros([BDV], tl.float32)
    if token < tl.load(CuQueries + num_requests):
        top = tl.full([], float("-inf"), tl.float32)
        for start in range(0, splits, BS):
            at = (start + s) * rows_all + row
            top = tl.maximum(top, tl.max(tl.load(Stats + at, mask=start + s < splits, other=float("-inf")), 0))
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.full([], 0.0, tl.float32)
        for start in range(0, splits, BS):
            at = (start + s) * rows_all + row
            live = start + s < splits
            weight = tl.exp(tl.load(Stats + at, mask=live, other=float("-inf")) - top)
            total += tl.sum(weight * tl.load(Stats + splits * rows_all + at, mask=live, other=0.0), 0)
            part = tl.load(Part + at[:, None] * DV + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0.0)
            out += tl.sum(weight[:, None] * part, 0)
        out = out / total
    tl.store(Out + row * DV + dv, out.to(Out.dtype.element_ty), mask=dv < DV)
