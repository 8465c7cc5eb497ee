"""Measures at the start what a target's forward costs, in seconds of time, over tokens, context and batch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from time import perf_counter

import numpy as np
import torch

from specdec.cost_model import TOKENS, CostModel, CostTable
from specdec.errors import ConfigError
from specdec.protocols import TargetModel
from specdec.types import Chunk, DraftTree, Request, RequestState, SamplingParams

__all__ = ["measure_costs"]

_REPEATS = 3
_GROWTH = len(TOKENS) * (_REPEATS + 1)  # every step commits a token
_PIECE = 256  # prompt tokens per forward while a context is built


def measure_costs(
    target: TargetModel,
    *,
    batches: Sequence[int] = (1, 4, 16),
    contexts: Sequence[int] = (128, 512),
    max_tokens: int = 128,
    max_seconds: float = 5.0,
) -> CostModel:
    """The target's times, measured on itself with made-up prompts; its KV is as before afterwards.

    Small steps of the shortest context come first, so that what matters most is known when the time is up. What was
    not reached follows from what was, by the same rules as any refresh.

    Args:
        target: idle.
        batches: requests per step, ascending.
        contexts: cached tokens per request, ascending.
        max_tokens: most query tokens of a measured step.
        max_seconds: when to stop; the first batch and context are always measured.

    Raises:
        ConfigError: a number is below 1.
    """
    if min(*batches, *contexts, max_tokens) < 1 or not max_seconds > 0:
        raise ConfigError(
            f"sizes must be >= 1 and the time > 0, got {batches}, {contexts}, {max_tokens}, {max_seconds}"
        )
    max_tokens = min(max_tokens, target.max_length // 4)
    longest = target.max_length - max_tokens - _GROWTH
    contexts = [context for context in contexts if context <= longest] or [longest]
    table, begin = CostTable(), perf_counter()
    for context in contexts:  # batches first: they differ more than contexts do
        for batch in batches:
            is_first = not table.is_measured
            if not is_first and perf_counter() - begin > max_seconds:
                return CostModel({"target": table})
            if context < 1 or not target.has_room(batch * (context + max_tokens + _GROWTH)):
                continue
            for tokens, ms in _timed(target, batch, context, max_tokens, begin + max_seconds, is_first):
                table.observe(tokens, context, batch, ms)
    if not table.is_measured:
        raise ConfigError(
            f"this target has no room to measure its costs in: {batches[0]} requests of {contexts[0]} tokens"
        )
    return CostModel({"target": table})


def _timed(
    target: TargetModel, batch: int, context: int, max_tokens: int, end: float, is_first: bool
) -> Iterator[tuple[int, float]]:
    """(query tokens of a step, median milliseconds), from small steps to large ones."""
    states = [_cached_state(target, f"cost-{row}", context) for row in range(batch)]
    try:
        for size in (tokens // batch for tokens in TOKENS if batch <= tokens <= max_tokens and tokens % batch == 0):
            if size > target.max_draft_tokens + 1 or (not is_first and perf_counter() > end):
                break
            times = [_step(target, states, size) for _ in range(_REPEATS + 1)][1:]
            yield size * batch, statistics.median(times)
    finally:
        for state in states:
            target.release(state)


def _cached_state(target: TargetModel, name: str, context: int) -> RequestState:
    """A request whose prompt is cached."""
    prompt = (np.arange(context + 1) * 31 % min(target.vocab_size, 997)).astype(np.int32)
    state = RequestState(Request(name, prompt, SamplingParams(max_new_tokens=_GROWTH)))
    while state.num_cached < context:
        piece = state.token_ids[state.num_cached : min(state.num_cached + _PIECE, context)]
        target.reserve(state, len(piece))
        chunk = Chunk(state, piece, None)
        target.forward([chunk])
        target.commit([chunk], [[]])
        state.num_cached += len(piece)
    return state


def _step(target: TargetModel, states: Sequence[RequestState], size: int) -> float:
    """Milliseconds of one forward over chains of ``size`` nodes; one token is committed, as in a step without luck."""
    chunks = []
    for state in states:
        target.reserve(state, size)
        root = int(state.token_ids[-1])
        chunks.append(Chunk(state, np.empty(0, np.int32), DraftTree.chain(root, [root] * (size - 1))))
    start = perf_counter()
    output = target.forward(chunks)
    if output.logits.is_cuda:
        torch.cuda.synchronize(output.logits.device)
    spent = 1e3 * (perf_counter() - start)
    target.commit(chunks, [[0]] * len(chunks))
    for state in states:
        state.num_cached += 1
        state.append([int(state.token_ids[-1])])
    return spent
