"""Tables of the drafters that run a model, from their results; `specdec.bench.readme_tables` puts them into pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["draft_profile_table", "model_drafters_table"]

_COLUMNS = (("edits", 0.0), ("edits", 0.8), ("free code", 0.0), ("free code", 0.8))
_SPEEDS = ("tokens_per_second", "tokens_per_cpu_second")  # the first one that was measured


def model_drafters_table(result: Mapping[str, Any]) -> str:
    """Acceptance length and speed against plain decoding, by drafter and batch size."""
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    found = {(row["arm"], row["batch"], row["text"], row["temperature"]): row for row in rows}
    lines = [
        "| drafter | batch | edits, T=0 | edits, T=0.8 | free code, T=0 | free code, T=0.8 | both, T=0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for batch in sorted({row["batch"] for row in rows}):
            cells = []
            for text, temperature in _COLUMNS:
                row = found.get((arm, batch, text, temperature))
                cells.append("" if row is None else _cell(row, found.get(("plain", batch, text, temperature))))
            greedy = [row for text in ("edits", "free code") if (row := found.get((arm, batch, text, 0.0)))]
            lines.append(f"| {arm} | {batch} | {' | '.join(cells)} | {_pooled(greedy):.2f} |")
    return "\n".join(lines) + "\n"


def _pooled(rows: Sequence[Mapping[str, Any]]) -> float:
    """Acceptance length over all steps of several rows."""
    num_tokens = sum(float(row["acceptance_length"] * row["steps"]) for row in rows)
    return num_tokens / sum(int(row["steps"]) for row in rows)


def _cell(row: Mapping[str, Any], plain: Mapping[str, Any] | None) -> str:
    length = f"{row['acceptance_length']:.2f}"
    unit = next((name for name in _SPEEDS if name in row), None)
    if unit is None:
        return length
    if row["arm"] == "plain":
        return f"{row[unit]:.0f} tokens/s"
    return length if plain is None else f"{length}, {row[unit] / plain[unit]:.2f} x"


def draft_profile_table(result: Mapping[str, Any]) -> str:
    """Milliseconds of a draft and what they are spent on, by head."""
    lines = [
        "| head of the size of | dtype | ms | matmuls | attention | both | norms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        shares = row["shares"]
        lines.append(
            f"| {row['head']} | {row['dtype']} | {row['ms']:.1f} | {shares['matmuls']:.0%} | "
            f"{shares['attention']:.0%} | {row['matmuls_and_attention']:.0%} | {shares['norms']:.0%} |"
        )
    return "\n".join(lines) + "\n"
