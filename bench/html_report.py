"""A result as one page that needs nothing else: tables, plots, flags, and where the figures come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from specdec.bench import plots
from specdec.bench.metrics import ALL
from specdec.bench.results_schema import BenchResult
from specdec.bench.tables import Table, result_table

__all__ = ["html_report"]

# Colour-blind safe (Okabe and Ito), lightened for dark pages where contrast needs it.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#3a87ad", "#6a3d9a", "#555555")
_DARK = ("#56b4e9", "#e69f00", "#2fd0a0", "#e79fc8", "#f0e442", "#8fc7e8", "#b79be0", "#aaaaaa")
_CAPTIONS = {
    "speed": "Pooled tokens/s against {}; whiskers: 95 % bootstrap interval over episodes.",
    "positions": "Solid: accepted at this position / steps that drafted. Dashed: the same, given that all earlier "
    "positions were accepted and this one was drafted.",
    "reliability": "Of the drafted nodes that were given a chance, the share that came true; the diagonal is perfect.",
    "timeline": "Tokens out over time, the calls of the first episode one behind the other. Flat parts read prompts.",
    "cost": "Median forward time by tokens in the step, behind a prompt of the workload's median length.",
    "break-even": "The share of its tokens that must be accepted for a draft of this size to pay: what the step costs "
    "over a plain one, by draft token.",
}


def html_report(result: BenchResult) -> str:
    """The page."""
    sources = [s for s in dict.fromkeys(summary.source for summary in result.summaries) if s != ALL]
    sections = [_header(result), _flags(result), _table(result, ALL)]
    sections += [
        _figure("Speed-up by source", _speedups(result, sources), _CAPTIONS["speed"].format(result.baseline)),
        _figure("Acceptance by position", _positions(result), _CAPTIONS["positions"]),
        _figure("Reliability", _reliability(result), _CAPTIONS["reliability"]),
        _figure("One episode", _timeline(result), _CAPTIONS["timeline"]),
        _figure("Cost of a target step", _cost(result), _CAPTIONS["cost"]),
        _figure("Break-even", _break_even(result), _CAPTIONS["break-even"]),
    ]
    sections.append(_parts(result))
    if len(sources) > 1:
        sections += [_table(result, source) for source in sources]
    sections.append(_provenance(result))
    title = f"specdec bench: {result.mode}" + (f" of {result.model.name}" if result.model else "")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(result: BenchResult) -> str:
    model = result.model
    facts = [
        f"{result.workload.num_calls} calls, {result.workload.prompt_tokens:,} prompt and "
        f"{result.workload.response_tokens:,} recorded answer tokens",
        f"timed rounds: {result.settings.get('rounds', 1)}; arms in turns",
    ]
    if model is not None:
        weights = "random weights" if model.has_random_weights else "its own weights"
        size = f"{model.num_parameters / 1e6:,.1f} M parameters"
        facts.insert(0, f"{model.name}, {size}, {weights}, {model.dtype} on {model.device}")
    machine = (
        result.environment.get("gpu") or f"{result.environment.get('cores')} cores of {result.environment.get('cpu')}"
    )
    facts.append(str(machine))
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f"<header><h1>specdec bench: {escape(result.mode)}</h1><ul class=facts>{items}</ul></header>"


def _flags(result: BenchResult) -> str:
    items = "".join(
        f'<li class="{flag.severity}"><b>{escape(flag.code)}</b> {escape(flag.message)}</li>' for flag in result.flags
    )
    return f'<section><h2>Doubts</h2><ul class="flags">{items}</ul></section>' if items else ""


def _table(result: BenchResult, source: str) -> str:
    if not result.summaries:
        return ""
    name = "All sources" if source == ALL else source
    return f"<section><h2>{escape(name)}</h2>{_html_table(result_table(result, source=source))}</section>"


def _parts(result: BenchResult) -> str:
    """Where the time of a token goes, for the arms that show it."""
    pooled = [s for s in result.summaries if s.source == ALL and s.parts_ms_per_token]
    if not pooled:
        return ""
    names = list(dict.fromkeys(name for s in pooled for name in s.parts_ms_per_token))
    rows = [["arm", *names], *([s.arm, *(f"{s.parts_ms_per_token.get(n, 0):.3f}" for n in names)] for s in pooled)]
    return f"<section><h2>Milliseconds per token</h2>{_html_table(rows)}</section>"


def _html_table(rows: Table) -> str:
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in rows[0])
    body = ""
    for row in rows[1:]:
        if row[1].startswith(("failed", "did not")):
            why = f'<td class="why" colspan="{len(row) - 1}">{escape(row[1])}</td>'
            body += f"<tr><th scope=row>{escape(row[0])}</th>{why}</tr>"
            continue
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        body += f"<tr><th scope=row>{escape(row[0])}</th>{cells}</tr>"
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, plot: str, caption: str) -> str:
    if not plot:
        return ""
    return f"<figure><h2>{escape(title)}</h2>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _arms(result: BenchResult) -> dict[str, int]:
    """Every arm that ran, with the number of its colour: the same one in every plot."""
    return {arm.name: number for number, arm in enumerate(result.arms) if not arm.failure}


def _speedups(result: BenchResult, sources: Sequence[str]) -> str:
    arms = {name: colour for name, colour in _arms(result).items() if name != result.baseline}
    groups: dict[str, dict[str, plots.Interval]] = {}
    for source in [*sources, ALL] if len(sources) > 1 else [ALL]:
        group = {}
        for name in arms:
            summary = result.summary(name, source)
            speedup = summary.speedups.get(result.baseline) if summary is not None else None
            if speedup is not None:
                group[name] = (speedup.value, speedup.low, speedup.high)
        if group:
            groups["all sources" if source == ALL else source] = group
    return plots.bars("Speed-up by source", groups, arms, unit=f"speed-up over {result.baseline}") if groups else ""


def _positions(result: BenchResult) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for name in _arms(result):
        summary = result.summary(name)
        if summary is not None and summary.accepted_at:
            for label, rates in ((name, summary.accepted_at), (f"{name}, given", summary.accepted_at_given)):
                series[label] = [(float(i + 1), rate) for i, rate in enumerate(rates)]
    dashed = [label for label in series if label.endswith(", given")]
    colours = {label: _arms(result)[label.removesuffix(", given")] for label in series}
    names = {"x_name": "draft position", "y_name": "share accepted"}
    return plots.lines("Acceptance by position", series, dashed=dashed, colours=colours, **names) if series else ""


def _reliability(result: BenchResult) -> str:
    series = {
        name: [(predicted, observed) for predicted, observed, _ in points]
        for name, points in result.reliability.items()
    }
    if not series:
        return ""
    series["perfect"] = [(0.0, 0.0), (1.0, 1.0)]
    return plots.lines(
        "Reliability", series, dashed=["perfect"], x_name="predicted chance", y_name="share that came true"
    )


def _timeline(result: BenchResult) -> str:
    marks: dict[str, list[tuple[float, int]]] = {}
    for name in _arms(result):
        offset, end, tokens, call = 0.0, 0.0, 0, None
        for mark in (m for m in result.timeline if m.arm == name):
            if mark.call != call:
                offset, call = offset + end, mark.call
            end, tokens = mark.end_s, tokens + mark.emitted
            marks.setdefault(name, []).append((offset + end, tokens))
    return plots.timeline("One episode", marks, _arms(result)) if marks else ""


def _cost(result: BenchResult) -> str:
    if not result.cost_curve:
        return ""
    curve = {"target step": [(float(size), ms) for size, ms in result.cost_curve]}
    return plots.lines("Cost of a target step", curve, x_name="tokens in the step", y_name="milliseconds")


def _break_even(result: BenchResult) -> str:
    if len(result.cost_curve) < 2:
        return ""
    plain = result.cost_curve[0][1]
    curve = {
        "needed": [
            (float(size - 1), max(ms / plain - 1, 0.0) / (size - 1)) for size, ms in result.cost_curve if size > 1
        ]
    }
    return plots.lines("Break-even", curve, x_name="draft tokens", y_name="share of them accepted")


def _provenance(result: BenchResult) -> str:
    files = "".join(
        f"<li>{escape(file.source)}: {escape(file.name)}, {file.nbytes:,} bytes, "
        f"sha256 <code>{file.sha256[:16]}</code></li>"
        for file in result.workload.files
    )
    facts = {
        "environment": result.environment, "settings": result.settings, "memory (bytes)": result.memory,
        "energy (J)": result.energy_j, "passed over": result.workload.skipped,
        "work digest": result.workload.tokens_sha256, "arms": [arm.model_dump(mode="json") for arm in result.arms],
    }  # fmt: skip
    body = escape(json.dumps({key: value for key, value in facts.items() if value}, indent=1))
    details = f"<details><summary>Everything that was written down</summary><pre>{body}</pre></details>"
    return f"<section><h2>Where this comes from</h2><ul class=facts>{files}</ul>{details}</section>"


def _style() -> str:
    def colours(palette: Sequence[str]) -> str:
        return "".join(f"--c{i}:{colour};" for i, colour in enumerate(palette))

    classes = "".join(
        f".c{i}{{fill:var(--c{i})}}.l{i}{{stroke:var(--c{i})}}.b{i}{{background:var(--c{i})}}"
        for i in range(len(_LIGHT))
    )
    return _CSS.replace("/*light*/", colours(_LIGHT)).replace("/*dark*/", colours(_DARK)) + classes


_CSS = """
:root { color-scheme: light dark; --fg: #1a1a1a; --bg: #ffffff; --soft: #5a5a5a; --rule: #dcdcdc; --bad: #b00020;
  /*light*/ }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e8e8e8; --bg: #16181b; --soft: #a8a8a8; --rule: #3a3d42; --bad: #ff8a80; /*dark*/ }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, 'DejaVu Sans', sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 16px; display: grid; gap: 24px;
  grid-template-columns: repeat(2, minmax(0, 1fr)) }
header, section { grid-column: 1 / -1; min-width: 0 }
figure { margin: 0; min-width: 0 }
@media (max-width: 800px) { main { grid-template-columns: minmax(0, 1fr) } }
h1 { font-size: 1.5rem; margin: .5rem 0 }
h2 { font-size: 1.1rem; margin: .5rem 0; overflow-wrap: anywhere }
ul.facts, ul.flags { padding-left: 1.2rem; overflow-wrap: anywhere }
ul.facts { color: var(--soft) }
.error b { color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th:first-child { text-align: left }
thead th { white-space: normal; vertical-align: bottom }
td.why { text-align: left; color: var(--soft); white-space: normal }
svg { width: 100%; height: auto; display: block }
svg text { fill: var(--fg); font-size: 12px; paint-order: stroke; stroke: var(--bg); stroke-width: 3px }
svg .tick { fill: var(--soft); font-size: 11px }
svg .group { font-weight: 600 }
@media (max-width: 800px) { svg text { font-size: 15px } svg .tick { font-size: 14px } }
.grid { stroke: var(--rule) }
.mark { stroke: var(--soft); stroke-dasharray: 4 3 }
.whisker { stroke: var(--fg); stroke-width: 1.5 }
.line { fill: none; stroke-width: 2 }
.dashed { stroke-dasharray: 5 4 }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; list-style: none; padding: 0; margin: 4px 0;
  font-size: .85rem }
.key { display: inline-block; width: 12px; height: 12px; margin-right: 6px; vertical-align: -1px }
figcaption { color: var(--soft); font-size: .85rem }
pre { overflow-x: auto; font-size: .8rem }
.none { color: var(--soft) }
"""
