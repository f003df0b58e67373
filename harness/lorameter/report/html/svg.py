"""Computes the geometry of a page's pictures (scales, ticks, paths, keys, colours); `charts.svg.jinja` draws them.

Colours and fonts are classes of the page's style sheet (a variant is `s0` to `s15`), so one picture serves light, dark
and paper.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorameter.records.units import choose_scale
from lorameter.report.blocks import Axis, Bars, Chart, Curve, Intervals, Point

WIDTH, MARGIN, ROW, NAMES = 520, 14, 26, 190
"""Size of every picture in its own pixels, which the page scales; the height of a row, and the width for its name."""
LEFT, TOP, HEIGHT = 64, 30, 210
"""The left border, the upper border and the height of a plot area without a key."""
COLOURS = 16
"""Number of distinguishable colours. With more variants, those that vary the same field share a colour."""
KEY_ROW, MAX_KEYS, MAX_CHANGES = 18, 24, 6
"""Height of a line; maximum names (with more, pointing at a mark shows its name) and changes above a picture."""
MAX_ROWS, MAX_TICKS, TICKS = 120, 12, 5
"""Maximum rows and named ticks; approximate number of round values on an axis."""


def number_variants(names: Sequence[str]) -> dict[str, int]:
    """The number of each variant, which determines its colour: its own, or, with more variants than colours, that of
    its group, which is the name up to the first `=` or digit."""
    if len(names) <= COLOURS:
        return {name: number for number, name in enumerate(names)}
    groups = {name: re.split(r"[=\d]", name, maxsplit=1)[0] for name in names}
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    return {name: numbers[group] for name, group in groups.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A linear or logarithmic map from values to pixels."""

    low: float
    high: float
    begin: float
    end: float
    axis: Axis

    def place(self, value: float) -> float:
        """The pixel of a value; a value outside of the scale is clipped to the border."""
        ends = self.low, self.high, min(max(value, self.low), self.high)
        low, high, at = map(math.log, ends) if self.axis.log else ends
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Values within the scale, each with its label: the named ones if there are any, else round values, all in one
        unit and with the same decimals."""
        if self.axis.named:
            return list(self.axis.named[:MAX_TICKS])
        factor, symbol = choose_scale(max(abs(self.low), abs(self.high)), self.axis.unit)
        least = (self.high - self.low) / factor / TICKS
        power = 10.0 ** math.floor(math.log10(least))
        step = next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / factor / step - 1e-9), math.floor(self.high / factor / step + 1e-9)
        suffix = symbol if symbol.startswith("/") else f" {symbol}".rstrip()
        return [(place * step * factor, f"{place * step:.{places}f}{suffix}") for place in range(first, last + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Positions of the parts of a picture, in its pixels."""

    across: Scale
    up: Scale | None = None
    top: float
    bottom: float
    key: tuple[str, ...] = ()
    """Names above the picture, each in its colour."""


def lay_out(drawing: Intervals | Bars | Chart) -> Layout:
    """The scales, the borders and the key of a picture."""
    if isinstance(drawing, Chart):
        return _lay_out_chart(drawing)
    if isinstance(drawing, Intervals):
        marks = drawing.marks[:MAX_ROWS]
        ends = [end for mark in marks for end in (mark.value, mark.low, mark.high)]
        scale = _scale(drawing.axis, ends, NAMES, WIDTH - MARGIN)
        return Layout(across=scale, top=MARGIN, bottom=MARGIN + ROW * len(marks))
    kinds = tuple(dict.fromkeys(kind for held in drawing.bars.values() for kind in held))
    most = max(sum(held.values()) for held in drawing.bars.values())
    scale = Scale(low=0.0, high=1.04 * most or 1.0, begin=NAMES, end=WIDTH - MARGIN, axis=drawing.axis)
    top = MARGIN + _key_height(kinds)
    return Layout(across=scale, top=top, bottom=top + ROW * len(list(drawing.bars)[:MAX_ROWS]), key=kinds)


def _lay_out_chart(chart: Chart) -> Layout:
    """A plot area with a key above it if there are several curves, and changes below the key."""
    names = tuple(dict.fromkeys(curve.name for curve in chart.curves))
    key = names if len(names) > 1 else ()
    top = TOP + _key_height(key) + KEY_ROW * len(chart.changes[:MAX_CHANGES])
    bottom = top + HEIGHT
    points = [point for curve in chart.curves for point in curve.points]
    across = _scale(chart.across, [x for one in points for x in (one.x, *(one.x_interval or ()))], LEFT, WIDTH - MARGIN)
    up = _scale(chart.up, [y for one in points for y in (one.y, *(one.y_interval or ()))], bottom, top)
    return Layout(across=across, up=up, top=top, bottom=bottom, key=key)


def _scale(axis: Axis, values: Iterable[float | None], begin: float, end: float) -> Scale:
    """A scale that includes all values and the axis' line, with some margin."""
    found = [one for one in (*values, axis.line_at) if one is not None and math.isfinite(one * one)]
    low, high = axis.span or ((min(found), max(found)) if found else (0.0, 1.0))
    if axis.log:
        room = (high / low) ** 0.04 if high > low else 1.1
        return Scale(low=low / room, high=high * room, begin=begin, end=end, axis=axis)
    room = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return Scale(low=low - room, high=high + room, begin=begin, end=end, axis=axis)


def key_columns(names: Sequence[str]) -> int:
    """Number of columns of a key that have room for the longest name."""
    longest = max(map(len, names), default=0)
    return 3 if longest <= 18 else 2 if longest <= 30 else 1


def _key_height(names: Sequence[str]) -> float:
    return KEY_ROW * -(-len(names[:MAX_KEYS]) // key_columns(names))


def ratio_scale(bound: float) -> Scale:
    """The scale of a ratio's picture in a table cell; `bound` is the logarithm at its ends."""
    return Scale(low=math.exp(-bound), high=math.exp(bound), begin=3.6, end=116.4, axis=Axis(title="", log=True))


def line_path(points: Iterable[Point], across: Scale, up: Scale) -> str:
    """The points of a polyline or polygon, as an SVG path."""
    return " ".join(f"{across.place(point.x):.1f},{up.place(point.y):.1f}" for point in points)


def interval_polygon(curve: Curve) -> list[Point]:
    """The polygon around the intervals of a curve; a point without an interval has zero width."""
    ends = [(point.x, *(point.y_interval or (point.y, point.y))) for point in curve.points]
    return [Point(x=x, y=high) for x, _, high in ends] + [Point(x=x, y=low) for x, low, _ in reversed(ends)]


def points_path(curve: Curve, across: Scale, up: Scale) -> str:
    """The path that draws each point once, rounded to pixels; relative moves between sorted points keep it short."""
    places = sorted({(round(across.place(point.x)), round(up.place(point.y))) for point in curve.points})
    return "".join(f"m{x - left} {y - above}h0" for (left, above), (x, y) in itertools.pairwise([(0, 0), *places]))
