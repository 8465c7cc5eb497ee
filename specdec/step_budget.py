"""How many draft tokens a step should verify, given what each is worth and what the step costs.

Of the nodes of all requests, sorted by value (what a node is worth in tokens: ``specdec.token_worth``), a step verifies
the first B, for the B that maximises

    sum of the B best values  -  rate * milliseconds(B)

where ``rate`` is what the engine emits per millisecond at present. A step is made larger only while the tokens that it
adds come faster than the engine makes them anyway; in the long run this maximises tokens per time (Dinkelbach's
condition for the ratio of two sums). B = 0 is plain decoding.

Sources: TETRIS (2502.15197) and vLLM's adaptive verification for one budget over all requests, SmartSpec (2406.14066)
for goodput as the aim, Cascade (2506.20675) for the guard.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from specdec.controller_floor import Floor
from specdec.cost_model import CostModel
from specdec.draft_turns import DraftTurns
from specdec.errors import ConfigError
from specdec.plain_probes import PlainProbes
from specdec.token_worth import attainable_speedups, token_worths
from specdec.tree import FloatArray, IntArray

__all__ = ["StepBudget", "choose_size"]

_NEWEST = 0.03  # share of one step in the speed-up that the rate is made of,
_FIRST_WEIGHT = 6.0  # once there were many; at first it is plain decoding's, as if seen in so many steps
_DEARER, _CHEAPER = 0.05, 0.5  # and in what drafting costs: what disturbs or compiles only adds time
_FIRST_DRAFTS = 6  # steps with drafts before the price of drafting may keep anybody from it
_FIRST_BOOKS = 64  # steps of which all times are kept
# What a further token costs is the difference of two cells of a table, so an error of a tenth in one of them changes it
# by half. A step that doubts it costs a few tokens where the table was right.
_DOUBT_WAIT, _DOUBT_SHARE = 24, 0.25
_KEEP = 8  # steps that prices of one shape are used for: a table moves slowly, and reading it takes time
_FEW = 4  # draft tokens of a request that the price of one is told by
_NO_NODE = 1e9  # a threshold that no value reaches


def choose_size(values: FloatArray, costs_ms: npt.NDArray[np.floating], rate: float) -> int:
    """How many of the nodes to verify.

    Args:
        values: [N] descending: weighted chance that each is accepted.
        costs_ms: [N + 1] of the step that verifies the first 0, 1, ... N of them.
        rate: tokens per millisecond that the engine makes at present.

    Returns:
        The B in [0, N] with the largest ``values[:B].sum() - rate * costs_ms[B]``; of equal ones the smallest.

    Example:
        >>> choose_size(np.array([0.9, 0.5, 0.1], np.float32), np.array([10.0, 11.0, 12.0, 13.0]), rate=0.2)
        2
    """
    gains = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return int(np.argmax(gains - rate * costs_ms))


class StepBudget:
    """The decision of every step and what it learns from it; knows numbers only.

    Args:
        costs: times of the parts; learned from steps where it knows none.
        floor: the least speed against plain decoding that is put up with, in (0, 1]; below it, speculation pauses.
        hysteresis: the value at which nodes are cut off changes only for more than so many tokens per request, >= 0.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(self, costs: CostModel, *, floor: float = 0.97, hysteresis: float = 0.005) -> None:
        if not hysteresis >= 0:
            raise ConfigError(f"hysteresis must be >= 0, got {hysteresis}")
        self.costs = costs
        self.floor = Floor(floor)
        self.turns = DraftTurns()
        self.probes = PlainProbes()
        # The same for sizes that are thought to be dear.
        self.doubts = PlainProbes(max_wait=_DOUBT_WAIT, least_share=_DOUBT_SHARE)
        self._is_doubt = False  # this step is larger than believed best
        self.speedup = 1.0  # of the engine over plain decoding, in the recent past
        self._num_rated = _FIRST_WEIGHT
        self._num_finished = 0
        self._has_drafted = True  # in the last step: a plain one after it is rare, and all its times are kept
        self._draft_ms = np.inf  # for one request
        self._num_drafts = 0  # steps that drafted
        self._num_drafting = 0  # requests of this step
        self._hysteresis = hysteresis
        self._threshold = 0.0  # nodes below it were cut off when it last changed
        self._requests, self._context, self._prefill = 0, 1.0, 0
        self._shape, self._age, self._most = (0, 0, 0), 0, 0  # what the prices below are for, and of which age
        self._curve = np.empty(0)  # [n + 1] milliseconds of this step with 0 to n draft tokens, as long as was asked
        self._plain_ms, self._node_ms = 0.0, 0.0
        self._bulk_ms = 0.0  # a draft token where they are cheapest: among as many as all requests may have
        self._attainable = attainable_speedups(0.0)  # speed-up by the chance of the next token

    def begin(self, num_requests: int, context: float, num_prefill: int, most: int) -> int:
        """A step begins; returns the most draft tokens of one request that could pay even if all were right.

        Args:
            num_requests: that decode.
            context: their mean length in tokens.
            num_prefill: prompt tokens in the same forward.
            most: the largest answer wanted.
        """
        self._requests, self._context, self._prefill = num_requests, context, num_prefill
        shape = (num_requests, num_prefill, most)
        self._age += 1
        if shape != self._shape or self._age >= _KEEP:
            self._shape, self._age = shape, 0
            self._price(most)
        costs, self._num_drafting, self._is_doubt = self.costs, 0, False
        costs.tokens_per_ms = self.speedup * num_requests / max(self._plain_ms, 1e-9)
        costs.tokens_per_node = costs.tokens_per_ms * self._node_ms
        if not self.floor.may_draft() or (num_prefill == 0 and self.probes.is_due(num_requests, context)):
            return 0
        if self._age == 0:
            sure = np.ones(len(self._curve) - 1, np.float32)
            self._most = min(most, choose_size(sure, self._curve, costs.tokens_per_ms))
        return self._most

    def _price(self, most: int) -> None:
        """Read the tables for steps of the present shape."""
        sizes = np.arange(self._requests, self._requests * (1 + most) + 1, dtype=np.float64)
        self._curve = alone = self.costs.step_curve(sizes, self._context, self._requests)
        # Prompt tokens take their time in any case: what a token is worth is told by steps that only decode.
        self._plain_ms = float(alone[0])
        if self._prefill:
            # Beside a prompt, sizes are the rarest and least known: a draft token is not believed to be cheaper there.
            beside = self.costs.step_curve(sizes + self._prefill, self._context, self._requests)
            self._curve = beside[0] + np.maximum(beside - beside[0], alone - alone[0])
        few = min(_FEW, most) * self._requests
        each = (self._curve[1 : few + 1] - self._curve[0]) / np.arange(1, few + 1)
        # At least one each: the price of the first few alone is the difference of two neighbouring cells, mostly noise.
        self._node_ms, self._bulk_ms = (float(each[-1]), float(each[self._requests - 1 :].min())) if few else (0.0, 0.0)
        self._attainable = attainable_speedups(self._node_ms * self._requests / max(self._plain_ms, 1e-9))

    def worths(self, parents: IntArray, values: FloatArray) -> FloatArray:
        """What the nodes [N] of a tree are worth, in tokens, by the chances of their paths; see ``token_worths``."""
        worths: FloatArray = token_worths(parents, values, self._attainable, self.speedup)
        return worths

    def _step_ms(self, num_draft_tokens: int) -> npt.NDArray[np.float64]:
        """[n + 1] milliseconds of this step with 0 to n draft tokens."""
        if num_draft_tokens < len(self._curve):
            return self._curve[: num_draft_tokens + 1]
        fixed = self._requests + self._prefill
        return self.costs.step_curve(np.arange(fixed, fixed + num_draft_tokens + 1), self._context, self._requests)

    def choose(self, values: FloatArray) -> int:
        """How many of the nodes [N], values descending, to verify.

        The threshold of the last step is kept where it is about as good: sizes should not flutter.
        """
        costs, rate = self._step_ms(len(values)), self.costs.tokens_per_ms
        size = self._doubtful_size(values, costs, self._steady_size(values, costs, rate), rate)
        if size:  # sources are charged what their nodes cost in this step, not what few nodes of some step would
            self.costs.tokens_per_node = rate * float(costs[size] - costs[0]) / size
        return size

    def _doubtful_size(self, values: FloatArray, costs: npt.NDArray[np.float64], size: int, rate: float) -> int:
        """Now and then up to twice ``size``, as if further tokens cost what those up to there do.

        A size that is thought to be dear is never verified: nothing else would correct a table that is wrong there.
        """
        self._is_doubt = False
        if not size or self._prefill or not self.doubts.is_due(self._requests, self._context):
            return size
        most = min(2 * size, len(values))
        each = float(costs[size] - costs[0]) / size
        further = choose_size(values[size:most], each * np.arange(most - size + 1), rate)
        self._is_doubt = further > 0
        return size + further

    def _steady_size(self, values: FloatArray, costs: npt.NDArray[np.float64], rate: float) -> int:
        size = choose_size(values, costs, rate)
        as_before = int(np.searchsorted(-values, -self._threshold, side="right"))
        better = float(values[as_before:size].sum() - values[size:as_before].sum())
        better -= rate * float(costs[size] - costs[as_before])
        if better <= self._hysteresis * self._requests:
            return as_before
        self._threshold = float(values[size - 1]) if size else _NO_NODE
        return size

    def judge(self, request_ids: Sequence[str], worths: Sequence[FloatArray]) -> None:
        """Tell the turns what the drafts of this step are worth, verified or not.

        Whether draft tokens pay is often decided by how many there are: the first ones beyond what a kernel takes at
        once are dear, the next ones cheap. So a draft is held against the price at which all requests together could
        have theirs. At the price of this step, whoever drafts alone would not pay, and all would rest for ever.

        Args:
            request_ids: those that were drafted for.
            worths: of the draft tokens of each, in tokens.
        """
        self._num_drafting = len(request_ids)
        if self._num_drafts < _FIRST_DRAFTS:
            return
        rate = self.costs.tokens_per_ms
        for request_id, own in zip(request_ids, worths, strict=True):
            surplus = float(np.maximum(own - rate * self._bulk_ms, 0.0).sum())
            self.turns.note(request_id, surplus, rate * self._draft_ms)

    def finish(self, emitted: int, drafted: int, parts_ms: dict[str, float]) -> None:
        """A step is over.

        Args:
            emitted: tokens of all requests.
            drafted: draft tokens that were verified.
            parts_ms: what the parts took; see ``specdec.cost_model.PARTS``.
        """
        if self._num_drafting:
            self._num_drafts += 1
            self._note_draft_ms(parts_ms.get("draft", 0.0) / self._num_drafting)
        plain_ms, is_known = float(self._step_ms(0)[0]), self.costs.is_measured
        tokens, share = self._requests + self._prefill + drafted, 0.0
        if tokens == self._requests:
            share = self.probes.seen(self._requests, self._context)
        elif self._is_doubt:
            share, self._is_doubt = self.doubts.seen(self._requests, self._context), False
        self._num_finished += 1
        for number, (part, ms) in enumerate(parts_ms.items()):
            # Parts take turns, the target gets every second one: books must not take longer than what they save.
            is_turn = self._num_finished % 2 == 0 if part == "target" else self._num_finished % len(parts_ms) == number
            if is_turn or (share and self._has_drafted) or self._num_finished <= _FIRST_BOOKS:
                self.costs.tables[part].observe(tokens, self._context, self._requests, ms, share=share)
        self._has_drafted = drafted > 0
        if not is_known:
            return
        spent, tokens_each = sum(parts_ms.values()), emitted / self._requests
        speedup = min(tokens_each * plain_ms / spent, 64.0)
        if self._prefill == 0:
            self._num_rated += 1
            newest = max(_NEWEST, 1 / self._num_rated)
            self.speedup = max(1.0, self.speedup + newest * (speedup - self.speedup))
        self.floor.observe(tokens_each, spent, plain_ms, has_drafted=drafted + self._num_drafting > 0)

    def _note_draft_ms(self, ms: float) -> None:
        if self._num_drafts <= _FIRST_DRAFTS or ms < self._draft_ms:
            share = 1.0 if np.isinf(self._draft_ms) else _CHEAPER if ms < self._draft_ms else 0.0
        else:
            share, ms = _DEARER, min(ms, 2 * self._draft_ms)
        self._draft_ms = ms if share == 1.0 else self._draft_ms + share * (ms - self._draft_ms)
