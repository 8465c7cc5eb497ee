"""The run: every arm answers every call, A B A B, in rounds; what fails becomes a row that says why.

A round goes through the sources one by one. A source begins with stores forgotten (or warmed, where that was asked for)
and runs through its calls in trace order, so what a store may know in a call is what it could have known in production,
and no figure of a source depends on which others were run. Within a call the order of the arms turns from call to call.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from specdec.bench.arms import Arm, Job, JobResult
from specdec.bench.energy import EnergyMeter
from specdec.bench.loaders import OpenTurn
from specdec.bench.metrics import make_row
from specdec.bench.results_schema import Row, StepMark, Warmth
from specdec.bench.workload import Render, WorkItem, Workload
from specdec.errors import ConfigError, InternalError, SpecdecError
from specdec.types import IntArray

__all__ = ["Plan", "Run", "run_rounds"]

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 16  # enough for every shape that a step can have at first to be met


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a run goes.

    Args:
        is_live: the model speaks; else the recorded answers are forced.
        is_timed: False in simulations, where a first untimed answer would serve no purpose.
        temperature: 0 is greedy.
        top_p: 1 = off.
        seed: call number i is sampled with seed + i.
        rounds: timed rounds.
        max_new_tokens: of a live answer.
        stop_ids: end a live answer.
        warmth: cold forgets before every call, self-warmed before every source, warmed learns ``training`` then.
        training: answered calls for warmed stores; a source learns from its own, if there are any.
        decode: tokens to text, for live answers that later prompts quote.
        render: prompts to tokens, likewise.
    """

    is_live: bool = False
    is_timed: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    rounds: int = 3
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    warmth: Warmth = "self-warmed"
    training: Sequence[WorkItem] = ()
    decode: Callable[[Sequence[int]], str] | None = None
    render: Render | None = None

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
    done_failures: Iterable[str] = (),
    done_timeline: Sequence[StepMark] = (),
    on_step: Callable[[Run], None] | None = None,
) -> Run:
    """Run all rounds; Ctrl-C ends the run with what there is.

    Args:
        arms: the baseline first: live outputs are compared with its.
        work: the calls.
        plan: how.
        done_rows: of an earlier, interrupted run of the same work: sources that a round finished are kept.
        done_failures: arms that failed in it.
        done_timeline: of its first episode, kept with its source.
        on_step: called after every call of every round, with the run so far.
    """
    expected = Counter(item.source for item in work.items)
    rows, done = _whole_parts(list(done_rows), {arm.name for arm in arms} - set(done_failures), expected)
    is_drawn = (0, work.items[0].source) in done
    run = Run(rows=rows, timeline=list(done_timeline) if is_drawn else [])
    runner = _Runner(list(arms), work, plan, run)
    todo = [(n, source) for n in range(plan.rounds) for source in expected if (n, source) not in done]
    try:
        if todo and plan.is_timed:
            runner.warm_the_machine()
        for number, source in todo:
            runner.part(number, source, on_step)
    except KeyboardInterrupt:
        run.is_partial = True
    return run


def _whole_parts(
    rows: list[Row], names: set[str], num_calls: Mapping[str, int]
) -> tuple[list[Row], set[tuple[int, str]]]:
    """The rows of the (round, source) parts that lack nothing: stores learn in a part, so half of one is no start."""
    counts = Counter((row.round, row.source) for row in rows if row.arm in names)
    done = {part for part, count in counts.items() if count == len(names) * num_calls.get(part[1], 0)}
    return [row for row in rows if (row.round, row.source) in done and row.arm in names], done


class _Runner:
    def __init__(self, arms: list[Arm], work: Workload, plan: Plan, run: Run) -> None:
        self.arms, self.work, self.plan, self.run = arms, work, plan, run
        self.expected: dict[int, list[int]] = {}  # live: the first arm's output per call
        self.meter = EnergyMeter()

    def warm_the_machine(self) -> None:
        """One untimed answer of every arm: first calls compile, allocate and page in."""
        item = min(self.work.items, key=lambda item: len(item.prompt_ids) + len(item.response_ids))
        job = self._job(0, item)
        short = replace(job, max_new_tokens=min(job.max_new_tokens, _WARM_UP_TOKENS))
        if job.forced_ids is not None:
            short = replace(short, forced_ids=job.forced_ids[:_WARM_UP_TOKENS])
        for arm in list(self.arms):
            self._attempt(arm, [short] * arm.concurrency)

    def part(self, number: int, source: str, on_step: Callable[[Run], None] | None) -> None:
        """One source of one round."""
        alone = [arm for arm in self.arms if arm.concurrency == 1]
        if self.plan.warmth != "cold":
            for arm in alone:
                self._fresh(arm, source)
        mine = [index for index, item in enumerate(self.work.items) if item.source == source]
        for index in mine:
            job = self._job(index, self.work.items[index])
            turn = 0 if index not in self.expected and self.plan.is_live else (number + index) % max(len(alone), 1)
            for arm in [*alone[turn:], *alone[:turn]]:
                if self.plan.warmth == "cold":
                    self._fresh(arm, source)
                self._answer(arm, number, [index], [job])
            if on_step is not None:
                on_step(self.run)
        self._together(number, source, mine, on_step)

    def _together(
        self, number: int, source: str, indices: Sequence[int], on_step: Callable[[Run], None] | None
    ) -> None:
        """The arms that take several calls at a time: each all calls of the source, in turns from round to round."""
        crowds = [arm for arm in self.arms if arm.concurrency > 1]
        jobs = [self._job(index, self.work.items[index]) for index in indices] if crowds else []
        turn = number % max(len(crowds), 1)
        for arm in [*crowds[turn:], *crowds[:turn]]:
            self._fresh(arm, source)
            self._answer(arm, number, indices, jobs)
            if on_step is not None:
                on_step(self.run)

    def _answer(self, arm: Arm, number: int, indices: Sequence[int], jobs: Sequence[Job]) -> None:
        for index, job, done in zip(indices, jobs, self._attempt(arm, jobs), strict=False):
            self._record(arm, number, index, self.work.items[index], job, done)

    def _fresh(self, arm: Arm, source: str) -> None:
        arm.reset()
        if self.plan.warmth == "warmed":
            own = [item for item in self.plan.training if item.source == source] or self.plan.training
            arm.warm([Job(item.prompt_ids, len(item.response_ids), item.response_ids) for item in own])

    def _attempt(self, arm: Arm, jobs: Sequence[Job]) -> list[JobResult]:
        """What the arm did; nothing if it fails now or failed before."""
        if arm.name in self.run.failures:
            return []
        try:
            self.meter.start()
            done = arm.run(jobs)
            self.run.energy_j[arm.name] = self.run.energy_j.get(arm.name, 0.0) + self.meter.stop()
            return done
        except Exception as error:  # whatever a peer raises is its result, and the others go on
            is_meant = isinstance(error, SpecdecError) and not isinstance(error, InternalError)
            if arm.kind == "specdec" and not is_meant:
                raise  # a bug of ours is not a benchmark result
            self.run.failures[arm.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.run.rows = [row for row in self.run.rows if row.arm != arm.name]
            logger.warning("arm %s is left out: %s", arm.name, self.run.failures[arm.name])
            return []

    def _job(self, index: int, item: WorkItem) -> Job:
        plan = self.plan
        law = {"temperature": plan.temperature, "top_p": plan.top_p, "seed": plan.seed + index}
        if not plan.is_live:
            return Job(item.prompt_ids, len(item.response_ids), item.response_ids, **law)  # type: ignore[arg-type]
        return Job(self._prompt(index, item), plan.max_new_tokens, stop_ids=plan.stop_ids, **law)  # type: ignore[arg-type]

    def _prompt(self, index: int, item: WorkItem) -> IntArray:
        """The prompt, its open turns filled with what was answered to the earlier calls of the episode."""
        if item.parts is None:
            return item.prompt_ids
        if self.plan.render is None or self.plan.decode is None:
            raise ConfigError("traces without recorded answers need a tokenizer")
        items = self.work.items
        earlier = [i for i in range(index) if (items[i].source, items[i].trace) == (item.source, item.trace)]
        gaps = [part for part in item.parts if isinstance(part, OpenTurn)]
        answers = iter([self.expected.get(i, []) for i in earlier[-len(gaps) :]])
        parts = [
            part.filled(self.plan.decode(next(answers, []))) if isinstance(part, OpenTurn) else part
            for part in item.parts
        ]
        return np.array(self.plan.render(parts), dtype=np.int32)

    def _record(self, arm: Arm, number: int, index: int, item: WorkItem, job: Job, done: JobResult) -> None:
        expected: Sequence[int] | None = item.response_ids.tolist()
        if self.plan.is_live:
            expected = self.expected.setdefault(index, done.output_ids)
            if self.plan.temperature and arm.kind == "transformers":
                expected = None  # it draws its own noise: the law is the same, the text is not
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
                load=f"x{arm.concurrency}" if arm.concurrency > 1 else "",
            )  # fmt: skip
        )
        first = self.work.items[0]
        if number == 0 and arm.concurrency == 1 and (item.source, item.trace) == (first.source, first.trace):
            starts = [0.0, *done.stamps[:-1]]
            self.run.timeline += [
                StepMark(arm=arm.name, call=index, start_s=round(a, 6), end_s=round(b, 6), emitted=count)
                for a, b, count in zip(starts, done.stamps, done.emitted, strict=True)
            ]
