"""From rows to figures.

Totals, never means of ratios, unless a name says otherwise: tokens per second are all tokens over all seconds, and the
acceptance length is all emitted tokens over all steps, the bonus included (plain decoding has 1). Where the field
measures something else under the same name, both are given: vLLM's length counts only the steps that drafted,
SpecForge's is the unweighted mean of the requests' own.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.bench.arms import JobResult
from specdec.bench.results_schema import Percentiles, Row, Speedup, Summary, at_load
from specdec.types import IntArray

__all__ = ["ALL", "distinct_ngrams", "make_row", "speedup_interval", "summarize"]

ALL = "all"  # the pooled source
_NGRAM = 4
_NUM_RESAMPLES = 2000  # the 2.5 % point of the bootstrap is then known to about a tenth of the interval's width


def distinct_ngrams(ids: Sequence[Hashable]) -> float:
    """Distinct 4-grams / all 4-grams; 1 for a text too short to have any."""
    grams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def make_row(
    done: JobResult, *, arm: str, round: int, call: int, source: str, trace: str, prompt_tokens: int,
    expected: IntArray | Sequence[int] | None, load: str = "",
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
        load: under which it was answered.
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
        first_tokens=done.emitted[0] if done.emitted else 1,
        load=load,
        start_s=done.start_s,
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
        for arm in arms:
            mine = [row for row in inside if row.arm == arm]
            if not mine:
                continue
            load = mine[0].load
            theirs = {name: [row for row in inside if row.arm == at_load(name, load)] for name in references}
            summaries.append(_summary(arm, source, mine, theirs, seed, slo_ms))
    return summaries if len(sources) > 1 else [*summaries, *(s.model_copy(update={"source": ALL}) for s in summaries)]


def _summary(
    arm: str,
    source: str,
    every: list[Row],
    references: Mapping[str, list[Row]],
    seed: int,
    slo_ms: tuple[float, float] | None,
) -> Summary:
    rows = [row for row in every if row.error is None]
    errors = Counter(row.error for row in every if row.error is not None)
    seconds, tokens = _seconds(rows), sum(r.output_tokens for r in rows)
    theirs = {name: [r for r in base if r.error is None] for name, base in references.items()}
    others = {name: base for name, base in theirs.items() if at_load(name, every[0].load) != arm}
    first = next(iter(theirs.values()), [])
    return Summary(
        arm=arm,
        source=source,
        load=every[0].load,
        num_calls=len({r.call for r in rows}),
        num_runs=len(rows),
        errors={str(reason): count for reason, count in errors.items()},
        output_tokens=tokens,
        tokens_per_s=tokens / seconds if rows else 0.0,
        requests_per_s=len(rows) / seconds if rows else 0.0,
        tokens_per_s_by_round=_by_round(rows),
        speedups=_ratios(rows, others, seed, speedup_interval),
        decode_tokens_per_s=_rate_behind_the_first(rows),
        decode_speedups=_ratios(rows, others, seed, _decode_speedup),
        mean_of_ratios=_mean_rate(rows) / _mean_rate(first) if first and rows else None,
        goodput_per_s=None if slo_ms is None or not rows else sum(_is_within(r, slo_ms) for r in rows) / seconds,
        ttft_ms=_percentiles([1e3 * r.first_token_s for r in rows] or [0.0]),
        tpot_ms=_percentiles([_tpot_ms(r) for r in rows if r.output_tokens > 1] or [0.0]),
        same_output=_share([r.same_output for r in rows if r.same_output is not None]),
        parts_ms_per_token={
            name: sum(r.parts_ms.get(name, 0.0) for r in rows) / max(tokens, 1)
            for name in (rows[0].parts_ms if rows else ())
        },
        **_acceptance(rows),
    )


def _acceptance(rows: Sequence[Row]) -> dict[str, Any]:
    """The fields of a summary that say what became of the drafts."""
    tokens, steps = sum(r.output_tokens for r in rows), sum(r.num_steps for r in rows)
    drafting = sum(r.num_drafting_steps for r in rows)
    accepted = sum(r.num_accepted for r in rows)
    drafted = [r.num_drafted for r in rows]
    shown = sum(d or 0 for d in drafted)
    histogram = _added(r.accepted_histogram for r in rows)
    at_least = [sum(histogram[i:]) for i in range(1, len(histogram))]
    reached_after = _added(r.reached_after for r in rows)
    per_request = [r.output_tokens / r.num_steps for r in rows if r.num_steps]
    return {
        "acceptance_length": tokens / steps if steps else None,
        "acceptance_length_drafting": 1 + accepted / drafting if drafting else None,
        "acceptance_length_per_request": statistics.mean(per_request) if per_request else None,
        "acceptance_rate": None if None in drafted or not shown else accepted / shown,
        "drafted_per_step": None if None in drafted or not steps else shown / steps,
        "accepted_at": [count / drafting for count in at_least] if drafting else [],
        "accepted_at_given": [c / reached for c, reached in zip(at_least, reached_after, strict=False) if reached],
        "accepted_histogram": histogram,
    }


def _ratios(
    rows: Sequence[Row],
    references: Mapping[str, Sequence[Row]],
    seed: int,
    interval: Callable[..., Speedup | None],
) -> dict[str, Speedup]:
    found = {name: interval(rows, base, seed=seed) for name, base in references.items()}
    return {name: speedup for name, speedup in found.items() if speedup is not None}


def _mean_rate(rows: Sequence[Row]) -> float:
    return statistics.mean(r.output_tokens / r.seconds for r in rows)


def _seconds(rows: Sequence[Row]) -> float:
    """The time of the calls one after the other, or the wall time of each source and round where they overlap."""
    total = sum(row.seconds for row in rows if row.start_s is None)
    spans: dict[tuple[int, str], tuple[float, float]] = {}
    for row in rows:
        if row.start_s is not None:
            part = row.round, row.source
            begin, end = spans.get(part, (row.start_s, 0.0))
            spans[part] = min(begin, row.start_s), max(end, row.start_s + row.seconds)
    return total + sum(end - begin for begin, end in spans.values())


def _rate_behind_the_first(rows: Sequence[Row]) -> float | None:
    """Tokens per second without the first step, whose time is the prompt's."""
    if any(row.start_s is not None for row in rows):
        return None  # others' prompts are read meanwhile
    tokens, seconds = (sum(column) for column in zip(*map(_behind_the_first, rows), strict=True)) if rows else (0, 0)
    return tokens / seconds if tokens and seconds else None


def _behind_the_first(row: Row) -> tuple[float, float]:
    return row.output_tokens - row.first_tokens, row.seconds - row.first_token_s


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
    rounds: dict[int, list[Row]] = {}
    for row in rows:
        rounds.setdefault(row.round, []).append(row)
    return [sum(r.output_tokens for r in mine) / _seconds(mine) for _, mine in sorted(rounds.items())]


def speedup_interval(rows: Sequence[Row], base: Sequence[Row], *, seed: int = 0) -> Speedup | None:
    """Speed-up of pooled tokens/s and its interval, see ``Speedup``.

    Only (round, call) pairs that both arms finished count. Episodes are resampled, not calls: the calls of one episode
    are alike, and to take them for independent would make the interval too narrow.

    Returns:
        None without a pair.
    """
    if any(row.start_s is not None for row in [*rows, *base]):
        return _speedup_of_rounds(rows, base)
    return _bootstrap(rows, base, lambda row: (row.output_tokens, row.seconds), seed)


def _decode_speedup(rows: Sequence[Row], base: Sequence[Row], *, seed: int = 0) -> Speedup | None:
    """The same for the tokens behind the first step, which is the prompt's."""
    if any(row.start_s is not None for row in [*rows, *base]):
        return None
    return _bootstrap(rows, base, _behind_the_first, seed)


def _speedup_of_rounds(rows: Sequence[Row], base: Sequence[Row]) -> Speedup | None:
    """From whole rounds: where requests overlap, a call has no time of its own."""
    if not rows or not base:
        return None
    mine, theirs = _by_round(rows), _by_round(base)
    value = sum(r.output_tokens for r in rows) / _seconds(rows)
    return Speedup(
        value=value * _seconds(base) / sum(r.output_tokens for r in base),
        low=min(mine) / max(theirs),
        high=max(mine) / min(theirs),
    )


def _bootstrap(
    rows: Sequence[Row], base: Sequence[Row], measure: Callable[[Row], tuple[float, float]], seed: int
) -> Speedup | None:
    theirs = {(r.round, r.call): r for r in base}
    pairs = [(r, theirs[r.round, r.call]) for r in rows if (r.round, r.call) in theirs]
    names = sorted({(mine.source, mine.trace) for mine, _ in pairs})
    place = {name: index for index, name in enumerate(names)}
    sums = np.zeros((len(names), 4))  # tokens and seconds, mine and theirs
    for mine, other in pairs:
        sums[place[mine.source, mine.trace]] += (*measure(mine), *measure(other))
    if not (sums.sum(axis=0) > 0).all():
        return None
    draws = np.random.default_rng(seed).integers(0, len(names), (_NUM_RESAMPLES, len(names)))
    resampled = _ratio(sums[draws].sum(axis=1))
    low, high = np.nanpercentile(resampled, (2.5, 97.5)).tolist()
    return Speedup(value=float(_ratio(sums.sum(axis=0)[None])[0]), low=low, high=high)


def _ratio(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # A draw of episodes may hold none with tokens behind the first step: it says nothing.
    usable = np.where((sums > 0).all(axis=1, keepdims=True), sums, np.nan)
    return (usable[:, 0] / usable[:, 1]) / (usable[:, 2] / usable[:, 3])
