"""The run: every arm answers every call, A B A B, in rounds; what fails becomes a row that says why.

Rounds begin with stores forgotten (or warmed, where that was asked for) and run through the calls in trace order, so
what a store may know in a call is what it could have known in production: a round never sees the answers of the last.
Within a call the order of the arms turns from call to call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec.bench.arms import Arm, Job, JobResult
from specdec.bench.energy import EnergyMeter
from specdec.bench.loaders import OpenTurn
from specdec.bench.metrics import make_row
from specdec.bench.results_schema import Row, StepMark, Warmth
from specdec.bench.traces import Encode
from specdec.bench.workload import WorkItem, Workload
from specdec.errors import ConfigError, SpecdecError
from specdec.types import IntArray

__all__ = ["Plan", "Run", "run_rounds"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a run goes.

    Args:
        is_live: the model speaks; else the recorded answers are forced.
        rounds: timed rounds.
        max_new_tokens: of a live answer.
        stop_ids: end a live answer.
        warmth: cold forgets before every call, self-warmed before every round, warmed learns ``training`` first.
        training: answered calls for warmed stores.
        decode: tokens to text, for live answers that later prompts quote.
        encode: text to tokens, likewise.
    """

    is_live: bool = False
    rounds: int = 3
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    warmth: Warmth = "self-warmed"
    training: Sequence[WorkItem] = ()
    decode: Callable[[Sequence[int]], str] | None = None
    encode: Encode | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {self.rounds}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(slots=True)
class Run:
    """What came of it."""

    rows: list[Row] = field(default_factory=list)
    timeline: list[StepMark] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    energy_j: dict[str, float] = field(default_factory=dict)
    is_partial: bool = False


def run_rounds(
    arms: Sequence[Arm],
    work: Workload,
    plan: Plan,
    *,
    done_rows: Iterable[Row] = (),
    on_step: Callable[[Run], None] | None = None,
) -> Run:
    """Run all rounds; Ctrl-C ends the run with what there is.

    Args:
        arms: the baseline first: live outputs are compared with its.
        work: the calls.
        plan: how.
        done_rows: of an earlier, interrupted run of the same work; its whole rounds are kept, the rest is done anew.
        on_step: called after every call of every round, with the run so far.
    """
    run = Run(rows=_whole_rounds(list(done_rows), arms, len(work.items)))
    first_round = 1 + max((row.round for row in run.rows), default=-1)
    runner = _Runner(list(arms), work, plan, run)
    try:
        if first_round < plan.rounds:
            runner.warm_the_machine()
        for number in range(first_round, plan.rounds):
            runner.round(number, on_step)
    except KeyboardInterrupt:
        run.is_partial = True
    return run


def _whole_rounds(rows: list[Row], arms: Sequence[Arm], num_calls: int) -> list[Row]:
    """The rows of rounds that lack nothing: stores learn within a round, so half a round cannot be continued."""
    names = {arm.name for arm in arms}
    counts: dict[int, int] = {}
    for row in rows:
        counts[row.round] = counts.get(row.round, 0) + (row.arm in names)
    whole = 0
    while counts.get(whole) == len(names) * num_calls:
        whole += 1
    return [row for row in rows if row.round < whole and row.arm in names]


class _Runner:
    def __init__(self, arms: list[Arm], work: Workload, plan: Plan, run: Run) -> None:
        self.arms, self.work, self.plan, self.run = arms, work, plan, run
        self.expected: dict[int, list[int]] = {}  # live: the first arm's output per call
        self.meter = EnergyMeter()
        self.training = [self._job(number, item) for number, item in enumerate(plan.training)]

    def warm_the_machine(self) -> None:
        """One untimed answer of every arm: first calls compile, allocate and page in."""
        item = min(self.work.items, key=lambda item: len(item.prompt_ids) + len(item.response_ids))
        for arm in list(self.arms):
            self._attempt(arm, self._job(0, item))

    def round(self, number: int, on_step: Callable[[Run], None] | None) -> None:
        if self.plan.warmth != "cold":
            for arm in self.arms:
                self._fresh(arm)
        for index, item in enumerate(self.work.items):
            job = self._job(index, item)
            turn = 0 if index not in self.expected and self.plan.is_live else (number + index) % max(len(self.arms), 1)
            for arm in [*self.arms[turn:], *self.arms[:turn]]:
                if self.plan.warmth == "cold":
                    self._fresh(arm)
                done = self._attempt(arm, job)
                if done is not None:
                    self._record(arm, number, index, item, job, done)
            if on_step is not None:
                on_step(self.run)

    def _fresh(self, arm: Arm) -> None:
        arm.reset()
        if self.plan.warmth == "warmed":
            arm.warm(self.training)

    def _attempt(self, arm: Arm, job: Job) -> JobResult | None:
        if arm.name in self.run.failures:
            return None
        try:
            self.meter.start()
            done = arm.run(job)
            self.run.energy_j[arm.name] = self.run.energy_j.get(arm.name, 0.0) + self.meter.stop()
            return done
        except Exception as error:  # whatever a peer raises is its result, and the others go on
            if arm.kind == "specdec" and not isinstance(error, SpecdecError):
                raise  # a bug of ours is not a benchmark result
            self.run.failures[arm.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.run.rows = [row for row in self.run.rows if row.arm != arm.name]
            logger.warning("arm %s is left out: %s", arm.name, self.run.failures[arm.name])
            return None

    def _job(self, index: int, item: WorkItem) -> Job:
        if not self.plan.is_live:
            return Job(item.prompt_ids, len(item.response_ids), item.response_ids)
        return Job(self._prompt(index, item), self.plan.max_new_tokens, stop_ids=self.plan.stop_ids)

    def _prompt(self, index: int, item: WorkItem) -> IntArray:
        """The prompt, its open turns filled with what was answered to the earlier calls of the episode."""
        if item.parts is None:
            return item.prompt_ids
        if self.plan.encode is None or self.plan.decode is None:
            raise ConfigError("traces without recorded answers need a tokenizer")
        items = self.work.items
        earlier = [i for i in range(index) if (items[i].source, items[i].trace) == (item.source, item.trace)]
        gaps = [part for part in item.parts if isinstance(part, OpenTurn)]
        answers = iter([self.expected.get(i, []) for i in earlier[-len(gaps) :]])
        ids: list[int] = []
        for part in item.parts:
            if isinstance(part, OpenTurn):
                ids += self.plan.encode(part.filled(self.plan.decode(next(answers, []))))
            else:
                ids += self.plan.encode(part) if isinstance(part, str) else part
        return np.array(ids, dtype=np.int32)

    def _record(self, arm: Arm, number: int, index: int, item: WorkItem, job: Job, done: JobResult) -> None:
        if self.plan.is_live:
            expected: Sequence[int] = self.expected.setdefault(index, done.output_ids)
        else:
            expected = item.response_ids.tolist()
        self.run.rows.append(
            make_row(
                done,
                arm=arm.name,
                round=number,
                call=index,
                source=item.source,
                trace=item.trace,
                prompt_tokens=len(job.prompt_ids),
                expected=expected,
            )  # fmt: skip
        )
        first = self.work.items[0]
        if number == 0 and (item.source, item.trace) == (first.source, first.trace):
            starts = [0.0, *done.stamps[:-1]]
            self.run.timeline += [
                StepMark(arm=arm.name, call=index, start_s=round(a, 6), end_s=round(b, 6), emitted=count)
                for a, b, count in zip(starts, done.stamps, done.emitted, strict=True)
            ]
