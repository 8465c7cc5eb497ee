"""The draft lengths that bring the most tokens per second, from chances and measured times (DSpark, algorithm 1).

Length 0 is one of them. Where it is the best one for a request, the guess was in vain, and guessing costs as much as a
good part of a step of a small target. So a request may rest: no block is guessed for it until its turn comes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.cost_model import CostTable
from specdec.drafters.block_guesses import Chains
from specdec.drafters.block_length import Chances, require
from specdec.types import RequestState, StepEvent

__all__ = ["ThroughputLength"]

_EACH = 0.5  # what a further request adds to a draft for one, before any was measured
_NEWEST = 0.5  # share of a new block in what a request's blocks are worth
_MOST_REST = 32  # steps
_REST_FOR_TRIAL = 8.0  # a first trial that brings nothing is followed by a rest of so many times its own time
_LIKELY = 0.5  # a trial sends the tokens that are accepted as likely as not
_TRIAL_SHARE = 0.5  # of its times in what steps of its size are believed to take


@dataclass(slots=True)
class _Turn:
    """When a request is guessed for: at once, and after every block in vain twice as many steps later.

    The dearer a block beside a step, the longer the first rest: a large target hardly feels a trial, and asks again in
    the next step; a small one takes as long for a step as its head for a block.
    """

    worth: float = 0.0  # tokens above the price of a guess, of its recent blocks
    rest: int = 0
    left: int = 0  # steps
    is_new: bool = True  # no block was guessed yet

    def comes(self) -> bool:
        self.left -= 1
        return self.left < 0

    @property
    def is_near(self) -> bool:
        """Half of the rest is over."""
        return 2 * self.left < self.rest

    def note(self, surplus: float, first_rest: int) -> None:
        self.worth = self.worth + _NEWEST * (surplus - self.worth) if self.worth > 0 else surplus
        self.rest = 0 if self.worth > 0 else min(max(2 * self.rest, first_rest), _MOST_REST)
        self.left = self.rest


class ThroughputLength:
    """Sends the tokens of a batch that are worth their time.

    All tokens of all requests are sorted by the chance ``a`` that their whole prefix is accepted, and added while
    ``(requests + sum of a) / (draft time + target time of so many tokens)`` grows (arXiv 2607.05147, algorithm 1). The
    times are measured in every step that reads no prompt; until the first one the whole block is sent.

    Args:
        lookahead: 1: take the best of all numbers of tokens, not the first one that the next token does not improve;
            better where times have steps. It anticipates: ``a`` of a later token depends on the earlier ones.
        rest: 1: a request whose blocks bring less than the time of guessing them would elsewhere rests, and costs no
            guess meanwhile: at first for some times the time of the block, then for twice as long each time, at most 32
            steps (the back-off of Cascade, arXiv 2506.20675, by request). A pass that only tries serves all who have
            half of their rest behind them. It looks at past blocks alone and anticipates nothing. The first block after
            a rest sends what is likely whatever the times say, and renews them: a size that was slow once would else
            never be tried again.

    Raises:
        ConfigError: an option is neither 0 nor 1.
    """

    mix = 0.0

    def __init__(self, lookahead: int = 0, rest: int = 0) -> None:
        require(lookahead in (0, 1), "lookahead", "0 or 1", lookahead)
        require(rest in (0, 1), "rest", "0 or 1", rest)
        self.anticipates = bool(lookahead)
        self._rests = bool(rest)
        self._turns: dict[str, _Turn] = {}
        self._target = CostTable()
        self._draft = CostTable(slope=_EACH)  # by requests that are drafted for
        self._trials: set[str] = set()  # who is guessed for in this step, after a rest or for the first time
        self._num_requests = 0  # of this step
        self._num_drafting = 0
        self._reads_prompts = False

    def may_draft(self, states: Sequence[RequestState]) -> list[bool]:
        self._num_requests, self._num_drafting, self._reads_prompts = len(states), 0, False
        if not self._rests:
            return [True] * len(states)
        turns = [self._turns.setdefault(state.request_id, _Turn()) for state in states]
        may = [turn.comes() for turn in turns]
        if any(may) and not any(turn.worth > 0 for turn in turns):
            may = [comes or turn.is_near for comes, turn in zip(may, turns, strict=True)]
        ready = zip(states, turns, may, strict=True)
        self._trials = {state.request_id for state, turn, comes in ready if comes and turn.worth <= 0}
        return may

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Chances) -> list[int]:
        self._num_drafting, whole = chances.shape
        for state in states:
            turn = self._turns.setdefault(state.request_id, _Turn())
            self._reads_prompts |= turn.is_new  # the head has read the whole text before its first block
            turn.is_new = False
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
        if self._rests:
            rate = max(float(rates[count]), num_requests / float(target_ms[0]))
            each = rate * float(target_ms[count] - target_ms[0]) / max(count, 1)
            is_trial = [state.request_id in self._trials for state in states]
            worth = [float(row[:length].sum()) - each * length for row, length in zip(reach, lengths, strict=True)]
            self._note_turns(states, is_trial, worth, reach.sum(axis=1), rate, context, float(target_ms[0]))
            likely = (reach >= _LIKELY).sum(axis=1)
            lengths = np.where(is_trial, np.maximum(lengths, likely), lengths)
        return [int(length) for length in lengths]

    def _note_turns(
        self,
        states: Sequence[RequestState],
        is_trial: Sequence[bool],
        worth: Sequence[float],
        expected: Sequence[float],
        rate: float,
        context: float,
        step_ms: float,
    ) -> None:
        """Who goes on drafting, and how long the others rest.

        Args:
            states: R requests that a block was guessed for.
            is_trial: [R], after a rest or for the first time.
            worth: [R], tokens that what is sent is expected to bring, less those that its verification costs.
            expected: [R], tokens of the whole block that are expected to be accepted.
            rate: tokens per millisecond that are to be had.
            context: mean tokens of a request.
            step_ms: of the target without drafts.
        """
        num_trials = sum(is_trial)
        num_paying = len(states) - num_trials
        draft_ms = self._draft.at(len(states), context, 1)
        trial_price = rate * draft_ms / len(states)
        # A pass that would not be made without them is paid for by those who draft in every step.
        paying_price = rate * self._draft.at(num_paying, context, 1) / num_paying if num_paying else 0.0
        trial_steps = num_trials / len(states) * draft_ms / step_ms
        for state, on_trial, brings, tokens in zip(states, is_trial, worth, expected, strict=True):
            price = trial_price if on_trial else paying_price
            lost = max(0.0, 1 - tokens / price)  # who nearly pays is asked again soon
            turn = self._turns[state.request_id]
            turn.note(brings - price, max(1, round(_REST_FOR_TRIAL * trial_steps * lost)))

    def observe(self, events: Sequence[StepEvent]) -> None:
        if not events:
            return
        hidden = events[0].output.hidden
        trace = events[0].trace  # times are of the whole step
        tokens = sum(len(event.tree) for event in events)
        context = float(np.mean([event.trace.position for event in events]))
        if hidden is not None and len(hidden) > tokens:  # a prompt's tokens were beside them
            return
        share = _TRIAL_SHARE if self._num_drafting and self._trials else 0.0
        target_ms = trace.target_ms + trace.verify_ms + trace.commit_ms
        self._target.observe(tokens, context, len(events), target_ms, share=share)
        num_drafting = max(self._num_drafting, sum(event.tree.num_draft_tokens > 0 for event in events))
        if num_drafting and not self._reads_prompts:
            self._draft.observe(num_drafting, context, 1, trace.draft_ms, share=share)

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._turns.pop(request_id, None)
