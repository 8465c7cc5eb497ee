"""What makes the figures of a run doubtful: each guard is a flag that travels with the result."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

from specdec.bench.metrics import ALL
from specdec.bench.results_schema import BenchResult, Flag, at_load

__all__ = ["OthersLoad", "guard"]

_LOOP_SHARE = 0.3  # a text whose 4-grams are this much alike goes round in circles; real code and prose are above 0.6
_LOOP_LENGTH = 64  # shorter answers may well be "yes, yes, yes"
_MIN_ROUNDS = 3
_SPREAD = 0.15  # (greatest - least) / median of a round's tokens/s
_SLACK = 1.02  # the clock's own error when a speed-up is held against the acceptance length
_OTHERS_SHARE = 0.1  # of the cores: what a desktop at rest stays below


_LEAST_WATCH_S = 0.1


class OthersLoad:
    """How many cores other processes keep busy, from the kernel's counters; created when the watch begins."""

    def __init__(self, *, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._start = perf_counter(), self._busy_s(), _own_s()

    def cores(self) -> float | None:
        """Cores that others kept busy since the beginning; None where the kernel does not say."""
        began, busy_before, own_before = self._start
        busy = self._busy_s()
        if busy is None or busy_before is None:
            return None
        others = (busy - busy_before) - (_own_s() - own_before)
        # The kernel counts in ticks, so a watch of less than a few of them would see all or nothing.
        return max(others, 0.0) / max(perf_counter() - began, _LEAST_WATCH_S)

    def _busy_s(self) -> float | None:
        if not self._stat.exists():
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal: all but idle and iowait are work.
        ticks = [int(word) for word in self._stat.read_text().splitlines()[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def guard(result: BenchResult, *, others: float | None, cores: int) -> list[Flag]:
    """The flags of a finished run.

    Args:
        result: with rows and summaries.
        others: cores that other processes kept busy during the run; None: not known.
        cores: of the machine.
    """
    flags = [
        Flag(code="arm-failed", severity="warning", message=f"{arm.name}: {arm.failure}")
        for arm in result.arms
        if arm.failure
    ]
    flags += _outputs(result)
    if result.mode != "simulate":  # drafts alone are the same in every round, on any machine
        flags += _speed(result)
        flags += _circumstances(result, others, cores)
    if result.is_partial:
        flags.append(Flag(code="partial", severity="warning", message="the run was interrupted"))
    return flags


def _circumstances(result: BenchResult, others: float | None, cores: int) -> Iterable[Flag]:
    rounds = len({row.round for row in result.rows})
    if rounds < _MIN_ROUNDS:
        text = f"{rounds} timed rounds; at least {_MIN_ROUNDS} are needed to see the spread"
        yield Flag(code="few-runs", severity="warning", message=text)
    # A server that is measured over HTTP may well run on this machine.
    if result.mode != "serve" and others is not None and others > _OTHERS_SHARE * cores:
        text = f"the machine was busy: other processes took {others:.2f} of {cores} cores during the run"
        yield Flag(code="busy-machine", severity="warning", message=text)
    failed = [row for row in result.rows if row.error is not None]
    if failed:
        text = f"{len(failed)} of {len(result.rows)} requests failed, the first one: {failed[0].error}"
        yield Flag(code="failed-requests", severity="warning", message=text)


def _speed(result: BenchResult) -> Iterable[Flag]:
    kinds = {arm.name: arm.kind for arm in result.arms}
    pooled = {s.arm: s for s in result.summaries if s.source == ALL}
    for name, s in pooled.items():
        rates = s.tokens_per_s_by_round
        if len(rates) > 1 and (max(rates) - min(rates)) > _SPREAD * statistics.median(rates):
            text = f"{name}: {min(rates):.1f} to {max(rates):.1f} tokens/s between rounds"
            yield Flag(code="spread", severity="warning", message=text)
        for other, speedup in s.speedups.items():
            length = pooled[at_load(other, s.load)].acceptance_length
            if length is None or length > _SLACK or s.acceptance_length is None:
                continue  # the bound is one over plain decoding; a peer's drafting may cost more than it brings
            limit = s.acceptance_length
            if speedup.low <= _SLACK * limit:
                continue
            # Speculation alone cannot be faster than its acceptance length; another code base may be.
            text = f"{name}: {speedup.value:.2f}x over {other} with {limit:.2f}x the tokens per step"
            if kinds.get(name) == kinds.get(at_load(other, s.load)):
                yield Flag(
                    code="speedup-above-acceptance",
                    severity="error",
                    message=f"{text}: speculation cannot bring that, the measurement is wrong",
                )
            else:
                message = f"{text}: a part of it is the engine, not speculation"
                yield Flag(code="speedup-above-acceptance", severity="warning", message=message)


def _outputs(result: BenchResult) -> Iterable[Flag]:
    for arm in result.arms:
        rows = [row for row in result.rows if row.arm == arm.name]
        wrong = [row for row in rows if row.same_output is False]
        if wrong:
            place = f"first in call {wrong[0].call} of {wrong[0].source}"
            text = f"{arm.name}: {len(wrong)} of {len(rows)} outputs are not the expected ones, {place}"
            yield Flag(code="different-output", severity="error", message=text)
    looped = {
        (row.source, row.call)
        for row in result.rows
        if row.output_tokens >= _LOOP_LENGTH and row.distinct_ngrams < _LOOP_SHARE
    }
    if looped:
        calls = len({(row.source, row.call) for row in result.rows})
        text = f"{len(looped)} of {calls} outputs repeat themselves (distinct 4-grams below {_LOOP_SHARE:.0%})"
        yield Flag(code="looped-output", severity="warning", message=text)
