"""A scatter plot as SVG, both axes logarithmic: a few lines instead of a plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Point = tuple[float, float, str]
WIDTH, HEIGHT, MARGIN = 760, 480, 64
COLOURS = ("#2f6fde", "#d9622b", "#2a9d6f", "#8a4fbf", "#a08a00")


def write_scatter(
    path: Path, series: Mapping[str, Sequence[Point]], across: str, up: str, *, level: float | None
) -> None:
    """Write a plot.

    Args:
        path: the file.
        series: points by what they have in common, each with its name.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        level: where a horizontal line is drawn.
    """
    points = [point for each in series.values() for point in each]
    x = _Axis([point[0] for point in points], MARGIN, WIDTH - 20)
    y = _Axis([point[1] for point in points] + ([level] if level else []), HEIGHT - MARGIN, 40)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' "
        "font-family='system-ui, sans-serif' font-size='12'>",
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='#fff'/>",
    ]
    for value in x.ticks:
        parts.append(_line(x.at(value), 40, x.at(value), HEIGHT - MARGIN, "#e3e6ea"))
        parts.append(_text(x.at(value), HEIGHT - MARGIN + 18, f"{value:g}", "middle"))
    for value in y.ticks:
        parts.append(_line(MARGIN, y.at(value), WIDTH - 20, y.at(value), "#e3e6ea"))
        parts.append(_text(MARGIN - 8, y.at(value) + 4, f"{value:g}", "end"))
    if level:
        parts.append(_line(MARGIN, y.at(level), WIDTH - 20, y.at(level), "#555"))
    for number, (name, each) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f"<circle cx='{MARGIN + 8 + 170 * number}' cy='22' r='4' fill='{colour}'/>")
        parts.append(_text(MARGIN + 18 + 170 * number, 26, name, "start"))
        for across_value, up_value, label in each:
            parts.append(
                f"<circle cx='{x.at(across_value):.1f}' cy='{y.at(up_value):.1f}' r='4' "
                f"fill='{colour}' fill-opacity='.75'><title>{html.escape(label)}</title></circle>"
            )
    parts.append(_text((MARGIN + WIDTH) / 2, HEIGHT - 16, across, "middle"))
    parts.append(
        f"<g transform='rotate(-90 16 {HEIGHT / 2})'>{_text(16, HEIGHT / 2, up, 'middle')}</g>"
    )
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


class _Axis:
    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self._low, self._high = math.log(min(values) * 0.9), math.log(max(values) * 1.1)
        self._start, self._end = start, end
        decades = range(math.floor(self._low / math.log(10)), 1 + int(self._high / math.log(10)))
        steps = [mantissa * 10.0**power for power in decades for mantissa in (1, 2, 5)]
        self.ticks = [each for each in steps if self._low <= math.log(each) <= self._high]

    def at(self, value: float) -> float:
        share = (math.log(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}'/>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    where = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'"
    return f"<text {where} fill='#333'>{html.escape(text)}</text>"
