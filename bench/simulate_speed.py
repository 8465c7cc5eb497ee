"""What drafting costs on the host: time per request-step, prompts, stalls.

Both arms run in one process, alternating. Every pass makes the same calls in the same order, and of each call the least
time over the passes counts: what other work on the machine adds to a call is no property of the drafter.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.bench.peers import arctic_cache
from specdec.bench.traces import IntArray, TokenCall
from specdec.suffix_tree.cache import SuffixCache

__all__ = ["THRESHOLD", "host_time", "long_prompt", "measure_stall"]

THRESHOLD = 0.1  # the least probability that the peer drafts at by default; drafts about as many tokens


Times = tuple[list[float], int, list[float]]  # seconds of each call, request-steps, seconds of each prompt


def _ours_one(calls: Sequence[TokenCall], width: int = 1) -> Times:
    """One request at a time."""
    cache = SuffixCache(max_bytes=1 << 28)
    clock, steps = time.perf_counter, 0
    spent: list[float] = []
    prompts: list[float] = []
    empty = np.empty(0, np.int32)
    for number, call in enumerate(calls):
        begin = clock()
        cache.start(number, call.prompt_ids)
        prompts.append(clock() - begin)
        response, at, new = call.response_ids, 0, empty
        truth = response.tolist()
        while at < len(truth):
            begin = clock()
            live = cache.advance(number, new, budget=64, threshold=THRESHOLD, as_tree=False)
            draft = live.draft[: live.count, 0].tolist()
            spent.append(clock() - begin)
            right = _matching(draft, truth, at)
            stop = min(at + right + 1, len(truth))
            new, at, steps = response[at:stop], stop, steps + 1
        begin = clock()
        cache.advance(number, new, budget=0, threshold=THRESHOLD, as_tree=False)
        cache.finish(number)
        del live
        spent.append(clock() - begin)
    return spent, steps, prompts


def _matching(draft: list[int], truth: list[int], at: int) -> int:
    right = 0
    while right < len(draft) and at + right < len(truth) and draft[right] == truth[at + right]:
        right += 1
    return right


def _arctic_one(calls: Sequence[TokenCall], width: int = 1, depth: int = 64) -> Times:
    cache = arctic_cache(depth)
    clock, steps = time.perf_counter, 0
    spent: list[float] = []
    prompts: list[float] = []
    for number, call in enumerate(calls):
        begin = clock()
        cache.start_request(number, call.prompt_ids)
        prompts.append(clock() - begin)
        text = np.concatenate([call.prompt_ids, call.response_ids])
        truth, start, at = call.response_ids.tolist(), len(call.prompt_ids), 0
        while at < len(truth):
            context = text[max(0, start + at - depth) : start + at]
            begin = clock()
            draft = cache.speculate(number, context, max_spec_tokens=depth).token_ids
            spent.append(clock() - begin)
            stop = min(at + _matching(draft, truth, at) + 1, len(truth))
            begin = clock()
            cache.add_active_response(number, call.response_ids[at:stop])
            spent.append(clock() - begin)
            at, steps = stop, steps + 1
        begin = clock()
        cache.stop_request(number)
        spent.append(clock() - begin)
    return spent, steps, prompts


class _Lane:
    """One of many concurrent requests: what it has said so far."""

    __slots__ = ("at", "number", "response", "text", "truth")

    def __init__(self, number: int, call: TokenCall) -> None:
        self.number, self.response, self.at = number, call.response_ids, 0
        self.truth = call.response_ids.tolist()
        self.text = np.concatenate([call.prompt_ids, call.response_ids])


def _run_lanes(
    calls: Sequence[TokenCall],
    width: int,
    start: Callable[[int, IntArray], None],
    step: Callable[[list[_Lane], list[IntArray]], tuple[list[float], list[list[int]]]],
    stop: Callable[[_Lane, IntArray], float],
) -> Times:
    """Keep ``width`` requests going until fewer are left."""
    queue = list(enumerate(calls))[::-1]
    lanes: list[_Lane] = []
    new: list[IntArray] = []
    spent: list[float] = []
    steps = 0
    while queue or lanes:
        while queue and len(lanes) < width:
            number, call = queue.pop()
            start(number, call.prompt_ids)
            lanes.append(_Lane(number, call))
            new.append(np.empty(0, np.int32))
        seconds, drafts = step(lanes, new)
        if len(lanes) == width:  # the tail with fewer requests is not counted
            spent += seconds
            steps += len(lanes)
        going, left = [], []
        for lane, draft in zip(lanes, drafts, strict=True):
            end = min(lane.at + _matching(draft, lane.truth, lane.at) + 1, len(lane.truth))
            ids = lane.response[lane.at : end]
            lane.at = end
            if end < len(lane.truth):
                going.append(lane)
                left.append(ids)
            else:
                spent.append(stop(lane, ids))
        lanes, new = going, left
    return spent, steps, []


def _ours_many(calls: Sequence[TokenCall], width: int) -> Times:
    cache = SuffixCache(max_bytes=1 << 28)
    clock = time.perf_counter

    def step(lanes: list[_Lane], new: list[IntArray]) -> tuple[list[float], list[list[int]]]:
        begin = clock()
        ids = [lane.number for lane in lanes]
        got = cache.step(ids, new, [64] * len(ids), threshold=THRESHOLD, as_tree=False)
        tokens, offsets = got.token_ids.tolist(), got.offsets.tolist()
        drafts = [tokens[a + 1 : b] for a, b in zip(offsets, offsets[1:], strict=False)]
        return [clock() - begin], drafts

    def stop(lane: _Lane, ids: IntArray) -> float:
        begin = clock()
        cache.extend([lane.number], [ids])
        cache.finish(lane.number)
        return clock() - begin

    return _run_lanes(calls, width, lambda n, prompt: cache.start(n, prompt), step, stop)


def _arctic_many(calls: Sequence[TokenCall], width: int) -> Times:
    cache = arctic_cache()
    clock = time.perf_counter

    def step(lanes: list[_Lane], new: list[IntArray]) -> tuple[list[float], list[list[int]]]:
        spent: list[float] = []
        drafts: list[list[int]] = []
        for lane, ids in zip(lanes, new, strict=True):
            end = len(lane.text) - len(lane.truth) + lane.at
            context = lane.text[max(0, end - 64) : end]
            begin = clock()
            if len(ids):
                cache.add_active_response(lane.number, ids)
            drafts.append(cache.speculate(lane.number, context, max_spec_tokens=64).token_ids)
            spent.append(clock() - begin)
        return spent, drafts

    def stop(lane: _Lane, ids: IntArray) -> float:
        begin = clock()
        cache.add_active_response(lane.number, ids)
        cache.stop_request(lane.number)
        return clock() - begin

    return _run_lanes(calls, width, cache.start_request, step, stop)


def host_time(calls: Sequence[TokenCall], widths: Sequence[int], *, passes: int, with_peer: bool) -> dict[str, Any]:
    """Microseconds per request-step (extend, speculate, finish) and per prompt token, least of ``passes`` per call."""
    prompt_tokens = sum(len(call.prompt_ids) for call in calls)
    result: dict[str, Any] = {"prompt_tokens": prompt_tokens, "passes": passes}
    for width in widths:
        arms = {"ours": _ours_one if width == 1 else _ours_many}
        if with_peer:
            arms["arctic"] = _arctic_one if width == 1 else _arctic_many
        least: dict[str, tuple[npt.NDArray[np.float64], int, npt.NDArray[np.float64]]] = {}
        for _ in range(passes):
            for name, arm in arms.items():
                gc.collect()
                spent, steps, prompts = arm(calls, width)
                times, prompt_times = np.array(spent), np.array(prompts)
                if name in least:
                    times = np.minimum(times, least[name][0])
                    prompt_times = np.minimum(prompt_times, least[name][2])
                least[name] = (times, steps, prompt_times)
        row = result[str(width)] = {"request_steps": least["ours"][1]}
        for name, (times, steps, prompt_times) in least.items():
            row[name] = 1e6 * float(times.sum()) / max(steps, 1)
            if width == 1:
                row[f"{name} prompt"] = 1e6 * float(prompt_times.sum()) / prompt_tokens
    return result


def measure_stall(work: Callable[[], None]) -> tuple[float, float]:
    """Run ``work`` in this thread; its milliseconds and the longest pause of another thread meanwhile."""
    longest, running = [0.0], [True]

    def watch() -> None:
        last, going = time.perf_counter(), True
        while going:  # once more after the work: a thread that never ran meanwhile paused all the time
            going = running[0]
            now = time.perf_counter()
            longest[0] = max(longest[0], now - last)
            last = now

    thread = threading.Thread(target=watch)
    thread.start()
    time.sleep(0.02)
    longest[0] = 0.0
    begin = time.perf_counter()
    work()
    spent = time.perf_counter() - begin
    running[0] = False
    thread.join()
    return 1e3 * spent, 1e3 * longest[0]


def long_prompt(text: IntArray, *, passes: int, with_peer: bool) -> dict[str, Any]:
    """A prompt of ``len(text)`` tokens: milliseconds of its insertion and removal, and what other threads feel."""
    result: dict[str, dict[str, float]] = {}
    for _ in range(passes):
        ours = SuffixCache()
        arms: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "ours": (lambda c=ours: c.start(1, text), lambda c=ours: c.finish(1))  # type: ignore[misc]
        }
        if with_peer:
            peer = arctic_cache()
            arms["arctic"] = (lambda c=peer: c.start_request(1, text), lambda c=peer: c.stop_request(1))  # type: ignore[misc]
        for name, (start, stop) in arms.items():
            values = [*measure_stall(start), *measure_stall(stop)]
            old = result.get(name)
            best = values if old is None else [min(a, b) for a, b in zip(values, old.values(), strict=True)]
            result[name] = dict(zip(("start_ms", "start_stall_ms", "stop_ms", "stop_stall_ms"), best, strict=True))
    return {"tokens": len(text), **result}
