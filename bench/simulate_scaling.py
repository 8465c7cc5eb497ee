"""What a cached response costs by how much is cached: insertion, look-up, eviction, memory.

A cache is filled to one size after another. At each size responses are replaced one by one, the oldest by one that was
never seen, as a cache at its bound does: so the size stays, and what the system takes to hand out fresh memory is left
out. Filling up to the size is timed as well, fresh memory included. The text is mixed beforehand: each size holds the
same mixture. As in ``simulate_speed``, of each call the least time over the passes counts.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from specdec.bench.peers import arctic_cache
from specdec.bench.simulate_speed import THRESHOLD
from specdec.bench.traces import IntArray
from specdec.suffix_tree.cache import SuffixCache

__all__ = ["cache_scaling"]

_MOST_REPLACED = 100  # responses replaced at each size
_LOOKS = 400  # look-ups at each size
_CONTEXT = 100  # tokens of the request that looks up
_MAX_BYTES = 1 << 30
_clock = time.perf_counter


class _Arm(Protocol):
    """A cache of responses; the calls return the seconds that count."""

    def insert(self, key: int, response: IntArray) -> float: ...
    def evict(self, key: int) -> float: ...
    def speculate(self, context: IntArray) -> float: ...
    def nbytes(self) -> int: ...


class _Ours:
    def __init__(self) -> None:
        self.cache = SuffixCache(max_bytes=_MAX_BYTES)
        self.cache.warmup()

    def insert(self, key: int, response: IntArray) -> float:
        begin = _clock()
        self.cache.insert(key, response)
        return _clock() - begin

    def evict(self, key: int) -> float:
        begin = _clock()
        self.cache.forget(key)
        return _clock() - begin

    def speculate(self, context: IntArray) -> float:
        self.cache.start("probe", context, caching=False)
        begin = _clock()
        self.cache.advance("probe", np.empty(0, np.int32), budget=64, threshold=THRESHOLD, as_tree=False)
        spent = _clock() - begin
        self.cache.finish("probe")
        return spent

    def nbytes(self) -> int:
        index = self.cache.index("")
        return index.nbytes + index.table_nbytes


class _Arctic:
    def __init__(self) -> None:
        self.cache = arctic_cache()

    def insert(self, key: int, response: IntArray) -> float:
        self.cache.start_request(key, [])
        begin = _clock()
        self.cache.add_active_response(key, response)
        spent = _clock() - begin
        self.cache.stop_request(key)
        return spent

    def evict(self, key: int) -> float:
        begin = _clock()
        self.cache.evict_cached_response(key)
        return _clock() - begin

    def speculate(self, context: IntArray) -> float:
        self.cache.start_request("probe", context)
        begin = _clock()
        self.cache.speculate("probe", context[-64:], max_spec_tokens=64)
        spent = _clock() - begin
        self.cache.stop_request("probe")
        self.cache.evict_cached_response("probe")
        return spent

    def nbytes(self) -> int:
        return int(self.cache._global_tree.estimate_memory())


class _Times:
    """Seconds of every call at one size, and what the cache holds there."""

    def __init__(self) -> None:
        self.grow: list[float] = []
        self.insert: list[float] = []
        self.evict: list[float] = []
        self.speculate: list[float] = []
        self.held = 0
        self.nbytes = 0


def _one_pass(arm: _Arm, pieces: Sequence[IntArray], sizes: Sequence[int]) -> list[_Times]:
    """Fill a cache from size to size; ``pieces`` are taken in turn, from the start again where they do not last."""
    held: deque[int] = deque()
    response = len(pieces[0])
    key = 0
    result = []
    for size in sizes:
        times = _Times()
        result.append(times)
        while len(held) * response < size:
            times.grow.append(arm.insert(key, pieces[key % len(pieces)]))
            held.append(key)
            key += 1
        times.held, times.nbytes = len(held) * response, arm.nbytes()
        for at in np.linspace(0, len(held) * response - 1, _LOOKS).astype(int).tolist():
            start = min(at % response, response - _CONTEXT)
            piece = pieces[held[at // response] % len(pieces)]
            times.speculate.append(arm.speculate(piece[start : start + _CONTEXT]))
        for _ in range(min(_MOST_REPLACED, len(held))):
            times.evict.append(arm.evict(held.popleft()))
            times.insert.append(arm.insert(key, pieces[key % len(pieces)]))
            held.append(key)
            key += 1
    return result


def _least(passes: Sequence[_Times], name: str) -> npt.NDArray[np.float64]:
    return np.min([getattr(times, name) for times in passes], axis=0)  # type: ignore[no-any-return]


def _row(passes: Sequence[_Times], response: int) -> dict[str, float]:
    held = passes[0].held
    return {
        "cached_tokens": held,
        "insert_us_per_token": 1e6 * float(_least(passes, "insert").mean()) / response,
        "grow_us_per_token": 1e6 * float(_least(passes, "grow").mean()) / response,
        "speculate_us_p50": 1e6 * float(np.median(_least(passes, "speculate"))),
        "evict_ms_per_response": 1e3 * float(_least(passes, "evict").mean()),
        "bytes_per_token": passes[0].nbytes / held,
    }


def cache_scaling(
    text: IntArray, sizes: Sequence[int], *, passes: int, response: int = 1500, with_peer: bool
) -> dict[str, Any]:
    """Cost of insertion, look-up, eviction and memory by size, with responses of ``response`` tokens.

    Args:
        text: [N] tokens, cut into responses that are put in a fixed random order.
        sizes: cached tokens, ascending.
        passes: how often all is measured, each time with new caches, both arms in turn.
        response: tokens, more than 100.
        with_peer: measure arctic-inference as well.

    Returns:
        One row per size for each arm; for ours also how many times as much the largest size costs as the smallest.
    """
    order = np.random.default_rng(0).permutation(len(text) // response).tolist()
    pieces = [np.ascontiguousarray(text[i * response : (i + 1) * response]) for i in order]
    arms: dict[str, Callable[[], _Arm]] = {"ours": _Ours, "arctic": _Arctic} if with_peer else {"ours": _Ours}
    measured: dict[str, list[list[_Times]]] = {name: [] for name in arms}
    for _ in range(passes):
        for name, arm in arms.items():
            gc.collect()
            measured[name].append(_one_pass(arm(), pieces, sizes))
    result: dict[str, Any] = {"passes": passes, "response_tokens": response, "ours": [], "arctic": []}
    for name, by_pass in measured.items():
        result[name] = [_row(list(at_size), response) for at_size in zip(*by_pass, strict=True)]
    first, last = result["ours"][0], result["ours"][-1]
    result["times_as_much"] = {
        key: last[key] / first[key] for key in ("insert_us_per_token", "grow_us_per_token", "speculate_us_p50")
    }
    return result
