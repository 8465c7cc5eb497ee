"""Results as tables: for a terminal, for Markdown, and two results side by side. Figures come from the file alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from specdec.bench.metrics import ALL
from specdec.bench.results_schema import BenchResult, Speedup, Summary
from specdec.errors import ConfigError

__all__ = ["compare_table", "markdown_table", "result_table", "text_table"]

Table = list[list[str]]  # the first row is the header


def text_table(rows: Table) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def markdown_table(rows: Table) -> str:
    """The same as Markdown."""
    head, *body = rows
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *body))


def _ratio(speedup: Speedup | None) -> str:
    return "" if speedup is None else f"{speedup.value:.2f}x ({speedup.low:.2f} to {speedup.high:.2f})"


def _length(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def result_table(result: BenchResult, *, source: str = ALL) -> Table:
    """One line per arm for one source; arms that failed say why.

    Raises:
        ConfigError: an unknown source.
    """
    known = {summary.source for summary in result.summaries}
    if known and source not in known:
        raise ConfigError(f"source must be one of {', '.join(sorted(known))}, got {source!r}")
    heads, figures = _COLUMNS.get(result.mode, (_timed_heads, _timed_figures))
    rows: Table = [["arm", *heads(result)]]
    for arm in result.arms:
        summary = result.summary(arm.name, source)
        if summary is not None:
            rows.append([arm.name, *figures(summary, result)])
        else:
            reason = f"failed: {arm.failure}" if arm.failure else "did not run"
            rows.append([arm.name, reason, *[""] * (len(rows[0]) - 2)])
    return rows


def _timed_heads(result: BenchResult) -> list[str]:
    against = [f"against {name} (95 %)" for name in result.references]
    return ["tokens/s", *against, "length", "per request", "drafted ok", "TTFT p50", "TPOT p50", "p99", "same"]


def _timed_figures(s: Summary, result: BenchResult) -> list[str]:
    return [
        f"{s.tokens_per_s:.1f}",
        *(_ratio(s.speedups.get(name)) for name in result.references),
        _length(s.acceptance_length),
        _length(s.acceptance_length_per_request),
        _percent(s.acceptance_rate),
        f"{s.ttft_ms.p50:.0f} ms",
        f"{s.tpot_ms.p50:.1f} ms",
        f"{s.tpot_ms.p99:.1f} ms",
        _percent(s.same_output),
    ]


def _simulated_heads(result: BenchResult) -> list[str]:
    return ["length", "per request", "drafting steps", "drafted/step", "drafted ok", "draft us/token", "same"]


def _simulated_figures(s: Summary, result: BenchResult) -> list[str]:
    return [
        _length(s.acceptance_length),
        _length(s.acceptance_length_per_request),
        _length(s.acceptance_length_drafting),
        _length(s.drafted_per_step),
        _percent(s.acceptance_rate),
        f"{1e3 * s.parts_ms_per_token.get('draft', 0.0):.1f}",
        _percent(s.same_output),
    ]


def _served_heads(result: BenchResult) -> list[str]:
    return ["requests", "failed", "requests/s", "tokens/s", *(f"against {name}" for name in result.references),
            "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "goodput/s"]  # fmt: skip


def _served_figures(s: Summary, result: BenchResult) -> list[str]:
    times = [f"{value:.1f} ms" for part in (s.ttft_ms, s.tpot_ms) for value in (part.p50, part.p90, part.p99)]
    return [
        str(s.num_runs),
        str(sum(s.errors.values())),
        f"{s.requests_per_s:.2f}",
        f"{s.tokens_per_s:.1f}",
        *(_ratio(s.speedups.get(name)) for name in result.references),
        *(times if s.num_runs else [""] * len(times)),
        "" if s.goodput_per_s is None else f"{s.goodput_per_s:.2f}",
    ]


_COLUMNS: Mapping[str, tuple[Callable[[BenchResult], list[str]], Callable[[Summary, BenchResult], list[str]]]] = {
    "simulate": (_simulated_heads, _simulated_figures),
    "serve": (_served_heads, _served_figures),
}  # what a mode has to say; the others are timed alone


def compare_table(first: BenchResult, second: BenchResult) -> tuple[Table, list[str]]:
    """Two results line by line, and what makes the comparison doubtful.

    Returns:
        The table of every (source, arm) that both have, and warnings.

    Raises:
        ConfigError: they have no arm and source in common.
    """
    doubts = []
    if first.workload.tokens_sha256 != second.workload.tokens_sha256:
        doubts.append("the work differs: the token digests are not the same")
    if first.mode != second.mode:
        doubts.append(f"the modes differ: {first.mode} and {second.mode}")
    for name in ("cpu", "cores", "gpu", "torch_threads", "packages"):
        mine, other = first.environment.get(name), second.environment.get(name)
        if mine != other:
            doubts.append(f"{name} differs: {mine} and {other}")
    for name in ("name", "dtype", "device"):
        mine, other = getattr(first.model, name, None), getattr(second.model, name, None)
        if mine != other:
            doubts.append(f"the model's {name} differs: {mine} and {other}")
    doubts += [f"{label} is flagged {flag.code}: {flag.message}" for label, result in (("A", first), ("B", second))
               for flag in result.flags]  # fmt: skip
    is_timed = "simulate" not in (first.mode, second.mode)
    heads = ["A tokens/s", "B tokens/s", "B / A", "A length", "B length"]
    rows: Table = [["source", "arm", *(heads if is_timed else ["A length", "B length", "B / A"])]]
    for mine_summary in first.summaries:
        theirs = second.summary(mine_summary.arm, mine_summary.source)
        if theirs is not None:
            figures = _compared(mine_summary, theirs) if is_timed else _lengths(mine_summary, theirs)
            rows.append([mine_summary.source, mine_summary.arm, *figures])
    if len(rows) == 1:
        raise ConfigError("the two results have no arm and source in common")
    return rows, doubts


def _compared(a: Summary, b: Summary) -> list[str]:
    if not a.num_runs or not b.num_runs:
        return [*("failed" if not s.num_runs else "" for s in (a, b)), "", "", ""]
    ratio = b.tokens_per_s / a.tokens_per_s
    # Rounds are the repetitions: where their ranges overlap, the difference may be noise.
    rounds_a, rounds_b = a.tokens_per_s_by_round, b.tokens_per_s_by_round
    is_clear = min(rounds_b) > max(rounds_a) or max(rounds_b) < min(rounds_a)
    return [
        f"{a.tokens_per_s:.1f}",
        f"{b.tokens_per_s:.1f}",
        f"{ratio:.2f}x" + ("" if is_clear else " ~"),
        _length(a.acceptance_length),
        _length(b.acceptance_length),
    ]


def _lengths(a: Summary, b: Summary) -> list[str]:
    """Of a simulation, whose clock says nothing."""
    lengths = a.acceptance_length, b.acceptance_length
    ratio = "" if None in lengths else f"{(b.acceptance_length or 0) / (a.acceptance_length or 1):.2f}x"
    return [*map(_length, lengths), ratio]
