"""Committed results of ``specdec bench`` as Markdown: what the README and ``docs/benchmarks.md`` show of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specdec.bench.metrics import ALL
from specdec.bench.results_schema import BenchResult, Speedup, Summary, read_result
from specdec.bench.tables import Table, markdown_table, result_table

__all__ = ["live_table", "replay_table", "simulation_table"]

_POOLED = "agents"  # in the name of a result: its sources are alike enough to be pooled
_BEST = "suffix"


def replay_table(folder: Path, *names: str, by_source: bool, link: str) -> str:
    """Recorded answers at the real cost of a model: agent sources pooled (or each) and every control.

    Args:
        folder: of the results.
        *names: of the results, those of agents with "agents" in their names.
        by_source: a line for every source.
        link: to the folder, from the page.
    """
    rows: Table = [
        ["", "dtype", "HF `generate`", "HF prompt lookup", "ours, plain", f"ours, {_BEST}", "over `generate` (95 %)",
         "over prompt lookup (95 %)", "over our plain (95 %)", "tokens per step"]
    ]  # fmt: skip
    notes = []
    for name in names:
        result = read_result(folder / f"{name}.json")
        notes.append(_origin(name, result, link, has_command=by_source))
        dtype = result.model.dtype if result.model is not None else ""
        sources = list(dict.fromkeys(s.source for s in result.summaries if s.source != ALL))
        if _POOLED in name:
            rows.append([f"**{len(sources)} agent sources, pooled**", dtype, *_replayed(result, ALL)])
        if by_source or _POOLED not in name:
            rows += [[source, dtype, *_replayed(result, source)] for source in sources]
    return markdown_table(rows) + "\n" + "".join(notes)


def _replayed(result: BenchResult, source: str) -> list[str]:
    arms = [result.summary(arm, source) for arm in ("generate", "prompt-lookup", "plain", _BEST)]
    best = arms[-1]
    speeds = [_speed(summary) for summary in arms]
    if best is None:
        return [*speeds, "", "", "", ""]
    ratios = [best.speedups.get(name) for name in ("generate", "prompt-lookup", "plain")]
    return [*speeds, *map(_ratio, ratios), f"{best.acceptance_length or 0:.2f}"]


def _speed(summary: Summary | None) -> str:
    return "did not run" if summary is None else f"{summary.tokens_per_s:.1f}/s"


def _ratio(speedup: Speedup | None) -> str:
    return "" if speedup is None else f"{speedup.value:.2f}x ({speedup.low:.2f} to {speedup.high:.2f})"


def simulation_table(folder: Path, name: str, *, link: str) -> str:
    """Tokens per step and the share of drafts accepted, every source by every drafter that reads text."""
    result = read_result(folder / f"{name}.json")
    arms = [arm.name for arm in result.arms if arm.name != "plain" and not arm.failure]
    sources = [s.source for s in result.summaries if s.arm == arms[0]]
    rows: Table = [["source", "calls", "tokens", *arms]]
    for source in sorted(sources, key=lambda source: (source != ALL, source)):
        found = [result.summary(arm, source) for arm in arms]
        first = found[0]
        title = "**all**" if source == ALL else source
        counts = ["", ""] if first is None else [str(first.num_calls), f"{first.output_tokens:,}"]
        rows.append([title, *counts, *map(_judged, found)])
    return markdown_table(rows) + "\n" + _origin(name, result, link)


def _judged(summary: Summary | None) -> str:
    if summary is None or summary.acceptance_length is None:
        return ""
    rate = "" if summary.acceptance_rate is None else f" ({summary.acceptance_rate:.0%})"
    return f"{summary.acceptance_length:.2f}{rate}"


def live_table(folder: Path, name: str, *, link: str) -> str:
    """A model's own answers: every drafter against plain decoding."""
    result = read_result(folder / f"{name}.json")
    return markdown_table(result_table(result)) + "\n" + _origin(name, result, link)


def _origin(name: str, result: BenchResult, link: str, *, has_command: bool = True) -> str:
    where = result.environment
    packages = where["packages"]
    doubts = sorted({flag.code for flag in result.flags})
    command = f" made by `{where['command']}`;" if has_command else ""
    versions = f"torch {packages['torch']}, transformers {packages['transformers']}"
    return (
        f"[`{name}.json`]({link}/{name}.json): {where['cores']} cores of {where['cpu']}, {versions}, "
        f"{where['date'][:10]}, {_work(result)};{command} flags: {', '.join(doubts) or 'none'}.\n\n"
    )


def _work(result: BenchResult) -> str:
    work, rounds = result.workload, result.settings.get("rounds", 1)
    stores: Sequence[str] = sorted({arm.warmth for arm in result.arms if arm.warmth != "cold"}) or ["cold"]
    return (
        f"{work.num_calls} calls, {work.prompt_tokens:,} prompt and {work.response_tokens:,} answer tokens, "
        f"{rounds} round{'s' if rounds != 1 else ''}, stores {' and '.join(stores)}"
    )
