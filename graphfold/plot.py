"""Small scatter plots as SVG: a few series on two linear axes, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Mark = Literal["line", "dot", "ring"]
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 20, 40, 56
_COLOURS = ("#2563eb", "#111827", "#dc2626", "#059669", "#d97706", "#7c3aed")


@dataclass(frozen=True)
class Series:
    """Points with a name and a mark; a line joins its points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    mark: Mark = "dot"


def scatter(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Draw series against each other; returns an SVG document."""
    xs = _Axis([x for each in series for x, _ in each.points], _LEFT, _WIDTH - _RIGHT)
    ys = _Axis([y for each in series for _, y in each.points], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        *_grid(xs, ys),
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text transform="translate(18 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
    ]
    for number, each in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        parts += _drawn(each, xs, ys, colour)
        at = _LEFT + 150 * number
        parts.append(f'<circle cx="{at}" cy="20" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{at + 9}" y="24">{escape(each.name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """A linear scale with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = (high - low or abs(high) or 1.0) * 0.05
        self.low, self.high = low - margin, high + margin
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = min((m * power for m in (1, 2, 5, 10)), key=lambda each: abs(each - rough))
        first = math.ceil(self.low / step)
        count = math.floor(self.high / step) - first + 1
        return [(first + number) * step for number in range(count)]


def _grid(xs: _Axis, ys: _Axis) -> Iterable[str]:
    for tick in xs.ticks():
        x = xs.at(tick)
        yield f'<line x1="{x}" x2="{x}" y1="{ys.start}" y2="{ys.end}" stroke="#e5e7eb"/>'
        yield f'<text x="{x}" y="{ys.start + 18}" text-anchor="middle">{tick:.4g}</text>'
    for tick in ys.ticks():
        y = ys.at(tick)
        yield f'<line x1="{xs.start}" x2="{xs.end}" y1="{y}" y2="{y}" stroke="#e5e7eb"/>'
        yield f'<text x="{xs.start - 8}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>'


def _drawn(series: Series, xs: _Axis, ys: _Axis, colour: str) -> Iterable[str]:
    places = [(xs.at(x), ys.at(y)) for x, y in sorted(series.points)]
    if series.mark == "line" and len(places) > 1:
        path = " ".join(f"{x},{y}" for x, y in places)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    for x, y in places:
        if series.mark == "ring":
            yield (
                f'<circle cx="{x}" cy="{y}" r="8" fill="none" stroke="{colour}" '
                'stroke-width="2.5"/>'
            )
        else:
            radius = 5 if series.mark == "dot" else 2
            yield f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>'


# --- panels -----------------------------------------------------------------------------------

_PANEL_WIDTH, _PANEL_HEIGHT = 420, 300
_NAMES_WIDTH = 150  # to the right of the axes
_LINE_HEIGHT = 11
_LONGEST_NAME = 24


@dataclass(frozen=True)
class Line:
    """A course over time; one that stands out is drawn in colour."""

    name: str
    points: Sequence[tuple[float, float]]
    stands_out: bool


@dataclass(frozen=True)
class Panel:
    """One picture of a row: lines over a common axis, each named at its end."""

    title: str
    x_label: str
    lines: Sequence[Line]


def panels(rows: Sequence[Sequence[Panel]]) -> str:
    """Draw rows of panels; returns an SVG document."""
    width = _PANEL_WIDTH * max(len(row) for row in rows)
    height = _PANEL_HEIGHT * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            place = f"translate({x * _PANEL_WIDTH} {y * _PANEL_HEIGHT})"
            parts += [f'<g transform="{place}">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> Iterable[str]:
    left, right = 48, _PANEL_WIDTH - _NAMES_WIDTH
    top, bottom = 28, _PANEL_HEIGHT - 40
    points = [point for line in panel.lines for point in line.points]
    xs = _Axis([x for x, _ in points], left, right)
    ys = _Axis([y for _, y in points], bottom, top)
    yield f'<text x="{left}" y="16" font-weight="bold">{escape(panel.title)}</text>'
    yield from _grid(xs, ys)
    yield (
        f'<text x="{(left + right) / 2}" y="{bottom + 32}" text-anchor="middle">'
        f"{escape(panel.x_label)}</text>"
    )
    ends = sorted(panel.lines, key=lambda line: ys.at(line.points[-1][1]))
    height = float(top - _LINE_HEIGHT)
    for line in ends:
        colour = _COLOURS[0] if line.stands_out else "#9ca3af"
        places = [(xs.at(x), ys.at(y)) for x, y in line.points]
        path = " ".join(f"{x},{y}" for x, y in places)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        # Names of lines that end close together stand below one another.
        height = max(height + _LINE_HEIGHT, places[-1][1])
        name = line.name if len(line.name) <= _LONGEST_NAME else f"…{line.name[-_LONGEST_NAME:]}"
        yield (
            f'<text x="{right + 4}" y="{round(height + 3, 1)}" fill="{colour}">{escape(name)}'
            "</text>"
        )
