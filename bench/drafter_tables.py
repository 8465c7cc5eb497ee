"""Tables of the drafters that run a model, from their results; `specdec.bench.readme_tables` puts them into pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "calibration_table",
    "diffusion_lengths_table",
    "diffusion_speed_table",
    "draft_profile_table",
    "model_drafters_table",
    "pooled",
]

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
            lines.append(f"| {arm} | {batch} | {' | '.join(cells)} | {pooled(greedy):.2f} |")
    return "\n".join(lines) + "\n"


def pooled(rows: Iterable[Mapping[str, Any]]) -> float:
    """Acceptance length over all steps of several rows."""
    tokens_and_steps = [(float(row["acceptance_length"] * row["steps"]), int(row["steps"])) for row in rows]
    return sum(tokens for tokens, _ in tokens_and_steps) / sum(steps for _, steps in tokens_and_steps)


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


def diffusion_lengths_table(result: Mapping[str, Any]) -> str:
    """Acceptance lengths of a block-diffusion head and an EAGLE head on the same texts."""
    sizes = {name: f"{number / 1e6:.2f} M" for name, number in result["parameters"].items()}
    lines = [
        f"| greedy | DSpark ({sizes['first']}) | EAGLE-3 ({sizes['second']}) | difference (95 %) |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["interval_95"]
        lines.append(
            f"| {row['text']}, {row['shape']} | {row['first']:.2f} | {row['second']:.2f} | "
            f"{row['difference']:+.2f} ({low:+.2f} to {high:+.2f}) |"
        )
    lines += ["", f"{result['prompts']} held-out texts of each kind, {result['new_tokens']} new tokens each; no times."]
    return "\n".join(lines) + "\n"


def calibration_table(result: Mapping[str, Any]) -> str:
    """Calibration errors by place, and the reliability of the first place's chances, before and after fitting."""
    judged = result["calibration"]
    names = ("before", "after")
    places = range(1, len(judged["temperatures"]) + 1)
    lines = [
        f"| error of the prefix up to place | {' | '.join(map(str, places))} |",
        "|---|" + "---|" * len(places),
        *(f"| {name} | {' | '.join(f'{error:.1%}' for error in judged[name]['errors'])} |" for name in names),
        f"| temperature | {' | '.join(f'{value:.2f}' for value in judged['temperatures'])} |",
        "",
        "| first guess: chance | accepted, before | accepted, after |",
        "|---|---|---|",
    ]
    curves = {
        name: {min(int(mean * 10), 9): (share, count) for mean, share, count in judged[name]["curves"][0]}
        for name in names
    }
    for tenth in range(10):
        cells = [
            f"{curves[name][tenth][0]:.0%} of {curves[name][tenth][1]}" if tenth in curves[name] else "–"
            for name in names
        ]
        lines.append(f"| {tenth * 10} to {tenth * 10 + 10} % | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def diffusion_speed_table(result: Mapping[str, Any]) -> str:
    """Tokens per second of fixed lengths and rules, and every rule against the best fixed length."""
    lines: list[str] = []
    unit = "tokens per processor second" if result["clock"] == "processor" else "tokens/s"
    for text, found in result["texts"].items():
        best, name = found["against_best_fixed"]["best_fixed"], f"{text}, batch {result.get('batch', 1)}"
        lines += [
            f"| {name} | acceptance length | drafted a step | {unit} | against {best} (range) |",
            "|---|---|---|---|---|",
        ]
        for arm, row in found["arms"].items():
            ratio = found["against_best_fixed"].get(arm)
            cell = f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['greatest']:.3f})" if ratio else ""
            lines.append(
                f"| {arm} | {row['acceptance_length']:.2f} | {row['drafted_per_step']:.2f} | "
                f"{row['tokens_per_second']:.0f} | {cell} |"
            )
        lines.append("")
    return "\n".join(lines)
