from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from specdec.suffix_tree.cache import SuffixCache
from specdec.suffix_tree.index import BYTES_PER_PAGE
from specdec.suffix_tree.live import as_tokens


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def draft(cache: SuffixCache, name: str, budget: int = 16, *, as_tree: bool = False) -> list[int]:
    return cache.speculate([name], [budget], threshold=0.0, as_tree=as_tree).token_ids[1:].tolist()


def test_a_repeated_context_is_continued_as_before():
    cache = SuffixCache()
    cache.start("r", [5, 6, 7, 8, 9, 5, 6])
    assert draft(cache, "r", 3) == [7, 8, 9]


def test_the_first_tokens_of_a_repeated_question_are_predicted():
    cache = SuffixCache()
    cache.start("first", [1, 2, 3])
    cache.extend(["first"], [ids(10, 11, 12)])
    cache.finish("first")
    cache.start("second", [1, 2, 3])
    assert draft(cache, "second") == [10, 11, 12]


def test_a_live_request_learns_from_another_live_request():
    cache = SuffixCache()
    cache.start("a", [1, 2, 3])
    cache.start("b", [4])
    cache.extend(["a"], [ids(7, 8, 9)])
    cache.extend(["b"], [ids(7, 8)])
    assert draft(cache, "b") == [9]


def test_nothing_of_one_tenant_reaches_another():
    def drafts_of_south(with_north: bool) -> list[list[int]]:
        rng = np.random.default_rng(7)
        cache = SuffixCache()
        cache.start("s", rng.integers(0, 4, 200), tenant="south")
        seen = []
        for step in range(40):
            if with_north:
                cache.start(step, rng.integers(0, 4, 50).repeat(2), tenant="north")
                cache.extend([step], [np.arange(20, dtype=np.int32) % 4])
                draft(cache, step)
                cache.extend([step], [ids(3, 3, 3)])
                cache.finish(step)
            else:
                rng.integers(0, 4, 50)
            got = cache.speculate(["s"], [8], threshold=0.05, as_tree=True)
            seen.append([*got.token_ids.tolist(), *got.values.tolist()])
            cache.extend(["s"], [ids(step % 4, step % 3)])
        return seen

    assert drafts_of_south(with_north=True) == drafts_of_south(with_north=False)


def test_the_shared_tier_is_read_by_every_tenant_and_written_by_none():
    cache = SuffixCache()
    cache.start("live", [50, 51], tenant="x")
    cache.share([[50, 51, 52, 53], [60, 61, 62]])
    assert draft(cache, "live") == [52, 53]
    cache.start("later", [60, 61], tenant="y")
    assert draft(cache, "later") == [62]
    held = cache.shared.num_tokens
    cache.extend(["later"], [ids(1, 2, 3)])
    assert cache.shared.num_tokens == held


def test_a_batch_drafts_what_single_calls_draft():
    rng = np.random.default_rng(3)
    caches = [SuffixCache(), SuffixCache()]
    names = list("abcdef")
    for cache in caches:
        for i, name in enumerate(names):
            cache.start(name, (np.arange(60) * (i + 2)) % 17)
    for _ in range(30):
        new = [rng.integers(0, 5, rng.integers(0, 4)).astype(np.int32) for _ in names]
        order = rng.permutation(len(names))[:4]
        batch = [names[i] for i in order]
        together = caches[0].step(batch, [new[i] for i in order], [9] * 4, threshold=0.01, as_tree=True)
        for i in order:
            caches[1].extend([names[i]], [new[i]])
        for place, i in enumerate(order):
            alone = caches[1].speculate([names[i]], [9], threshold=0.01, as_tree=True)
            part = slice(together.offsets[place], together.offsets[place + 1])
            assert together.token_ids[part].tolist() == alone.token_ids.tolist()
            assert together.parents[part].tolist() == alone.parents.tolist()


def test_budgets_of_another_number_than_requests_are_refused():
    cache = SuffixCache()
    cache.start("r", [1, 2, 3])
    with pytest.raises(ValueError, match="1 requests need as many budgets, got 2"):
        cache.speculate(["r"], [4, 4], threshold=0.1, as_tree=False)


def test_no_more_is_searched_than_can_match_and_what_others_bring_is_found_all_the_same():
    cache = SuffixCache()
    text = np.arange(100, 160, dtype=np.int32)
    cache.start("r", [1, 2, 3])
    for token in text[:30]:  # nothing matches so far: long contexts are not searched
        cache.step(["r"], [np.array([token])], [8], threshold=0.01, as_tree=False)
        assert cache.match_length("r") == 0
    cache.insert("other", text)
    cache.step(["r"], [text[30:31]], [8], threshold=0.01, as_tree=False)
    assert cache.match_length("r") == 31
    found = cache.step(["r"], [text[31:32]], [8], threshold=0.0, as_tree=False)
    assert cache.match_length("r") == 32
    assert found.token_ids.tolist() == [0, *range(132, 140)]


def test_a_draft_costs_no_more_than_its_budget_and_zero_means_none():
    cache = SuffixCache()
    cache.start("r", [1, 2] * 200)
    assert len(draft(cache, "r", 0)) == 0
    assert len(draft(cache, "r", 5)) == 5
    assert len(draft(cache, "r", 10_000)) <= 256


def test_values_approach_what_is_really_accepted():
    cache = SuffixCache()
    rng = np.random.default_rng(0)
    prompt = np.arange(2, 52, dtype=np.int32)
    cache.start("r", prompt)
    promised, kept = 0.0, 0
    for step in range(3000):  # after 1 comes 2 in 7 of 10 cases
        cache.extend(["r"], [ids(1)])
        got = cache.speculate(["r"], [1], threshold=0.0, as_tree=False)
        token = 2 if rng.random() < 0.7 else 3
        if step >= 1000 and len(got.token_ids) > 1:
            promised += got.values[1]
            kept += int(got.token_ids[1] == token)
        cache.extend(["r"], [ids(token)])
    assert abs(promised - kept) / kept < 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda n: np.zeros(n, np.int32),
        lambda n: np.frombuffer(_fibonacci(n), np.int8).astype(np.int32),
        lambda n: np.resize(_de_bruijn(), n).astype(np.int32),
        lambda n: np.arange(n, dtype=np.int32),
    ],
    ids=["one symbol", "fibonacci", "de bruijn", "all different"],
)
def test_hostile_text_of_a_million_tokens_is_linear_and_bounded(make):
    times = []
    text = make(1_000_000)
    for n in (250_000, 1_000_000):
        cache = SuffixCache(max_bytes=4 << 20)
        start = time.process_time()
        cache.start("prompt", text[:n])
        cache.insert("response", text[:n])
        cache.extend(["prompt"], [text[:100]])
        for _ in range(50):
            cache.step(["prompt"], [text[:2]], [64], threshold=0.0, as_tree=True)
        times.append(time.process_time() - start)
        index = cache.index("")
        assert index.nbytes <= (4 << 20) + (1 << 15)
    assert times[1] < 16 * times[0] + 1  # linear is 4; the machine may be busy


def _fibonacci(n: int) -> bytes:
    a, b = b"\x00", b"\x00\x01"
    while len(b) < n:
        a, b = b, b + a
    return b[:n]


def _de_bruijn() -> list[int]:
    k, n = 10, 4
    word, a = [], [0] * k * n

    def extend(t: int, p: int) -> None:
        if t > n:
            if n % p == 0:
                word.extend(a[1 : p + 1])
            return
        a[t] = a[t - p]
        extend(t + 1, p)
        for j in range(a[t - p] + 1, k):
            a[t] = j
            extend(t + 1, t)

    extend(1, 1)
    return word


def test_the_response_used_longest_ago_is_evicted_first():
    cache = SuffixCache(max_bytes=4 * BYTES_PER_PAGE)
    for name in (1, 2, 3, 4):
        cache.insert(name, np.full(60, name, np.int32))
    cache.start("reader", [2, 2, 2], caching=False)
    draft(cache, "reader")  # response 2 was written long ago, but is in use
    cache.insert(5, np.full(60, 5, np.int32))
    cache.insert(6, np.full(60, 6, np.int32))
    assert sorted(cache.index("").responses) == [2, 4, 5, 6]
    cache.index("").check_integrity()


def test_a_live_response_is_never_evicted_and_stops_growing_when_the_index_is_full():
    cache = SuffixCache(max_bytes=2 * BYTES_PER_PAGE)
    cache.start("r", [1])
    cache.extend(["r"], [np.arange(500, dtype=np.int32)])
    cache.extend(["r"], [np.arange(500, dtype=np.int32)])
    assert list(cache.index("").responses) == ["r"]
    assert cache.index("").num_tokens == 128
    cache.index("").check_integrity()
    assert draft(cache, "r", 2) == [] or cache.match_length("r") > 0
    cache.finish("r")
    cache.insert("next", np.arange(64, dtype=np.int32))
    assert list(cache.index("").responses) == ["next"]


def test_responses_expire_after_their_time_to_live():
    now = [0.0]
    cache = SuffixCache(ttl=10, clock=lambda: now[0])
    cache.insert("old", [1, 2, 3])
    now[0] = 5
    cache.insert("new", [4, 5, 6])
    now[0] = 11
    assert cache.expire() == 1
    assert list(cache.index("").responses) == ["new"]
    now[0] = 16
    cache.start("r", [1])  # starting a request expires too
    assert list(cache.index("").responses) == ["r"]


def test_a_bound_on_the_number_of_responses_holds():
    cache = SuffixCache(max_responses=2)
    for name in range(5):
        cache.insert(name, [name] * 5)
    assert sorted(cache.index("").responses) == [3, 4]


def test_forgotten_text_is_drafted_by_nobody_and_its_memory_is_wiped():
    cache = SuffixCache()
    cache.insert("secret", [41, 42, 43, 44])
    cache.start("r", [41, 42])
    assert draft(cache, "r") == [43, 44]
    cache.forget("secret")
    assert draft(cache, "r") == []
    tokens = dict(cache.index("").arrays())["tokens"]
    assert not np.isin([43, 44], tokens).any()
    with pytest.raises(ValueError, match="'secret' is not cached"):
        cache.forget("secret")


def test_forgetting_a_live_request_keeps_it_alive_without_caching():
    cache = SuffixCache()
    cache.start("r", [1, 2, 3])
    cache.extend(["r"], [ids(4, 5)])
    cache.forget("r")
    cache.extend(["r"], [ids(6, 1, 2)])
    assert draft(cache, "r", 2) == [3, 4]
    assert cache.index("").num_tokens == 0
    cache.finish("r")


def test_forgetting_a_tenant_drops_text_and_calibration():
    cache = SuffixCache()
    cache.start("r", [1, 2], tenant="t")
    cache.extend(["r"], [ids(3)])
    cache.forget_tenant("t")
    assert cache.index("t").num_tokens == 0
    cache.extend(["r"], [ids(1, 2)])
    assert draft(cache, "r", 1) == [3]  # its own text is its own
    with pytest.raises(ValueError, match="tenant 'nobody' is unknown"):
        cache.forget_tenant("nobody")


def test_the_tenant_idle_longest_makes_room_for_a_new_one():
    cache = SuffixCache(max_tenants=2)
    cache.insert("a", [1], tenant="old")
    assert set(cache.tenants) == {"", "old"}
    cache.insert("b", [1], tenant="new")
    assert set(cache.tenants) == {"old", "new"}
    cache.start("x", [1], tenant="old")
    cache.start("y", [1], tenant="new")
    with pytest.raises(ValueError, match="all 2 tenants have live requests"):
        cache.start("z", [1], tenant="third")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.start("r", [1]), "'r' is already active"),
        (lambda c: c.finish("x"), "'x' is not active"),
        (lambda c: c.extend(["r", "x"], [ids(1), ids(2)]), "'x' is not active"),
        (lambda c: c.extend(["r"], []), "1 requests need as many token lists, got 0"),
        (lambda c: c.start("y", [-1]), "token ids must be at least 0, got -1"),
        (lambda c: c.start("y", np.zeros((2, 2), np.int32)), "1-d array of integers"),
        (lambda c: c.start("y", np.zeros(2)), "1-d array of integers"),
        (lambda c: SuffixCache(max_bytes=10), "max_bytes must hold"),
        (lambda c: SuffixCache(ttl=-1), "ttl must be positive seconds, got -1"),
        (lambda c: SuffixCache(max_responses=0), "max_responses must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, message):
    cache = SuffixCache()
    cache.start("r", [1, 2, 3])
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert list(cache.active_requests) == ["r"]
    cache.index("").check_integrity()


def test_a_finished_request_leaves_nothing_behind_but_its_response():
    cache = SuffixCache()
    before = cache.nbytes
    cache.start("r", np.arange(10_000))
    assert cache.nbytes > before + 10_000 * 20
    cache.finish("r")
    assert cache.nbytes <= before + BYTES_PER_PAGE


def test_many_live_requests_get_rows_of_their_own():
    cache = SuffixCache(max_bytes=1 << 20)
    for i in range(200):
        cache.start(i, [i, i + 1, i + 2, i])
    assert [draft(cache, i, 1) for i in range(200)] == [[i + 1] for i in range(200)]
    for i in range(200):
        cache.finish(i)
    assert not cache.active_requests


def test_threads_read_while_one_writes():
    cache = SuffixCache(max_bytes=1 << 18)
    for i in range(3):
        cache.start(("reader", i), [1, 2, 3, 4], caching=False)
    stop = threading.Event()
    errors: list[BaseException] = []

    def read(i: int) -> None:
        try:
            while not stop.is_set():
                got = cache.speculate([("reader", i)], [16], threshold=0.0, as_tree=True)
                assert ((got.token_ids >= 0) & (got.token_ids < 100)).all()
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(1)
    for n in range(200):
        cache.insert(n, rng.integers(0, 100, 300))
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    cache.index("").check_integrity()


def test_long_lists_are_converted_like_short_ones():
    assert as_tokens(list(range(50_000))).tolist() == list(range(50_000))


def test_chains_do_not_depend_on_how_many_tokens_come_at_a_time():
    tokens = np.random.default_rng(0).integers(0, 30, 700).astype(np.int32)
    found = []
    for step in (1, 63, 64, 65, 700):
        cache = SuffixCache(max_bytes=1 << 20)
        cache.start("r", tokens[:5])
        for start in range(5, 700, step):
            cache.extend(["r"], [tokens[start : start + step]])
        arrays = dict(cache.index("").arrays())
        found.append([arrays[name].tolist() for name in ("tokens", "links", "heads")])
    assert all(arrays == found[0] for arrays in found[1:])


@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="this is the run without compilation")
def test_the_same_tests_pass_without_compilation():
    chosen = "not million and not threads and not approach and not without"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/suffix_tree", "-k", chosen]
    run = subprocess.run(
        command, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
