"""When overlap pays: what the cost tables promise, and what a trial finds.

The tables know what a forward and a draft take alone. Two at a time slow each other down (memory, caches, and on a host
the interpreter), and nobody knows by how much before it was tried. So a promise alone decides nothing: where the tables
promise a gain, stretches of steps with and without overlap take turns, and their tokens per millisecond decide. What a
trial found corrects the promise from then on.

Sources: FASER (2604.20503) chooses chunks from a profile; the trial follows Cascade (2506.20675), with its backoff.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Literal

import numpy as np
import numpy.typing as npt

from specdec.cost_model import CostModel
from specdec.errors import ConfigError
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["AutoOverlap", "FixedOverlap", "OverlapMode", "Trial", "chunk_gains", "halves_gain"]

OverlapMode = Literal["auto", "off", "halves", "chunks"]
_WORTH = 1.05  # a promise below it is not tried
_KEEP = 32  # steps that a promise is used for
_EVERY = 8  # steps of which one is learned from, once there were many
_LEARN = 128  # steps before the first trial
_NO_CHANCE = 0.5  # of a draft token, before anything was accepted, for drafters that state no values
_NEWEST = 0.05
_MOST_LEVELS = 8  # of a chunk
_GAP_MS = 100.0  # a longer pause between two steps is nobody's time


def halves_gain(
    costs: CostModel, num_requests: int, context: float, tokens_each: float = 1.0, *, hidden: float = 1.0
) -> float:
    """How much sooner a step is over in halves: time in sequence over time in halves; 1 where nothing is known.

    Args:
        costs: of a whole step's parts, drafting too.
        num_requests: of the batch.
        context: mean tokens of a request.
        tokens_each: query tokens of a request in a step.
        hidden: share of the shorter of forward and draft that the longer hides, in [0, 1]: 1 for a device beside its
            host, about 0 for two threads of one interpreter, measured by ``specdec.bench.overlap_speed``.
    """
    draft = costs.tables["draft"]
    if num_requests < 2 or not draft.is_measured or not costs.is_measured:
        return 1.0

    def times(share: float) -> tuple[float, float]:
        tokens, requests = share * num_requests * tokens_each, share * num_requests
        return costs.step_ms(tokens, context, requests), draft.at(tokens, context, requests)

    half = times(0.5)
    return sum(times(1.0)) / (2 * (max(half) + (1 - hidden) * min(half)))


def chunk_gains(
    costs: CostModel, trees: Sequence[DraftTree], context: float, chance: float = _NO_CHANCE
) -> npt.NDArray[np.float64]:
    """How much sooner drafts are judged in two parts: time of one forward over that of both.

    The second forward has the rows of those requests only whose first levels hold; with many requests some do nearly
    always. So what is spared is rows, and what is paid is the fixed part of one more forward.

    Args:
        costs: of forwards, measured.
        trees: with values, the chances of paths.
        context: mean tokens of a request.
        chance: of a draft token, for trees without values.

    Returns:
        [D]: by the levels of the first part, 1 to D, the depth of the deepest draft; 1 where that is all of them.
    """
    depths = [tree.depths() for tree in trees]
    deepest = max(int(own.max()) for own in depths)
    num_nodes, chances = np.zeros((2, len(trees), deepest + 2))
    for row, (tree, own) in enumerate(zip(trees, depths, strict=True)):
        values = chance**own if tree.values is None else tree.values
        num_nodes[row, : own.max() + 1] = np.bincount(own)
        chances[row, : own.max() + 1] = np.bincount(own, values)
    num_first = num_nodes.cumsum(axis=1)
    whole, gains = float(num_first[:, -1].sum()), np.ones(deepest)
    some = costs.step_curve(num_first.sum(axis=0)[1:], context, len(trees))
    for levels in range(1, deepest):
        holds = np.minimum(chances[:, levels + 1], 1.0)
        rows = float((holds * (num_first[:, -1] - num_first[:, levels])).sum())
        again = costs.step_ms(max(rows, 1.0), context, max(float(holds.sum()), 1.0))
        both = some[levels - 1] + (1 - np.prod(1 - holds)) * again
        gains[levels - 1] = costs.step_ms(whole, context, len(trees)) / both
    return gains


class FixedOverlap:
    """Always the same (`specdec.overlap.OverlapPolicy`).

    Args:
        mode: ``halves`` or ``chunks``.
        levels: of a chunk, >= 1.

    Raises:
        ConfigError: another mode, or no level.
    """

    def __init__(self, mode: OverlapMode, *, levels: int = 4) -> None:
        if mode not in ("halves", "chunks") or levels < 1:
            raise ConfigError(f"fixed overlap is halves or chunks of >= 1 levels, got {mode!r} and {levels}")
        self._mode, self._levels = mode, levels

    def splits(self, num_requests: int, context: float) -> bool:
        return self._mode == "halves"

    def levels(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> int:
        return self._levels if self._mode == "chunks" else 0

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""


class Trial:
    """Steps without and with something take turns, in stretches; then it stays on or off for a while.

    Args:
        stretch: steps at a time.
        rounds: stretches of each kind.
        keep: steps that a win counts for; a loss counts for as many, and each further one for twice as many.
        worth: ratio of speeds above which it is a win.

    Attributes:
        gain: tokens per millisecond with over without, in the last trial; None: none was finished.
    """

    def __init__(self, *, stretch: int = 16, rounds: int = 3, keep: int = 1024, worth: float = 1.02) -> None:
        self._stretch, self._rounds, self._keep, self._worth = stretch, rounds, keep, worth
        self.gain: float | None = None
        self._pause = keep
        self._is_won = False
        self._left = 0  # steps that the verdict counts for
        self._number = 0  # of the present step in the trial
        self._sums = np.zeros((2, 2))  # (without, with) x (tokens, milliseconds)

    @property
    def is_on(self) -> bool:
        """Whether the present step is one with it."""
        return self._is_won if self._left > 0 else bool(self._number // self._stretch % 2)

    def note(self, tokens: float, ms: float) -> None:
        """A step is over."""
        if self._left > 0:
            self._left -= 1
            return
        if self._number % self._stretch:  # the first step of a stretch still has to do with the last one
            self._sums[int(self.is_on)] += tokens, ms
        self._number += 1
        if self._number == 2 * self._stretch * self._rounds:
            rates = self._sums[:, 0] / np.maximum(self._sums[:, 1], 1e-9)
            self.gain = float(rates[1] / max(rates[0], 1e-9))
            self._is_won = self.gain > self._worth
            self._left = self._keep if self._is_won else self._pause
            self._pause = self._keep if self._is_won else 2 * self._pause
            self._number, self._sums = 0, np.zeros((2, 2))


class AutoOverlap:
    """Overlap where the tables promise it and a trial has found it (`specdec.overlap.OverlapPolicy`).

    Args:
        costs: of this machine, kept by somebody else; None: they are learned here.
        hidden: see ``halves_gain``.
        clock: seconds.
        learn: steps before the first trial.
    """

    def __init__(
        self,
        costs: CostModel | None = None,
        *,
        hidden: float = 1.0,
        clock: Callable[[], float] = perf_counter,
        learn: int = _LEARN,
    ) -> None:
        self._costs, self._learns, self._hidden = costs or CostModel(), costs is None, hidden
        self._clock, self._learn = clock, learn
        self.halves, self.chunks = Trial(), Trial()
        self._promised: dict[str, float] = {"halves": 1.0, "chunks": 1.0}
        self._loss = {"halves": 1.0, "chunks": 1.0}  # how far the last trial stayed behind its promise
        self._number = 0
        self._observed_at: float | None = None
        self._asked: str | None = None  # whose trial this step belongs to
        self._chance = _NO_CHANCE
        self._tokens_each = 1.0
        self._level = 0

    def splits(self, num_requests: int, context: float) -> bool:
        self._asked = None
        if self._number < self._learn:
            return False
        if self._number % _KEEP == 0:
            self._promised["halves"] = halves_gain(
                self._costs, num_requests, context, self._tokens_each, hidden=self._hidden
            )
        return self._try("halves", self.halves)

    def levels(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> int:
        if self._number < self._learn or self._asked is not None:
            return 0
        if self._number % _KEEP == 0:
            self._weigh(states, trees)
        return self._level if self._level and self._try("chunks", self.chunks) else 0

    def _weigh(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> None:
        """What chunks promise; at least a whole step has to cost more than one without drafts."""
        self._level, self._promised["chunks"] = 0, 1.0
        if not self._costs.is_measured:
            return
        context, num_nodes = sum(state.num_tokens for state in states) / len(states), sum(map(len, trees))
        plain, whole = self._costs.step_curve([len(trees), num_nodes], context, len(trees))
        if whole < _WORTH * plain:
            return
        gains = chunk_gains(self._costs, trees, context, self._chance)[:_MOST_LEVELS]
        self._promised["chunks"] = float(gains.max())
        self._level = int(gains.argmax()) + 1 if gains.max() > 1 else 0

    def _try(self, kind: str, trial: Trial) -> bool:
        if self._promised[kind] / self._loss[kind] < _WORTH:
            return False
        self._asked = kind
        return trial.is_on

    def observe(self, events: Sequence[StepEvent]) -> None:
        now, self._number = self._clock(), self._number + bool(events)
        ms = _GAP_MS if self._observed_at is None else 1e3 * (now - self._observed_at)
        self._observed_at = now
        if not events:
            return
        trace, tokens = events[0].trace, sum(len(event.tree) for event in events)
        drafted, accepted = tokens - len(events), sum(event.trace.num_accepted for event in events)
        self._tokens_each += _NEWEST * (tokens / len(events) - self._tokens_each)
        if drafted:
            self._chance += _NEWEST * (min(accepted / drafted, 0.95) - self._chance)
        if self._learns and (self._number <= self._learn or self._number % _EVERY == 0):
            context = sum(event.trace.position for event in events) / len(events)
            for part, spent in (("target", trace.target_ms), ("verify", trace.verify_ms), ("draft", trace.draft_ms)):
                self._costs.tables[part].observe(tokens, context, len(events), spent)
        if self._asked is not None and ms < _GAP_MS:
            self._note(self._asked, sum(event.trace.num_emitted for event in events), ms)

    def _note(self, kind: str, tokens: int, ms: float) -> None:
        trial = self.halves if kind == "halves" else self.chunks
        before = trial.gain
        trial.note(tokens, ms)
        if trial.gain is not None and trial.gain != before:
            self._loss[kind] = max(self._promised[kind] / trial.gain, 1.0)
