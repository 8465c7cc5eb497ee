"""Plots as inline SVG: no dependency, sharp at any size, colours from the page's style sheet.

Every plot is drawn on a fixed canvas that scales to the width of its box; words are short enough for a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bars", "lines", "timeline"]

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 44
_NUM_COLOURS = 8  # classes c0 ... c7 of the style sheet

Interval = tuple[float, float, float]  # value, low, high


def _ticks(high: float, low: float = 0.0) -> list[float]:
    """About five round numbers from low to at least high."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next((factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5), 10)
    first = math.floor(low / step)
    return [step * i for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}"


def _frame(title: str, x_name: str, y_name: str, ys: Sequence[float], body: str, *, height: int = _HEIGHT) -> str:
    """The axes around a body; ``ys`` are the ticks of the vertical one."""
    floor = height - _BOTTOM
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_y(y, ys, height):.1f}" '
        f'y2="{_y(y, ys, height):.1f}"/><text class="tick" x="{_LEFT - 6}" y="{_y(y, ys, height) + 4:.1f}" '
        f'text-anchor="end">{_number(y)}</text>'
        for y in ys
    )
    names = (
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
        f'<text class="axis" transform="translate(12 {(_TOP + floor) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text>"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{grid}{names}{body}</svg>"
    )


def _y(value: float, ys: Sequence[float], height: int = _HEIGHT) -> float:
    floor = height - _BOTTOM
    return floor - (value - ys[0]) / max(ys[-1] - ys[0], 1e-9) * (floor - _TOP)


def _legend(names: Sequence[str], colours: Mapping[str, int]) -> str:
    items = "".join(
        f'<li><span class="key b{colours.get(name, i) % _NUM_COLOURS}"></span>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def bars(
    title: str,
    groups: Mapping[str, Mapping[str, Interval]],
    colours: Mapping[str, int],
    *,
    unit: str,
    mark: float = 1.0,
) -> str:
    """Horizontal bars with whiskers, grouped.

    Args:
        title: of the plot.
        groups: group -> series -> (value, low, high).
        colours: number of each series' colour, in the order of the bars.
        unit: name of the axis.
        mark: where a line is drawn.
    """
    values = [high for group in groups.values() for _, _, high in group.values()]
    ticks = _ticks(max([*values, mark, 1e-9]))
    row, gap, label = 16, 12, 18
    heights = [label + row * len(group) + gap for group in groups.values()]
    height = sum(heights) + _BOTTOM

    def x(value: float) -> float:
        return 8 + value / ticks[-1] * (_WIDTH - 60)

    parts = [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="0" y2="{height - _BOTTOM}"/>'
        f'<text class="tick" x="{x(t):.1f}" y="{height - 26}" text-anchor="middle">{_number(t)}</text>'
        for t in ticks
    ]
    parts.append(f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="0" y2="{height - _BOTTOM}"/>')
    top = 0
    for (name, group), tall in zip(groups.items(), heights, strict=True):
        parts.append(f'<text class="group" x="8" y="{top + 13}">{escape(name)}</text>')
        shown = [s for s in colours if s in group]
        for i, one in enumerate(shown):
            value, low, high = group[one]
            y = top + label + row * i
            parts.append(
                f'<rect class="c{colours[one] % _NUM_COLOURS}" x="8" y="{y}" width="{x(value) - 8:.1f}" '
                f'height="{row - 4}"><title>{escape(one)}: {value:.2f} ({low:.2f} to {high:.2f})</title></rect>'
                f'<line class="whisker" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y + 6}" y2="{y + 6}"/>'
                f'<text class="tick" x="{x(max(value, high)) + 5:.1f}" y="{y + 10}">{value:.2f}</text>'
            )
        top += tall
    parts.append(f'<text class="axis" x="{_WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(unit)}</text>')
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
    return svg + _legend(list(colours), colours)


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_name: str,
    y_name: str,
    dashed: Sequence[str] = (),
    colours: Mapping[str, int] | None = None,
) -> str:
    """Curves over a common axis; those in ``dashed`` are drawn so, each in its own colour or the next one."""
    own = colours or {}
    points = [point for curve in series.values() for point in curve]
    if not points:
        return '<p class="none">No data in this run.</p>'
    ys = _ticks(max(y for _, y in points))
    xs = _ticks(max(x for x, _ in points), min(x for x, _ in points))

    def x(value: float) -> float:
        return _LEFT + (value - xs[0]) / max(xs[-1] - xs[0], 1e-9) * (_WIDTH - _LEFT - _RIGHT)

    parts = [
        f'<text class="tick" x="{x(t):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(t)}</text>'
        for t in xs
    ]
    for number, (name, curve) in enumerate(series.items()):
        i = own.get(name, number)
        path = " ".join(f"{x(a):.1f},{_y(b, ys):.1f}" for a, b in curve)
        style = f"l{i % _NUM_COLOURS}" + (" dashed" if name in dashed else "")
        parts.append(f'<polyline class="line {style}" points="{path}"><title>{escape(name)}</title></polyline>')
        parts += [
            f'<circle class="c{i % _NUM_COLOURS}" cx="{x(a):.1f}" cy="{_y(b, ys):.1f}" r="2.5">'
            f"<title>{escape(name)}: {_number(a)}, {_number(b)}</title></circle>"
            for a, b in (curve if len(curve) <= 40 else ())
        ]
    return _frame(title, x_name, y_name, ys, "".join(parts)) + _legend(list(series), own)


def timeline(title: str, marks: Mapping[str, Sequence[tuple[float, int]]], colours: Mapping[str, int]) -> str:
    """Tokens out over the seconds of an episode, one staircase per arm: (seconds, tokens so far)."""
    stairs: dict[str, list[tuple[float, float]]] = {}
    for name, steps in marks.items():
        curve: list[tuple[float, float]] = [(0.0, 0.0)]
        for second, tokens in steps:
            curve += [(second, curve[-1][1]), (second, float(tokens))]
        stairs[name] = curve
    return lines(title, stairs, x_name="seconds", y_name="tokens", colours=colours)
