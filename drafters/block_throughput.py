"""The draft lengths that bring the most tokens per second, from chances and measured times (DSpark, algorithm 1).

Length 0 is one of them. Where it is the best one for a request, the guess was in vain, and guessing costs as much as a
good part of a step of a small target. So a request may rest: no block is guessed for it until its turn comes again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.cost_model import CostTable
from specdec.draft_turns import DraftTurns
from specdec.drafters.block_guesses import Chains
from specdec.drafters.block_length import Chances, require
from specdec.types import RequestState, StepEvent

__all__ = ["ThroughputLength"]

_EACH = 0.5  # what a further request adds to a draft for one, before any was measured


class ThroughputLength:
    """Sends the tokens of a batch that are worth their time.

    All tokens of all requests are sorted by the chance ``a`` that their whole prefix is accepted, and added while
    ``(requests + sum of a) / (draft time + target time of so many tokens)`` grows (arXiv 2607.05147, algorithm 1). The
    times are measured in every step; until the first one the whole block is sent.

    Args:
        lookahead: 1: take the best of all numbers of tokens, not the first one that the next token does not improve;
            better where times have steps. It anticipates: ``a`` of a later token depends on the earlier ones.
        rest: 1: a request whose blocks bring less than the time of guessing them would elsewhere rests, as
            ``DraftTurns`` has it, and costs no guess meanwhile. It looks at past drafts alone and anticipates nothing.

    Raises:
        ConfigError: an option is neither 0 nor 1.
    """

    mix = 0.0

    def __init__(self, lookahead: int = 0, rest: int = 0) -> None:
        require(lookahead in (0, 1), "lookahead", "0 or 1", lookahead)
        require(rest in (0, 1), "rest", "0 or 1", rest)
        self.anticipates = bool(lookahead)
        self._turns = DraftTurns() if rest else None
        self._target = CostTable()
        self._draft = CostTable(slope=_EACH)  # by requests that are drafted for
        self._num_requests = 0  # of this step
        self._num_drafting = 0

    def may_draft(self, states: Sequence[RequestState]) -> list[bool]:
        self._num_requests, self._num_drafting = len(states), 0
        if self._turns is None:
            return [True] * len(states)
        if len(self._turns) > 2 * len(states) + 64:
            self._turns.keep({state.request_id for state in states})
        return [self._turns.may_draft(state.request_id) for state in states]

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Chances) -> list[int]:
        self._num_drafting, whole = chances.shape
        if not self._draft.is_measured:
            return [whole] * len(states)
        reach = chances.cumprod(axis=1)  # [R, K]
        order = np.argsort(-reach, axis=None, kind="stable")  # a prefix comes before what follows it
        context = float(np.mean([state.num_tokens for state in states]))
        num_requests = max(self._num_requests, len(states))  # those that rest take part in the target's step
        target_ms = self._target.curve(num_requests + np.arange(len(order) + 1), context, num_requests)
        draft_ms = self._draft.at(len(states), context, 1)
        rates = (num_requests + np.concatenate([[0.0], reach.ravel()[order].cumsum()])) / (draft_ms + target_ms)
        if self.anticipates:
            count = int(rates.argmax())
        else:
            worse = np.flatnonzero(rates[1:] <= rates[:-1])
            count = int(worse[0]) if len(worse) else len(order)
        lengths = np.bincount(order[:count] // whole, minlength=len(states))
        if self._turns is not None:
            rate = max(float(rates[count]), num_requests / float(target_ms[0]))
            each = rate * float(target_ms[count] - target_ms[0]) / max(count, 1)
            gains = [float(row[:length].sum()) - each * length for row, length in zip(reach, lengths, strict=True)]
            for state, gain in zip(states, gains, strict=True):
                self._turns.note(state.request_id, gain, rate * draft_ms / len(states))
        return [int(length) for length in lengths]

    def observe(self, events: Sequence[StepEvent]) -> None:
        if not events:
            return
        trace = events[0].trace  # times are of the whole step
        tokens = sum(len(event.tree) for event in events)
        context = float(np.mean([event.trace.position for event in events]))
        self._target.observe(tokens, context, len(events), trace.target_ms + trace.verify_ms + trace.commit_ms)
        num_drafting = max(self._num_drafting, sum(event.tree.num_draft_tokens > 0 for event in events))
        if num_drafting:
            self._draft.observe(num_drafting, context, 1, trace.draft_ms)

    def stop(self, request_ids: Sequence[str]) -> None:
        """Nothing is held of a request but its turn, which is forgotten in time."""
