"""The draft lengths that bring the most tokens per second, from chances and measured times (DSpark, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.cost_model import CostTable
from specdec.drafters.block_guesses import Chains
from specdec.drafters.block_length import Chances
from specdec.types import RequestState, StepEvent

__all__ = ["ThroughputLength"]

_NEWEST = 0.1  # share of a new observation in the time of a draft
_OUTLIER = 4.0  # a draft that took so many times the average was disturbed


class ThroughputLength:
    """Sends the tokens of a batch that are worth their time.

    All tokens of all requests are sorted by the chance ``a`` that their whole prefix is accepted, and added while
    ``(requests + sum of a) / (draft time + target time of so many tokens)`` grows (arXiv 2607.05147, algorithm 1). The
    times are measured in every step; until the first one the whole block is sent.

    Args:
        lookahead: 1: take the best of all numbers of tokens, not the first one that the next token does not improve;
            better where times have steps. It anticipates: ``a`` of a later token depends on the earlier ones.
    """

    mix = 0.0

    def __init__(self, lookahead: int = 0) -> None:
        self.anticipates = bool(lookahead)
        self._target = CostTable()
        self._draft_ms: float | None = None

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Chances) -> list[int]:
        num_requests, whole = chances.shape
        if self._draft_ms is None:
            return [whole] * num_requests
        reach = chances.cumprod(axis=1)  # [R, K]
        order = np.argsort(-reach, axis=None, kind="stable")  # a prefix comes before what follows it
        context = float(np.mean([state.num_tokens for state in states]))
        costs = self._draft_ms + self._target.curve(num_requests + np.arange(len(order) + 1), context, num_requests)
        tokens = num_requests + np.concatenate([[0.0], reach.ravel()[order].cumsum()])
        rates = tokens / costs
        if self.anticipates:
            count = int(rates.argmax())
        else:
            worse = np.flatnonzero(rates[1:] <= rates[:-1])
            count = int(worse[0]) if len(worse) else len(order)
        lengths: list[int] = np.bincount(order[:count] // whole, minlength=num_requests).tolist()
        return lengths

    def observe(self, events: Sequence[StepEvent]) -> None:
        if not events:
            return
        trace = events[0].trace  # times are of the whole step
        tokens = sum(len(event.tree) for event in events)
        context = float(np.mean([event.trace.position for event in events]))
        self._target.observe(tokens, context, len(events), trace.target_ms + trace.verify_ms + trace.commit_ms)
        if all(event.tree.num_draft_tokens == 0 for event in events):
            return  # a prompt's own step, or one without a budget
        if self._draft_ms is None:
            self._draft_ms = trace.draft_ms
        new = min(trace.draft_ms, _OUTLIER * self._draft_ms)
        self._draft_ms += _NEWEST * (new - self._draft_ms)

    def stop(self, request_ids: Sequence[str]) -> None:
        """Nothing is held of a request."""
