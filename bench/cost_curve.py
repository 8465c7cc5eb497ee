"""What a target step costs by the number of tokens in it: how many draft tokens come for free on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch

from specdec.bench.workload import Workload
from specdec.controller import FixedController
from specdec.engine import Engine
from specdec.protocols import DrafterNeeds
from specdec.types import DraftTree, IntArray, Request, RequestState, SamplingParams, StepEvent, StepTrace

__all__ = ["STEP_SIZES", "cost_curve", "step_costs"]

STEP_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tokens in a step, the root included


def cost_curve(engine: Engine, work: Workload, *, repeats: int = 5) -> list[tuple[int, float]]:
    """(tokens in one target step, median milliseconds) behind a prompt of the workload's median length."""
    items = sorted(work.items, key=lambda item: len(item.prompt_ids))
    prompt = items[len(items) // 2].prompt_ids
    costs = step_costs(engine, prompt, STEP_SIZES, repeats=repeats)
    return [(size, statistics.median(times)) for size, times in costs.items()]


def step_costs(engine: Engine, prompt_ids: IntArray, sizes: Sequence[int], *, repeats: int) -> dict[int, list[float]]:
    """Milliseconds of the target's forward by tokens in the step, the sizes in turn, after one untimed turn.

    Args:
        engine: idle; drafter, controller and observers are as before afterwards.
        prompt_ids: [P] int32.
        sizes: tokens per step, each >= 1.
        repeats: timed turns.
    """
    order = [size for _ in range(repeats + 1) for size in sizes]
    recorder = _Recorder()
    drafter, controller = engine.drafter, engine.controller
    engine.drafter, engine.controller = _FixedChains(order), FixedController(max(sizes))
    engine.observers.append(recorder)
    try:
        # Nothing is accepted, so each step emits one token; at the end there must be room for the longest chain.
        sampling = SamplingParams(max_new_tokens=len(order) + max(sizes) + 1, logits_processors=(_never_zero,))
        for _ in engine.generate([Request("cost-curve", np.asarray(prompt_ids), sampling)]):
            if len(recorder.traces) >= len(order):
                break
    finally:
        engine.observers.remove(recorder)
        engine.drafter, engine.controller = drafter, controller
    costs: dict[int, list[float]] = {size: [] for size in sizes}
    for trace in recorder.traces[len(sizes) : len(order)]:
        costs.setdefault(trace.num_draft_tokens + 1, []).append(trace.target_ms)
    return {size: times for size, times in costs.items() if times}


def _never_zero(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Rules out the token that is guessed, so that every guess is wrong and every step costs its size."""
    scores[:, 0] = -float("inf")
    return scores


class _Recorder:
    """Keeps the figures of every step (`specdec.protocols.Observer`)."""

    def __init__(self) -> None:
        self.traces: list[StepTrace] = []

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.traces.extend(event.trace for event in events)


class _FixedChains:
    """Proposes chains of token 0 of given sizes (`specdec.protocols.Drafter`)."""

    needs = DrafterNeeds()

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = iter(sizes)

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing to prepare."""

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        return [
            DraftTree.chain(int(state.token_ids[-1]), [0] * min(next(self._sizes, 1) - 1, budget))
            for state, budget in zip(states, budgets, strict=True)
        ]

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Nothing to forget."""
