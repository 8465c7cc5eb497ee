"""Several drafters as one: their trees merged by prefix, each source paid for by what it costs and brings.

Free sources (suffix, trie, recycling) draft first. A source that costs time is asked only for those requests where the
tokens that it is expected to add are worth more than its time at the engine's present rate; one that does not pay is
left out for twice as many steps each time, and then tried again. What a source adds is measured, not assumed: the
accepted tokens that no other source had, less what its own nodes cost to verify. Every source sees every outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from specdec.cost_model import CostModel
from specdec.drafters.acceptance import MAX_SOURCES, AcceptanceModel, MergedTree, ReliabilityBin
from specdec.errors import ConfigError
from specdec.protocols import Drafter, DrafterNeeds, PrunesDrafts
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["FusedDrafter"]

_LEVELS = 4  # buckets of what the sources before already promise: under 0.5, 1, 2 tokens, more
_EDGES = (0.5, 1.0, 2.0)
_NEWEST = 0.05  # share of a new observation of times
# Text is copied in stretches: a source adds nothing for dozens of steps and then several tokens in one. Its gain is a
# mean over hundreds of steps, or a lull would end the source.
_NEWEST_GAIN = 0.005
_FIRST_GAIN = 1.0  # accepted tokens that a source is believed to add before it was tried,
_FIRST_WEIGHT = 4.0  # as if seen in so many steps
_TRIALS = 24  # steps that a source is always asked at first
_FIRST_CALLS = 8
_OUTLIER = 4.0  # a call that took so many times what was expected was disturbed, and counts as this much
_MAX_PAUSE = 256  # steps
_SHORT_PAUSE = 16  # of a cheap source: if all rest, nothing is drafted
# Sources leave out nodes that are worth less than this share of what verifying one costs: what nobody would verify only
# spoils the calibration. No source sees far below the second number.
_HOPELESS, _LEAST_VALUE, _MOST_VALUE = 0.5, 0.005, 0.5
_COSTLY = 0.1  # tokens: a source that costs less per request is asked before it is known what the others say


@dataclass(slots=True, eq=False)
class _Source:
    """A drafter and what is known about it."""

    name: str
    drafter: Drafter
    gains: list[float] = field(default_factory=lambda: [_FIRST_GAIN] * _LEVELS)  # by what others promise
    num_gains: list[float] = field(default_factory=lambda: [_FIRST_WEIGHT] * _LEVELS)
    ms_fixed: float = 0.0  # per call
    ms_each: float = 0.0  # per request
    num_calls: int = 0
    observe_ms: float = 0.0  # what its last ``observe`` took: part of its price
    is_asked: bool = False  # in this step
    resting: int = 0  # steps until it is tried again
    pause: int = 1
    pruning: PrunesDrafts | None = field(init=False)  # the drafter, if it can be told how far to look

    def __post_init__(self) -> None:
        self.pruning = self.drafter if isinstance(self.drafter, PrunesDrafts) else None

    def prune(self, price: float) -> None:
        """Let the drafter look as far as verifying a node may pay: for small chances where it costs few tokens."""
        if price > 0 and self.pruning is not None:
            self.pruning.min_value = min(max(_HOPELESS * price, _LEAST_VALUE), _MOST_VALUE)

    def note_time(self, num_requests: int, ms: float) -> None:
        """One call took ``ms``; the share per request is told from calls of different sizes."""
        ms += self.observe_ms
        self.num_calls += 1
        if self.num_calls <= _FIRST_CALLS:  # some of them compile: the least disturbed one counts
            self.ms_each = min(self.ms_each or ms, ms / num_requests)
            return
        error = min(ms, _OUTLIER * self.cost(num_requests)) - self.cost(num_requests)
        share = _NEWEST
        # Half of what is unexplained goes to the call, half to its requests.
        self.ms_fixed = max(self.ms_fixed + share * error / 2, 0.0)
        self.ms_each = max(self.ms_each + share * error / 2 / num_requests, 0.0)

    def cost(self, num_requests: int) -> float:
        """Milliseconds for so many requests."""
        return self.ms_fixed + self.ms_each * num_requests

    def note_gain(self, level: int, gain: float) -> None:
        """One request got ``gain`` accepted tokens that nobody else had, less the price of verifying what was wrong."""
        self.num_gains[level] += 1
        self.gains[level] += max(_NEWEST_GAIN, 1 / self.num_gains[level]) * (gain - self.gains[level])


@dataclass(slots=True, eq=False)
class _Pending:
    """What was proposed for a request."""

    merged: MergedTree | None = None
    level: int = 0  # how much it promises
    asked: list[tuple[int, int]] = field(default_factory=list)  # (source, level when it was asked)


class _Step:
    """The drafts of a step while they are gathered: ``drafts[row][source]``."""

    def __init__(self, states: Sequence[RequestState], budgets: Sequence[int], drafts: list[list[DraftTree]]) -> None:
        self.states, self.budgets, self.drafts = states, budgets, drafts
        self.pending = [_Pending() for _ in states]


class FusedDrafter:
    """Merges what several drafters propose (`specdec.protocols.Drafter`); one drafter alone is calibrated.

    Args:
        sources: (name, drafter), cheapest first: a later one is asked only for what it adds to the earlier ones.
        costs: tells what a millisecond is worth at present; a private model, in which everything is free, if None.

    Raises:
        ConfigError: no source, more than 8, or two with one name.
    """

    def __init__(self, sources: Sequence[tuple[str, Drafter]], *, costs: CostModel | None = None) -> None:
        names = [name for name, _ in sources]
        if not 1 <= len(names) <= MAX_SOURCES or len(set(names)) < len(names):
            raise ConfigError(f"a fused drafter needs 1 to {MAX_SOURCES} different sources, got {', '.join(names)}")
        needs = [drafter.needs for _, drafter in sources]
        self.needs = DrafterNeeds(
            hidden_layers=tuple(sorted({layer for need in needs for layer in need.hidden_layers})),
            needs_match=True,
            num_successors=max(need.num_successors for need in needs),
        )
        self.costs = costs or CostModel()
        self.acceptance = AcceptanceModel(len(names))
        self._sources = [_Source(name, drafter) for name, drafter in sources]
        self._pending: dict[str, _Pending] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources; bit s of a node's ``sources`` stands for name s."""
        return tuple(source.name for source in self._sources)

    @property
    def drafters(self) -> tuple[Drafter, ...]:
        """The sources themselves."""
        return tuple(source.drafter for source in self._sources)

    def start(self, states: Sequence[RequestState]) -> None:
        started: list[_Source] = []
        try:
            for source in self._sources:
                source.drafter.start(states)
                started.append(source)
        except BaseException:
            for source in started:
                source.drafter.stop([state.request_id for state in states])
            raise

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        roots = [DraftTree.root_only(int(state.token_ids[-1])) for state in states]
        wanted = [row for row, budget in enumerate(budgets) if budget > 0]
        if not wanted and not self.needs.hidden_layers:
            return self._rest(states, roots)
        step = _Step(states, budgets, [[root] * len(self._sources) for root in roots])
        cheap = [source for source in self._sources if not self._is_costly(source)]
        for source in cheap:
            self._ask(source, wanted, step)
        self._merge(wanted, step)
        for source in self._sources:
            if source not in cheap and self._ask(source, wanted, step):
                self._merge(wanted, step)
        trees = []
        for row, (state, budget) in enumerate(zip(states, budgets, strict=True)):
            pending = self._pending[state.request_id] = step.pending[row]
            trees.append(roots[row] if pending.merged is None else pending.merged.best(budget))
        return trees

    def _rest(self, states: Sequence[RequestState], roots: list[DraftTree]) -> list[DraftTree]:
        """Nobody is drafted for: such a step should cost what a plain one does."""
        for source in self._sources:
            source.is_asked = False
        for state in states:
            self._pending.pop(state.request_id, None)
        return roots

    def _is_costly(self, source: _Source) -> bool:
        """True if one request's draft costs as much as a good part of a token: then others are heard first."""
        return source.num_calls >= _TRIALS and source.cost(1) * self.costs.tokens_per_ms > _COSTLY

    def _ask(self, source: _Source, wanted: Sequence[int], step: _Step) -> bool:
        """Let a source draft for the requests where that pays; False if it was not asked or had nothing to say."""
        number = self._sources.index(source)
        rows = self._worth_asking(source, wanted, [step.pending[row].level for row in wanted])
        source.is_asked = bool(rows)
        # Who reads hidden states is shown all of them, also for requests for which nothing is drafted.
        shown = list(range(len(step.states))) if source.drafter.needs.hidden_layers else rows
        if not shown:
            return False
        asked = set(rows)
        begin = perf_counter()
        source.prune(self.costs.tokens_per_node)
        made = source.drafter.propose(
            [step.states[row] for row in shown], [step.budgets[row] if row in asked else 0 for row in shown]
        )
        source.note_time(len(shown), 1e3 * (perf_counter() - begin))
        for row, tree in zip(shown, made, strict=True):
            step.drafts[row][number] = tree
            if row in asked:
                step.pending[row].asked.append((number, step.pending[row].level))
        return any(len(tree) > 1 for tree in made)

    def _merge(self, rows: Sequence[int], step: _Step) -> None:
        for row in rows:
            pending = step.pending[row]
            if any(len(tree) > 1 for tree in step.drafts[row]):
                pending.merged = self.acceptance.merge(step.states[row].request_id, step.drafts[row])
                pending.level = _level(pending.merged.expected_accepted)

    def _worth_asking(self, source: _Source, rows: Sequence[int], levels: Sequence[int]) -> list[int]:
        """The requests for which a source's time is well spent."""
        if not rows or source.num_calls < _TRIALS:
            return list(rows)
        # The best n requests are asked, for the n whose gain is most above its price.
        price = self.costs.tokens_per_ms
        order = sorted(range(len(rows)), key=lambda i: -source.gains[levels[i]])
        surplus = best = -price * source.ms_fixed
        count = 0
        for number, i in enumerate(order, start=1):
            surplus += source.gains[levels[i]] - price * source.ms_each
            if surplus > best:
                best, count = surplus, number
        if count and best > 0:
            source.pause, source.resting = 1, 0
            return sorted(rows[i] for i in order[:count])
        if source.resting > 0:
            source.resting -= 1
            return []
        source.pause = min(2 * source.pause, _MAX_PAUSE if self._is_costly(source) else _SHORT_PAUSE)
        source.resting = source.pause
        return list(rows)

    def observe(self, events: Sequence[StepEvent]) -> None:
        price = self.costs.tokens_per_node
        for event in events:
            pending = self._pending.pop(event.state.request_id, None)
            if pending is None:
                continue
            extra = np.zeros(MAX_SOURCES, dtype=np.int32)
            if pending.merged is not None:
                truth = np.append(event.result.accepted_ids, np.int32(event.result.bonus_id)).astype(np.int32)
                accepted = len(event.result.accepted_ids)
                extra = self.acceptance.learn(event.state.request_id, pending.merged, truth, accepted)
            alone = _verified_alone(event.tree)
            for number, level in pending.asked:
                self._sources[number].note_gain(level, float(extra[number]) - price * alone.count(1 << number))
        for source in self._sources:
            if source.is_asked:
                begin = perf_counter()
                source.drafter.observe(events)
                source.observe_ms = 1e3 * (perf_counter() - begin)

    def stop(self, request_ids: Sequence[str]) -> None:
        for source in self._sources:
            source.drafter.stop(request_ids)
        for request_id in request_ids:
            self._pending.pop(request_id, None)
            self.acceptance.forget(request_id)

    def reliability(self) -> list[ReliabilityBin]:
        """Predicted against observed chances; see ``AcceptanceModel.reliability``."""
        return self.acceptance.reliability()

    def costs_and_gains(self) -> dict[str, dict[str, float]]:
        """By source: milliseconds of a call for one request, and mean accepted tokens that only it had."""
        return {source.name: {"ms": source.cost(1), "gain": float(np.mean(source.gains))} for source in self._sources}

    def warmup(self) -> None:
        """Compile everything, so that no request waits for it."""
        model = AcceptanceModel(1)
        chain = DraftTree.chain(0, [1])
        model.learn("", model.merge("", [chain]), np.array([1], np.int32))
        for source in self._sources:
            getattr(source.drafter, "warmup", lambda: None)()


def _verified_alone(tree: DraftTree) -> list[int]:
    """The sources of each draft token that was verified, as bits."""
    return [] if tree.sources is None else tree.sources[1:].tolist()


def _level(expected: float) -> int:
    return sum(expected >= edge for edge in _EDGES)
