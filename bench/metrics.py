"""From rows to figures, and what makes a figure doubtful.

Totals, never means of ratios, unless a name says otherwise: tokens per second are all tokens over all seconds, and the
acceptance length is all emitted tokens over all steps, the bonus included (plain decoding has 1). Where the field
measures something else under the same name, both are given: vLLM's length counts only the steps that drafted,
SpecForge's is the unweighted mean of the requests' own.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from specdec.bench.arms import JobResult
from specdec.bench.results_schema import BenchResult, Flag, Percentiles, Row, Speedup, Summary
from specdec.types import IntArray

__all__ = ["ALL", "distinct_ngrams", "guard", "make_row", "speedup_interval", "summarize"]

ALL = "all"  # the pooled source
_NGRAM = 4
_NUM_RESAMPLES = 2000  # the 2.5 % point of the bootstrap is then known to about a tenth of the interval's width
_LOOP_SHARE = 0.3  # a text whose 4-grams are this much alike goes round in circles; real code and prose are above 0.6
_LOOP_LENGTH = 64  # shorter answers may well be "yes, yes, yes"
_MIN_ROUNDS = 3
_SPREAD = 0.15  # (greatest - least) / median of a round's tokens/s
_SLACK = 1.02  # the clock's own error when a speed-up is held against the acceptance length


def distinct_ngrams(ids: Sequence[int]) -> float:
    """Distinct 4-grams / all 4-grams; 1 for a text too short to have any."""
    grams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def make_row(
    done: JobResult, *, arm: str, round: int, call: int, source: str, trace: str, prompt_tokens: int,
    expected: IntArray | Sequence[int] | None,
) -> Row:  # fmt: skip
    """The row of one finished job.

    Args:
        done: what the arm did.
        arm: its name.
        round: of the benchmark.
        call: index of the call.
        source: of the call.
        trace: of the call.
        prompt_tokens: P.
        expected: the output that was due, or None if nothing can be said.
    """
    histogram = np.bincount(done.accepted, minlength=1).tolist()
    deepest = max(done.depths, default=0)
    drafting = [(depth, accepted) for depth, accepted in zip(done.depths, done.accepted, strict=False) if depth]
    return Row(
        arm=arm,
        round=round,
        call=call,
        source=source,
        trace=trace,
        prompt_tokens=prompt_tokens,
        output_tokens=len(done.output_ids),
        seconds=done.seconds,
        first_token_s=done.stamps[0] if done.stamps else done.seconds,
        num_steps=len(done.emitted),
        num_accepted=sum(done.accepted),
        num_drafted=sum(done.drafted) if done.drafted else None,
        accepted_histogram=histogram,
        reached=[sum(depth >= i for depth, _ in drafting) for i in range(1, deepest + 1)],
        reached_after=[sum(depth >= i and got >= i - 1 for depth, got in drafting) for i in range(1, deepest + 1)],
        num_drafting_steps=len(drafting),
        parts_ms=done.parts_ms,
        output_sha256=hashlib.sha256(np.asarray(done.output_ids, dtype=np.int32).tobytes()).hexdigest(),
        same_output=None if expected is None else list(expected) == done.output_ids,
        distinct_ngrams=distinct_ngrams(done.output_ids),
    )


def summarize(
    rows: Sequence[Row], references: Sequence[str], *, seed: int = 0, slo_ms: tuple[float, float] | None = None
) -> list[Summary]:
    """One summary per arm and source, and per arm over all sources.

    Args:
        rows: of the whole run.
        references: the arms that speed-ups are against, the baseline first.
        seed: of the bootstrap.
        slo_ms: (most milliseconds to the first token, most per further token) for goodput.
    """
    arms = list(dict.fromkeys(row.arm for row in rows))
    sources = list(dict.fromkeys(row.source for row in rows))
    summaries = []
    for source in [ALL, *sources] if len(sources) > 1 else sources or [ALL]:
        inside = [row for row in rows if source in (ALL, row.source)]
        theirs = {name: [row for row in inside if row.arm == name] for name in references}
        for arm in arms:
            mine = [row for row in inside if row.arm == arm]
            if mine:
                summaries.append(_summary(arm, source, mine, theirs, seed, slo_ms))
    return summaries if len(sources) > 1 else [*summaries, *(s.model_copy(update={"source": ALL}) for s in summaries)]


def _summary(
    arm: str,
    source: str,
    rows: list[Row],
    references: Mapping[str, list[Row]],
    seed: int,
    slo_ms: tuple[float, float] | None,
) -> Summary:
    seconds, tokens = sum(r.seconds for r in rows), sum(r.output_tokens for r in rows)
    steps = sum(r.num_steps for r in rows)
    drafting = sum(r.num_drafting_steps for r in rows)
    accepted = sum(r.num_accepted for r in rows)
    drafted = [r.num_drafted for r in rows]
    shown = sum(d or 0 for d in drafted)
    histogram = _added(r.accepted_histogram for r in rows)
    at_least = [sum(histogram[i:]) for i in range(1, len(histogram))]
    reached_after = _added(r.reached_after for r in rows)
    base = next(iter(references.values()), [])
    found = {name: speedup_interval(rows, theirs, seed=seed) for name, theirs in references.items() if name != arm}
    rates = [r.output_tokens / r.seconds for r in rows]
    return Summary(
        arm=arm,
        source=source,
        num_calls=len({r.call for r in rows}),
        num_runs=len(rows),
        output_tokens=tokens,
        tokens_per_s=tokens / seconds,
        tokens_per_s_by_round=_by_round(rows),
        speedups={name: speedup for name, speedup in found.items() if speedup is not None},
        mean_of_ratios=statistics.mean(rates) / statistics.mean(r.output_tokens / r.seconds for r in base)
        if base
        else None,
        acceptance_length=tokens / max(steps, 1),
        acceptance_length_drafting=1 + accepted / drafting if drafting else None,
        acceptance_length_per_request=statistics.mean(r.output_tokens / max(r.num_steps, 1) for r in rows),
        acceptance_rate=None if None in drafted or not shown else accepted / shown,
        accepted_at=[count / drafting for count in at_least] if drafting else [],
        accepted_at_given=[count / reached for count, reached in zip(at_least, reached_after, strict=False) if reached],
        accepted_histogram=histogram,
        parts_ms_per_token={
            name: sum(r.parts_ms.get(name, 0.0) for r in rows) / max(tokens, 1) for name in rows[0].parts_ms
        },
        ttft_ms=_percentiles([1e3 * r.first_token_s for r in rows]),
        tpot_ms=_percentiles([_tpot_ms(r) for r in rows if r.output_tokens > 1] or [0.0]),
        goodput_per_s=None if slo_ms is None else sum(_is_within(r, slo_ms) for r in rows) / seconds,
        same_output=_share([r.same_output for r in rows if r.same_output is not None]),
    )


def _tpot_ms(row: Row) -> float:
    return 1e3 * (row.seconds - row.first_token_s) / max(row.output_tokens - 1, 1)


def _is_within(row: Row, slo_ms: tuple[float, float]) -> bool:
    return 1e3 * row.first_token_s <= slo_ms[0] and _tpot_ms(row) <= slo_ms[1]


def _share(answers: Sequence[bool]) -> float | None:
    return sum(answers) / len(answers) if answers else None


def _added(lists: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*lists, fillvalue=0)]


def _percentiles(values: Sequence[float]) -> Percentiles:
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Percentiles(p50=p50, p90=p90, p99=p99)


def _by_round(rows: Sequence[Row]) -> list[float]:
    totals: dict[int, list[float]] = {}
    for row in rows:
        sums = totals.setdefault(row.round, [0.0, 0.0])
        sums[0] += row.output_tokens
        sums[1] += row.seconds
    return [tokens / seconds for _, (tokens, seconds) in sorted(totals.items())]


def speedup_interval(rows: Sequence[Row], base: Sequence[Row], *, seed: int = 0) -> Speedup | None:
    """Speed-up of pooled tokens/s and its 95 % bootstrap interval.

    Only (round, call) pairs that both arms finished count. Episodes are resampled, not calls: the calls of one episode
    are alike, and to take them for independent would make the interval too narrow.

    Returns:
        None without a pair.
    """
    theirs = {(r.round, r.call): r for r in base}
    pairs = [(r, theirs[r.round, r.call]) for r in rows if (r.round, r.call) in theirs]
    if not pairs:
        return None
    names = sorted({(mine.source, mine.trace) for mine, _ in pairs})
    place = {name: index for index, name in enumerate(names)}
    sums = np.zeros((len(names), 4))  # tokens and seconds, mine and theirs
    for mine, other in pairs:
        sums[place[mine.source, mine.trace]] += (mine.output_tokens, mine.seconds, other.output_tokens, other.seconds)
    draws = np.random.default_rng(seed).integers(0, len(names), (_NUM_RESAMPLES, len(names)))
    resampled = _ratio(sums[draws].sum(axis=1))
    low, high = np.percentile(resampled, (2.5, 97.5)).tolist()
    return Speedup(value=float(_ratio(sums.sum(axis=0)[None])[0]), low=low, high=high)


def _ratio(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3])


def guard(result: BenchResult, *, load_before: float, cores: int) -> list[Flag]:
    """What makes the figures of a finished run doubtful.

    Args:
        result: with rows and summaries.
        load_before: load average of the machine before the run.
        cores: of the machine.
    """
    flags: list[Flag] = []
    for arm in result.arms:
        if arm.failure:
            flags.append(Flag(code="arm-failed", severity="warning", message=f"{arm.name}: {arm.failure}"))
    flags += _guard_speed(result)
    flags += _guard_outputs(result)
    rounds = len({row.round for row in result.rows})
    if rounds < _MIN_ROUNDS:
        text = f"{rounds} timed rounds; at least {_MIN_ROUNDS} are needed to see the spread"
        flags.append(Flag(code="few-runs", severity="warning", message=text))
    if load_before > 0.5 * cores:
        text = f"the machine was busy before the run: load {load_before:.1f} on {cores} cores"
        flags.append(Flag(code="busy-machine", severity="warning", message=text))
    if result.is_partial:
        flags.append(Flag(code="partial", severity="warning", message="the run was interrupted"))
    return flags


def _guard_speed(result: BenchResult) -> Iterable[Flag]:
    kinds = {arm.name: arm.kind for arm in result.arms}
    pooled = {s.arm: s for s in result.summaries if s.source == ALL}
    for name, s in pooled.items():
        rates = s.tokens_per_s_by_round
        if len(rates) > 1 and (max(rates) - min(rates)) > _SPREAD * statistics.median(rates):
            text = f"{name}: {min(rates):.1f} to {max(rates):.1f} tokens/s between rounds"
            yield Flag(code="spread", severity="warning", message=text)
        for other, speedup in s.speedups.items():
            if pooled[other].acceptance_length > _SLACK:
                continue  # the bound is one over plain decoding; a peer's drafting may cost more than it brings
            limit = s.acceptance_length
            if speedup.low <= _SLACK * limit:
                continue
            # Speculation alone cannot be faster than its acceptance length; another code base may be.
            text = f"{name}: {speedup.value:.2f}x over {other} with {limit:.2f}x the tokens per step"
            if kinds.get(name) == kinds.get(other):
                yield Flag(
                    code="speedup-above-acceptance",
                    severity="error",
                    message=f"{text}: speculation cannot bring that, the measurement is wrong",
                )
            else:
                message = f"{text}: a part of it is the engine, not speculation"
                yield Flag(code="speedup-above-acceptance", severity="warning", message=message)


def _guard_outputs(result: BenchResult) -> Iterable[Flag]:
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
