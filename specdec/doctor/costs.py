"""How long a step takes with 0, 1, 3, ... draft tokens, and from which acceptance length on each budget pays.

A step with budget b puts b + 1 tokens per request through the model and emits tau of them; a plain step emits one. So
speculation breaks even at tau = ms(b + 1) / ms(1). On a machine that is bound by memory traffic that ratio stays near 1
for a while; where it starts to climb is the budget worth having.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Final

import numpy as np
import torch

from specdec.doctor.report import BreakEven, Recommendation, StepCosts
from specdec.errors import UnsupportedError
from specdec.protocols import TargetModel
from specdec.types import Chunk, DraftTree, Request, RequestState, SamplingParams

__all__ = ["MAX_STEPS", "break_even", "measure_steps", "recommend"]

_SIZES: Final = (1, 2, 4, 8, 16, 32)  # query tokens per request
_ACCEPTANCES: Final = (0.5, 0.7, 0.9)
_PREFILL_CHUNK: Final = 512
_MAX_ROUNDS: Final = 30
MAX_STEPS: Final = len(_SIZES) * (_MAX_ROUNDS + 1)  # tokens by which each request grows while it is measured


def measure_steps(
    target: TargetModel,
    *,
    batch: int,
    context: int,
    seconds: float,
    device: torch.device,
    on_progress: Callable[[float], None] | None = None,
) -> StepCosts:
    """Time steps in which nothing is accepted, in turn for all sizes, until the time is up.

    Args:
        target: has room for ``batch`` requests of ``context + MAX_STEPS`` tokens.
        batch: requests per step.
        context: tokens per request. Fewer if prefilling takes half of the time.
        seconds: for everything; one measurement of each size is made in any case.
        device: waited for before the clock is read.
        on_progress: told the share of the time that is over.

    Raises:
        UnsupportedError: the target has no room.
    """
    begin = perf_counter()
    states = [_state(f"probe {index}", context, target.vocab_size) for index in range(batch)]
    try:
        reached = _prefill(target, states, context, begin + seconds / 2)
        sizes = [size for size in _SIZES if size - 1 <= target.max_draft_tokens]
        for size in sizes:  # compiles kernels and fills caches
            _step(target, states, size, device)
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(_MAX_ROUNDS):
            for size in sizes:
                times[size].append(_step(target, states, size, device))
            if on_progress is not None:
                on_progress(min((perf_counter() - begin) / seconds, 1.0))
            if perf_counter() - begin > seconds:
                break
    finally:
        for state in states:
            target.release(state)
    costs = break_even({size: median(values) for size, values in times.items()})
    return StepCosts(batch, reached, len(times[1]), costs, recommend(costs))


def break_even(ms: dict[int, float]) -> tuple[BreakEven, ...]:
    """The acceptance length at which each budget pays, from {query tokens: milliseconds}; 1 must be among them."""
    return tuple(BreakEven(size - 1, ms[size], ms[size] / ms[1]) for size in sorted(ms))


def recommend(costs: Sequence[BreakEven]) -> tuple[Recommendation, ...]:
    """The best budget for several acceptance probabilities a.

    A chain of b draft tokens emits (1 - a^(b + 1)) / (1 - a) tokens on average (Leviathan et al. 2023, equation 1).
    Between measured budgets the milliseconds are interpolated linearly.
    """
    budgets = np.arange(costs[-1].budget + 1)
    ms = np.interp(budgets, [cost.budget for cost in costs], [cost.ms for cost in costs])
    found = []
    for acceptance in _ACCEPTANCES:
        speedups = (1 - acceptance ** (budgets + 1)) / (1 - acceptance) * ms[0] / ms
        best = int(np.argmax(speedups))
        found.append(Recommendation(acceptance, best, float(speedups[best])))
    return tuple(found)


def _state(request_id: str, context: int, vocab_size: int) -> RequestState:
    # Any tokens will do; these do not repeat soon. 40503 is 2^16 / golden ratio, and odd.
    ids = (np.arange(context + 1, dtype=np.int64) * 40503 % vocab_size).astype(np.int32)
    return RequestState(Request(request_id, ids, SamplingParams(max_new_tokens=MAX_STEPS)))


def _prefill(target: TargetModel, states: Sequence[RequestState], context: int, deadline: float) -> int:
    """Cache up to ``context`` tokens of every request; how many it became: all requests get the same."""
    num_cached = 0
    while num_cached < context and (num_cached == 0 or perf_counter() < deadline):
        count = min(_PREFILL_CHUNK, context - num_cached)
        for state in states:
            _reserve(target, state, count)
            chunk = Chunk(state, state.token_ids[num_cached : num_cached + count], None)
            target.forward([chunk])
            target.commit([chunk], [[]])
            state.num_cached += count
        num_cached += count
    return num_cached


def _step(target: TargetModel, states: Sequence[RequestState], size: int, device: torch.device) -> float:
    """Milliseconds of one step with ``size`` query tokens per request, of which the root alone is kept."""
    chunks = []
    for state in states:
        root = int(state.token_ids[state.num_cached])
        tree = DraftTree.chain(root, [(root + 1 + index) % target.vocab_size for index in range(size - 1)])
        _reserve(target, state, size)
        chunks.append(Chunk(state, state.token_ids[:0], tree))
    begin = perf_counter()
    target.forward(chunks)
    target.commit(chunks, [[0]] * len(chunks))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = perf_counter() - begin
    for state in states:
        state.num_cached += 1
        if state.num_cached == state.num_tokens:
            state.append([0])
    return 1e3 * elapsed


def _reserve(target: TargetModel, state: RequestState, count: int) -> None:
    if not target.reserve(state, count):
        raise UnsupportedError(f"there is no memory for {count} more tokens of {state.request_id}")
