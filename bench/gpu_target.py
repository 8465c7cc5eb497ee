"""Whole steps on a GPU: the engine's plain and verifying steps, their cost curve, and strict numerics."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from specdec.bench.gpu_clock import Clock
from specdec.build import build_engine
from specdec.check.hostile import HostileDrafter
from specdec.engine import Engine
from specdec.kv_cache import Keep
from specdec.query_layout import QueryLayout
from specdec.tree_target import TreeTarget
from specdec.types import Request, SamplingParams

__all__ = ["StepTimer", "curve", "generate_ms", "idle_us", "strict"]

_NOTHING = np.empty(0, dtype=np.int32)


class StepTimer:
    """Runs single forwards of one request behind a context whose K/V are zeros: they cost what real ones cost.

    Args:
        target: without requests.
        clock: of its device.
    """

    def __init__(self, target: TreeTarget, clock: Clock) -> None:
        self.target = target
        self.clock = clock
        self._length = 0

    def set_context(self, length: int) -> None:
        """Cache so many tokens."""
        self.target.pool.release("timed")
        for start in range(0, length, 512):
            count = min(512, length - start)
            assert self.target.pool.reserve("timed", count, length)
            self.target.pool.commit([Keep("timed", count, _NOTHING)])
        self._length = length

    def ms(self, num_tokens: int) -> float:
        """Median milliseconds of a forward over a chain of so many tokens."""
        ids = np.arange(num_tokens) % self.target.vocab_size
        layout = QueryLayout(
            "timed", 0, num_tokens, self._length, self._length + np.arange(num_tokens),
            np.tri(num_tokens, dtype=np.bool_),
        )  # fmt: skip

        def forward() -> None:
            self.target.run([layout], ids, layout.positions, np.arange(num_tokens))

        assert self.target.pool.reserve("timed", num_tokens, self._length + num_tokens)
        try:
            return self.clock.median(forward)
        finally:
            self.target.pool.commit([Keep("timed", 0, _NOTHING)])

    def close(self) -> None:
        """Leave nothing in the target."""
        self.target.pool.release("timed")


def curve(timer: StepTimer, *, sizes: Sequence[int], contexts: Sequence[int]) -> list[dict[str, Any]]:
    """t(tokens) behind every context, in milliseconds of the device."""
    rows = []
    for context in contexts:
        timer.set_context(context)
        rows.append({"context": context, "ms_by_tokens": {str(size): timer.ms(size) for size in sizes}})
    timer.close()
    return rows


def generate_ms(model: Any, clock: Clock, *, context: int, num_new: int) -> float:
    """Milliseconds per token of transformers' ``generate``: the difference of a long and a short run."""
    ids = torch.arange(context, device=clock.device)[None] % model.config.vocab_size
    seconds = {}
    for count in (num_new, 3 * num_new):
        begin = clock.wait()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count
        )
        seconds[count] = clock.wait() - begin
    return 1e3 * (seconds[3 * num_new] - seconds[num_new]) / (2 * num_new)


def idle_us(engine: Engine, clock: Clock, *, context: int, num_new: int) -> dict[str, float]:
    """Plain decoding by the engine: milliseconds per step, and how long the device waits between two steps."""
    marks: list[tuple[Any, Any]] = []
    forward, verify = engine.target.forward, engine.verifier.verify

    def marked_forward(chunks: Any) -> Any:
        marks.append((_mark(clock), None))
        return forward(chunks)

    def marked_verify(*arguments: Any) -> Any:
        result = verify(*arguments)  # has waited for the tokens: the device is idle from here on
        marks[-1] = marks[-1][0], _mark(clock)
        return result

    engine.target.forward = marked_forward  # type: ignore[method-assign]
    engine.verifier.verify = marked_verify  # type: ignore[method-assign, assignment]
    prompt = np.arange(context, dtype=np.int32) % engine.target.vocab_size
    try:
        times = [clock.wait()]
        for _ in engine.generate([Request("idle", prompt, SamplingParams(max_new_tokens=num_new))]):
            times.append(clock.wait())
    finally:
        del engine.target.forward, engine.verifier.verify
    gaps = [_between(clock, a[1], b[0]) for a, b in zip(marks, marks[1:], strict=False) if a[1] is not None]
    steps = [1e3 * (b - a) for a, b in zip(times[2:], times[3:], strict=False)]
    return {"step_ms": statistics.median(steps), "idle_us": statistics.median(gaps[1:])}


def _mark(clock: Clock) -> Any:
    if not clock.is_cuda:
        return clock.wait()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(clock: Clock, first: Any, second: Any) -> float:
    """Microseconds."""
    return 1e3 * float(first.elapsed_time(second)) if clock.is_cuda else 1e6 * (second - first)


def strict(
    model: Any,
    clock: Clock,
    *,
    num_requests: int,
    num_new: int,
    num_prompt: int,
    options: Mapping[str, Any],
    has_time: Callable[[str], bool] = lambda what: True,
) -> dict[str, Any]:
    """Plain against speculative decoding in strict and default numerics, greedy and sampled.

    Drafts are random trees with pieces of the plain output in them, so that all lengths are accepted. Prompts have
    ``num_prompt`` tokens and more; comparisons for which there is no time are left out.

    Returns:
        For each numerics and temperature: compared tokens, those before and at the first difference of their request,
        requests that differ, and seconds of both; with default numerics the differences are its near ties.
    """
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(3, model.config.vocab_size, num_prompt + 5 * i).astype(np.int32) for i in range(num_requests)
    ]
    found: dict[str, Any] = {}
    for numerics in ("strict", "default"):
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            if not has_time(f"{numerics}, {name}"):
                continue
            params = [
                SamplingParams(max_new_tokens=num_new, temperature=temperature, seed=i) for i in range(num_requests)
            ]
            requests = [Request(str(i), *pair) for i, pair in enumerate(zip(prompts, params, strict=True))]
            plain, plain_s = _decode(model, "none", requests, clock, {**options, "numerics": numerics, "budget": 0})
            hostile = HostileDrafter({key: [ids] for key, ids in plain.items()}, model.config.vocab_size)
            drafted, drafted_s = _decode(
                model, hostile, requests, clock, {**options, "numerics": numerics, "budget": 8}
            )
            firsts = [_first_difference(plain[key], drafted[key]) for key in plain]
            num_compared = sum(num_new if first is None else first + 1 for first in firsts)
            num_differ = sum(first is not None for first in firsts)
            found[f"{numerics}, {name}"] = {
                "compared_tokens": num_compared,
                "differing_requests": num_differ,
                "near_ties_per_1000_tokens": 1000 * num_differ / num_compared,
                "plain_s": plain_s,
                "drafted_s": drafted_s,
            }
    return found


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    return next((i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), None)


def _decode(
    model: Any, drafter: Any, requests: Sequence[Request], clock: Clock, options: Mapping[str, Any]
) -> tuple[dict[str, list[int]], float]:
    texts: dict[str, list[int]] = {request.request_id: [] for request in requests}
    with build_engine(model, drafter, **options) as engine:
        begin = clock.wait()
        for output in engine.generate(requests):
            texts[output.request_id] += output.new_ids
        return texts, clock.wait() - begin
