"""Tables of adaptive speculation from their results; `specdec.bench.readme_tables` puts them into pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["adaptive_speed_table", "load_simulation_table"]

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


def adaptive_speed_table(result: Mapping[str, Any]) -> str:
    """Fused drafts under the controller, against plain decoding and the best single drafter at a fixed length."""
    lines = [
        "| text | at a time | plain | best single, fixed length | fused | fused / single | fused / plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, text in _GROUPS:
        for row in result.get(group, []):
            arms = row["arms"]
            singles = [name for name in arms if "@" in name]
            best = max(singles, key=lambda name: float(arms[name]["tokens_per_s"]), default=None)
            lines.append(
                f"| {text} | {row['concurrency']} | {arms['plain']['tokens_per_s']:.0f}/s | "
                + ("" if best is None else f"{best}: {arms[best]['tokens_per_s']:.0f}/s")
                + f" | {arms['fused']['tokens_per_s']:.0f}/s | "
                + ("" if best is None else _range(row["fused_over"][best]))
                + f" | {_range(row['fused_over']['plain'])} |"
            )
    return "\n".join(lines) + "\n"


def _range(ratio: Mapping[str, float]) -> str:
    return f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
