"""Tables of adaptive speculation from their results; `specdec.bench.readme_tables` puts them into pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "adaptive_speed_table",
    "load_floor_table",
    "load_simulation_table",
    "load_validation_table",
    "overlap_speed_table",
    "reliability_table",
]

_GROUPS = (("agents", "agent sources"), ("controls", "chat and RAG"))


def load_simulation_table(result: Mapping[str, Any]) -> str:
    """Every policy on every arrival trace and load: goodput, TPOT, and the work against the best fixed length."""
    lines = [
        "| arrivals | load | policy | tokens/s | goodput | TPOT p50 | p99 | TTFT p99 | busy | fixed / own work |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        policies = run["policies"]
        fixed = [name for name in policies if name == "none" or name.removeprefix("static-").isdecimal()]
        least = min(policies[name]["work_s"] for name in fixed)
        for name, figures in policies.items():
            lines.append(
                f"| {run['arrivals'].partition('.')[0]} | {run['load']:g} | {name} | {figures['tokens_per_s']:.1f} "
                f"| {figures['goodput_tokens_per_s']:.1f} | {figures['tpot_p50_ms']:.1f} ms "
                f"| {figures['tpot_p99_ms']:.1f} ms | {figures['ttft_p99_ms'] / 1e3:.1f} s "
                f"| {figures['busy_share']:.2f} | {least / figures['work_s']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def load_floor_table(result: Mapping[str, Any]) -> str:
    """Adaptive against the best of all fixed lengths and no drafts, by the work of the same requests."""
    lines = [
        "| arrivals | load | requests | least work | its TPOT p99 | adaptive: TPOT p99 | fixed / adaptive work |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        policies = dict(run["policies"])
        ours = policies.pop("adaptive")
        best = min(policies, key=lambda name: float(policies[name]["work_s"]))
        lines.append(
            f"| {run['arrivals'].partition('.')[0]} | {run['load']:g} | {ours['requests']} | {best} "
            f"| {policies[best]['tpot_p99_ms']:.1f} ms | {ours['tpot_p99_ms']:.1f} ms "
            f"| {policies[best]['work_s'] / ours['work_s']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def load_validation_table(result: Mapping[str, Any]) -> str:
    """A served load beside the same load simulated."""
    lines = [
        "| policy | tokens/s: served, simulated | error | TPOT p50 | error | p99 | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["validation"]:
        real, paper, error = row["real"], row["simulated"], row["error"]
        cells = [f"{real['tokens_per_s']:.1f}, {paper['tokens_per_s']:.1f} | {error['tokens_per_s']:+.1%}"]
        for name in ("tpot_p50_ms", "tpot_p99_ms"):
            cells.append(f"{real[name]:.1f}, {paper[name]:.1f} ms | {error[name]:+.1%}")
        lines.append(f"| {row['policy']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def overlap_speed_table(result: Mapping[str, Any]) -> str:
    """Overlap forced on, over one step after the other."""
    lines = [
        "| drafter | halves | promised: all drafting hidden, none | a half's forward, its draft, both at once "
        "| chunks | same text |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = {
            mode: f"{gain['median']:.2f} ({gain['low']:.2f} to {gain['high']:.2f})"
            for mode, gain in row["gain"].items()
        }
        promised, alone = row["promised"], row["step_ms"]["half batch"]
        beside = row["step_ms"]["half batch while the other is drafted for"]["forward"]
        lines.append(
            f"| `{row['drafter']}` | {cells['halves']} | {promised['all hidden']:.2f}, {promised['none hidden']:.2f} "
            f"| {alone['forward']:.1f}, {alone['draft']:.1f}, {beside:.1f} ms "
            f"| {cells['chunks']} | {'yes' if row['same_text'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def reliability_table(result: Mapping[str, Any]) -> str:
    """The reliability diagram of the fused drafter on agent text, requests one at a time: all sets of sources."""
    points: dict[int, list[float]] = {}
    for point in next(row for row in result["agents"] if row["concurrency"] == 1)["fused"]["reliability"]:
        sums = points.setdefault(min(int(10 * point["predicted"]), 9), [0.0, 0.0, 0.0])
        for at, value in enumerate((1.0, point["predicted"], point["observed"])):
            sums[at] += point["count"] * value
    lines = ["| predicted | observed | nodes |", "|---|---|---|"]
    for tenth in sorted(points):
        count, predicted, observed = points[tenth]
        lines.append(f"| {predicted / count:.2f} | {observed / count:.2f} | {count:.0f} |")
    return "\n".join(lines) + "\n"


def adaptive_speed_table(result: Mapping[str, Any]) -> str:
    """Fused drafts under the controller, against plain decoding, the best fixed length and the best own rule."""
    lines = [
        "| text | at a time | plain | fused | fused / plain | best fixed length | fused / it "
        "| best tree of a fixed size | fused / it | best with own stops | fused / it |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, text in _GROUPS:
        for row in result.get(group, []):
            arms = row["arms"]
            lines.append(
                f"| {text} | {row['concurrency']} | {arms['plain']['tokens_per_s']:.0f}/s | "
                f"{arms['fused']['tokens_per_s']:.0f}/s | {_range(row['fused_over']['plain'])} | "
                f"{_best(row, '@')} | {_best(row, '=')} | {_best(row, '~')} |"
            )
    return "\n".join(lines) + "\n"


def _best(row: Mapping[str, Any], mark: str) -> str:
    """Two columns: the fastest single drafter whose name has the mark, and fused over it."""
    arms = row["arms"]
    best = max(
        (name for name in arms if mark in name), key=lambda name: float(arms[name]["tokens_per_s"]), default=None
    )
    return " | " if best is None else f"{best}: {arms[best]['tokens_per_s']:.0f}/s | {_range(row['fused_over'][best])}"


def _range(ratio: Mapping[str, float]) -> str:
    return f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
