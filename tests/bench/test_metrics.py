"""Each figure against numbers worked out by hand, and each guard against a run that must be caught."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.bench.arms import JobResult
from specdec.bench.guards import guard
from specdec.bench.metrics import distinct_ngrams, make_row, speedup_interval, summarize
from specdec.bench.results_schema import ArmInfo, BenchResult, WorkloadInfo, at_load
from tests.bench.rows import row


def result_of(rows, *, references=("plain",), kinds=None, **given) -> BenchResult:
    names = list(dict.fromkeys(r.arm for r in rows))
    return BenchResult(
        mode="replay",
        environment={},
        settings={},
        workload=WorkloadInfo(files=[], num_calls=1, prompt_tokens=1, response_tokens=1, tokens_sha256=""),
        model=None,
        references=list(references),
        arms=[ArmInfo(name=name, kind=(kinds or {}).get(name, "specdec")) for name in names],
        summaries=summarize(rows, references),
        rows=rows,
        **given,
    )


def codes(result: BenchResult, **given) -> list[str]:
    return [flag.code for flag in guard(result, **{"others": 0.0, "cores": 2, **given})]


def test_a_row_counts_depths_reached_and_reached_after_full_acceptance():
    # Steps: drafted 3 deep, 3 accepted; 2 deep, 0 accepted; no draft; 3 deep, 1 accepted.
    done = JobResult(
        output_ids=[7] * 8, seconds=2.0, stamps=[0.5, 1.0, 1.5, 2.0], emitted=[4, 1, 1, 2], accepted=[3, 0, 0, 1],
        drafted=[3, 4, 0, 5], depths=[3, 2, 0, 3],
    )  # fmt: skip
    made = make_row(done, arm="a", round=0, call=0, source="s", trace="t", prompt_tokens=1, expected=[7] * 8)
    assert made.accepted_histogram == [2, 1, 0, 1]
    assert made.reached == [3, 3, 2]
    assert made.reached_after == [3, 2, 1]
    assert (made.num_drafted, made.num_accepted, made.num_drafting_steps, made.num_steps) == (12, 4, 3, 4)
    assert made.first_token_s == 0.5
    assert made.same_output is True
    assert made.distinct_ngrams == pytest.approx(1 / 5)
    (summary, _) = summarize([made], ["a"])
    assert summary.acceptance_length == 2.0  # 8 tokens in 4 steps
    assert summary.acceptance_length_drafting == pytest.approx(1 + 4 / 3)
    assert summary.acceptance_rate == pytest.approx(4 / 12)
    assert summary.accepted_at == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert summary.accepted_at_given == pytest.approx([2 / 3, 1 / 2, 1 / 1])


def test_lengths_and_speeds_are_totals_and_the_other_definitions_stand_beside():
    rows = [
        row("plain", call=0, trace="a"),
        row("plain", call=1, trace="b", output_tokens=30, num_steps=30, seconds=3.0),
        row("fast", call=0, trace="a", num_steps=2, seconds=0.25),
        row("fast", call=1, trace="b", output_tokens=30, num_steps=30, seconds=3.0),
    ]
    by_arm = {s.arm: s for s in summarize(rows, ["plain"]) if s.source == "s"}
    fast = by_arm["fast"]
    assert fast.tokens_per_s == pytest.approx(40 / 3.25)
    assert fast.acceptance_length == pytest.approx(40 / 32)
    assert fast.acceptance_length_per_request == pytest.approx((5 + 1) / 2)
    assert fast.speedups["plain"].value == pytest.approx(4 / 3.25)
    assert fast.mean_of_ratios == pytest.approx(((40 + 10) / 2) / 10)
    assert by_arm["plain"].speedups == {}
    assert fast.tpot_ms.p50 == pytest.approx(1e3 * np.median([0.15 / 9, 2.9 / 29]))
    assert fast.acceptance_rate is None  # nothing shown


def test_decoding_is_also_measured_without_the_prompt():
    rows = [
        row("plain", first_token_s=0.4),
        row("fast", first_token_s=0.4, first_tokens=4, seconds=0.6),
    ]
    (plain, fast, *_) = summarize(rows, ["plain"])
    assert plain.decode_tokens_per_s == pytest.approx(9 / 0.6)
    assert fast.decode_tokens_per_s == pytest.approx(6 / 0.2)
    assert fast.decode_speedups["plain"].value == pytest.approx(2.0)
    assert fast.speedups["plain"].value == pytest.approx(1 / 0.6)
    alone = summarize([row("plain", output_tokens=1, seconds=0.1)], ["plain"])[0]
    assert alone.decode_tokens_per_s is None  # nothing came behind the first token


def test_overlapping_requests_are_counted_by_the_wall_clock_and_compared_round_by_round():
    def crowd(arm: str, wall: float, number: int):
        return [
            row(at_load(arm, "x2"), load="x2", round=number, call=0, start_s=0.0, seconds=wall),
            row(at_load(arm, "x2"), load="x2", round=number, call=1, start_s=wall / 2, seconds=wall / 2),
        ]

    rows = [one for n in range(2) for one in (*crowd("plain", 4.0, n), *crowd("fast", 2.0 - n, n))]
    by_arm = {s.arm: s for s in summarize(rows, ["plain"]) if s.source == "s"}
    plain, fast = by_arm["plain x2"], by_arm["fast x2"]
    assert plain.tokens_per_s == pytest.approx(40 / 8)  # 20 tokens in 4 seconds, twice; the calls' own sum is 12
    assert plain.requests_per_s == pytest.approx(4 / 8)
    assert fast.tokens_per_s_by_round == pytest.approx([10, 20])
    assert fast.speedups["plain"].value == pytest.approx((40 / 3) / 5)
    assert (fast.speedups["plain"].low, fast.speedups["plain"].high) == pytest.approx((2.0, 4.0))
    assert fast.decode_speedups == {}


def test_failed_requests_count_nowhere_but_among_the_errors():
    rows = [row(), row(call=1, error="timeout", output_tokens=0, seconds=99.0), row(call=2, error="HTTP 500")]
    (summary, _) = summarize(rows, ["plain"])
    assert summary.errors == {"timeout": 1, "HTTP 500": 1}
    assert (summary.num_runs, summary.tokens_per_s) == (1, 10.0)
    (none, _) = summarize(rows[1:], ["plain"])
    assert (none.num_runs, none.tokens_per_s, none.acceptance_length) == (0, 0.0, None)
    assert codes(result_of(rows)) == ["few-runs", "failed-requests"]


def test_goodput_counts_requests_within_both_limits():
    rows = [row(call=0), row(call=1, first_token_s=0.9), row(call=2, seconds=5.0)]
    (summary, _) = summarize(rows, ["plain"], slo_ms=(200, 150))
    assert summary.goodput_per_s == pytest.approx(1 / 7)


def test_the_interval_holds_the_value_narrows_with_data_and_is_wide_for_one_episode_of_many_calls():
    noise = np.random.default_rng(0)

    def pairs(num_traces: int, calls: int):
        fast, base = [], []
        for trace in range(num_traces):
            ratio = float(noise.uniform(1.0, 3.0))
            for call in range(calls):
                key = {"trace": str(trace), "call": trace * calls + call}
                fast.append(row("fast", seconds=1 / ratio, **key))
                base.append(row("plain", **key))
        return speedup_interval(fast, base)

    few, many, clustered = pairs(5, 1), pairs(200, 1), pairs(5, 40)
    for found in (few, many, clustered):
        assert found.low <= found.value <= found.high
    assert many.high - many.low < few.high - few.low
    assert clustered.high - clustered.low > 2 * (many.high - many.low)
    assert speedup_interval([row("fast")], []) is None


def test_only_calls_that_both_arms_finished_make_a_speedup():
    fast = [row("fast", seconds=0.5), row("fast", call=1, trace="u", seconds=100.0)]
    assert speedup_interval(fast, [row()]).value == pytest.approx(2.0)


def rounds(arm, seconds, **given):
    return [row(arm, round=number, seconds=seconds, **given) for number in range(3)]


def test_a_clean_run_has_no_flags():
    rows = [*rounds("plain", 1.0), *rounds("fast", 0.55, num_steps=5)]
    assert codes(result_of(rows)) == []


def test_a_speedup_above_the_acceptance_length_is_an_error_within_one_code_base():
    rows = [*rounds("plain", 1.0), *rounds("fast", 0.3, num_steps=5)]
    flags = guard(result_of(rows), others=0.0, cores=2)
    assert [(f.code, f.severity) for f in flags] == [("speedup-above-acceptance", "error")]
    flags = guard(result_of(rows, kinds={"plain": "transformers"}), others=0.0, cores=2)
    assert [(f.code, f.severity) for f in flags] == [("speedup-above-acceptance", "warning")]


def test_looped_different_few_busy_spread_partial_and_failed_runs_are_flagged():
    looped = rounds("plain", 1.0, output_tokens=64, distinct_ngrams=0.1)
    assert codes(result_of(looped)) == ["looped-output"]
    different = [*rounds("plain", 1.0), *rounds("fast", 1.0, same_output=False)]
    flags = guard(result_of(different), others=0.0, cores=2)
    assert [(f.code, f.severity) for f in flags] == [("different-output", "error")]
    assert codes(result_of([row()])) == ["few-runs"]
    assert codes(result_of(rounds("plain", 1.0)), others=1.5) == ["busy-machine"]
    assert codes(result_of(rounds("plain", 1.0), is_partial=True)) == ["partial"]
    uneven = [row(round=number, seconds=1 + number / 5) for number in range(3)]
    assert codes(result_of(uneven)) == ["spread"]
    failed = result_of(rounds("plain", 1.0))
    failed.arms.append(ArmInfo(name="arctic", kind="arctic", failure="it is not installed"))
    assert codes(failed) == ["arm-failed"]


def test_distinct_ngrams_of_a_loop_are_few():
    assert distinct_ngrams(list(range(50))) == 1.0
    assert distinct_ngrams([1, 2] * 50) < 0.05
    assert distinct_ngrams([1]) == 1.0
