"""The curves of day 0 as an image, from the committed results.

python -m specdec.bench.day_zero_plot --results bench/results --out docs/day-zero.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from specdec.bench.plots import lines

__all__ = ["curve", "draw", "main"]

_CURVES = {
    "day_zero": "a project of 32 functions",
    "day_zero_fresh": "functions that never repeat",
    "day_zero_pool": "16 prompts, again and again",
}
_COLOURS = ("#0b62c4", "#8a8a8a", "#c2570c")
_STYLE = (
    "text { font: 12px system-ui, sans-serif; fill: #444 } .grid { stroke: #ddd } .line { fill: none; stroke-width: 2 }"
    " .dashed { stroke-dasharray: 5 4 }"
)


def curve(result: dict[str, object]) -> list[tuple[float, float]]:
    """(minutes, acceptance length) of the stretches of a result."""
    rows: list[dict[str, float]] = result["curve"]  # type: ignore[assignment]
    return [(row["minutes"], row["acceptance_length"]) for row in rows]


def draw(results: Path) -> str:
    """All curves that there are, and the bar at 2 tokens per step, as one SVG document."""
    series = {
        name: curve(json.loads((results / f"{file}.json").read_text(encoding="utf-8")))
        for file, name in _CURVES.items()
        if (results / f"{file}.json").exists()
    }
    end = max(minutes for points in series.values() for minutes, _ in points)
    names, series["2 tokens a step"] = list(series), [(0.0, 2.0), (end, 2.0)]
    made = lines(
        "Acceptance length from random weights", series, x_name="minutes", y_name="tokens per step",
        dashed=("2 tokens a step",),
    )  # fmt: skip
    colours = (*_COLOURS[: len(names)], "#444")
    classes = "".join(f".c{i}{{fill:{colour}}}.l{i}{{stroke:{colour}}}" for i, colour in enumerate(colours))
    legend = "".join(
        f'<text x="540" y="{28 + 16 * i}" text-anchor="end" style="fill:{colours[i]}">{name}</text>'
        for i, name in enumerate(names)
    )
    svg = made[: made.index("</svg>")].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, _, body = svg.partition(">")
    backdrop = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{head}><style>{_STYLE}{classes}</style>{backdrop}{body}{legend}</svg>\n"


def main() -> None:
    """Write the image."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(draw(args.results), encoding="utf-8")


if __name__ == "__main__":
    main()
