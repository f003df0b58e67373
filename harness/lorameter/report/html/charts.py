"""Figures as pictures: SVG built with the standard library's XML, so that no text becomes an element.

Colours and fonts are classes of the page's style sheet (a variant is `s0` to `s15`), so one picture serves light, dark
and paper. What belongs to a variant carries its name, by which a reader hides it, and shows its numbers when it is
pointed at.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from kernels_check.terminal import escape_control_chars
from lorameter.records.units import Unit, format_interval, format_value, scale_of
from lorameter.report.blocks import Axis, Cell, Curve, Curves
from lorameter.report.figure import Bars, Drawing, Intervals, Mark, Matrix, ParetoFront, Samples, Spot

Series = Mapping[str, int]
"""The number of each variant, by which it has its colour."""
WIDTH, MARGIN, ROW, NAMES = 520, 14, 26, 190
"""Of every picture in its own pixels, which the page stretches; the height of a row, and the room for its name."""
LEFT, TOP, BOTTOM = 64, 30, 240
"""The borders of a plane without a key."""
COLOURS = 16
"""Colours that eyes can tell apart. With more variants, those that vary the same field share one."""
KEY_ROW, MOST_KEYS, MOST_CHANGES = 18, 24, 6
"""Lines above a picture: names, with more of which pointing at a mark shows whose it is, and changes."""
MOST_ROWS, MOST_TICKS, FEW_POINTS, TICKS = 120, 12, 12, 5
"""Rows and named ticks at most; points of a curve that are marked one by one; round numbers at an axis, about."""


def draw(drawing: Drawing, title: str, says: str, series: Series) -> str:
    """The SVG of a drawing, called by its title and described by what it says; empty for a matrix, which is a table."""
    if isinstance(drawing, Matrix):
        return ""
    svg = _PICTURES[type(drawing)](drawing, series)
    for place, (tag, text) in enumerate((("title", title), ("desc", says))):
        element = Element(tag)
        element.text = escape_control_chars(text)
        svg.insert(place, element)
    return tostring(svg, encoding="unicode")


def draw_chart(chart: Curves, above: str, series: Series) -> str:
    """The SVG of a chart that is shown with others below a title."""
    across = dataclasses.replace(chart.across, named=chart.across.named[:MOST_TICKS])
    drawing = dataclasses.replace(chart, across=across, curves=tuple(map(_close_band, chart.curves)))
    count = sum(len(curve.points) for curve in chart.curves)
    says = f"{count} values, with their intervals where they have any."
    return draw(drawing, f"{above}: {across.title}", says, series)


def draw_ratio(cell: Cell, bound: float) -> str:
    """A ratio with its interval around 1, for a table's cell; `bound` is the logarithm at the ends of the picture."""
    width, height = 120.0, 16.0
    svg = Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "class": "ratio", "aria-hidden": "true"})

    def place(ratio: float) -> float:
        return width / 2 * (1 + min(max(math.log(ratio) / bound, -1.0), 1.0) * 0.94)

    _line(svg, (width / 2, 0, width / 2, height), "one")
    if cell.value:
        if cell.low and cell.high:
            _line(svg, (place(cell.low), height / 2, place(cell.high), height / 2), "whisker")
        _add(svg, "circle", "dot", cx=place(cell.value), cy=height / 2, r=3.5)
    return tostring(svg, encoding="unicode")


def series_class(number: int) -> str:
    """The classes of a variant by its number."""
    return f"s s{number % COLOURS}"


def number_series(names: Sequence[str]) -> dict[str, int]:
    """The number of each variant, by which it has its colour: its own, or with more variants than colours that of its
    group, which is the name up to its first `=` or digit."""
    if len(names) <= COLOURS:
        return {name: number for number, name in enumerate(names)}
    groups = {name: re.split(r"[=\d]", name, maxsplit=1)[0] for name in names}
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    return {name: numbers[group] for name, group in groups.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A map of values to pixels, straight or by the logarithm."""

    low: float
    high: float
    begin: float
    end: float
    axis: Axis

    def place(self, value: float) -> float:
        """Where a value is drawn; what lies outside is drawn at the border."""
        ends = self.low, self.high, min(max(value, self.low), self.high)
        low, high, at = map(math.log, ends) if self.axis.log else ends
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Values within the scale, each with how it is written: those that have names, else round ones, all in one unit
        and with as many decimals."""
        if self.axis.named:
            return [(value, text) for value, text in self.axis.named if self.low <= value <= self.high]
        factor, symbol = scale_of(max(abs(self.low), abs(self.high)), self.axis.unit)
        step = _round_step((self.high - self.low) / factor / TICKS)
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / factor / step - 1e-9), math.floor(self.high / factor / step + 1e-9)
        suffix = symbol if symbol.startswith("/") else f" {symbol}".rstrip()
        return [(place * step * factor, f"{place * step:.{places}f}{suffix}") for place in range(first, last + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least` (which is above 0)."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def _scale(axis: Axis, values: Iterable[float | None], begin: float, end: float, *, from_zero: bool = False) -> Scale:
    """A scale that holds all values and the axis' line, with a little room around them."""
    found = [one for one in (*values, axis.line_at) if one is not None and math.isfinite(one)]
    low, high = axis.span or ((min(found), max(found)) if found else (0.0, 1.0))
    if axis.log:
        room = (high / low) ** 0.04 if high > low else 1.1
        low, high = low / room, high * room
    else:
        low = min(0.0, low) if from_zero else low
        room = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
        low, high = low if from_zero else low - room, high + room
    return Scale(low=low, high=high, begin=begin, end=end, axis=axis)


def _intervals(drawing: Intervals, series: Series) -> Element:
    marks, axis = drawing.marks[:MOST_ROWS], drawing.axis
    bottom = MARGIN + ROW * len(marks)
    svg = _canvas(bottom + 40)
    scale = _scale(axis, _ends(marks), NAMES, WIDTH - MARGIN)
    _axis_across(svg, scale, MARGIN, bottom)
    for place, mark in enumerate(marks):
        y = MARGIN + ROW * (place + 0.5)
        own = _group(svg, mark.name, series, f"{mark.name}: {_describe(mark, axis)}")
        _write(own, NAMES - 10, y + 4, _shorten(mark.name), "name", "end")
        _whisker(own, scale, mark, y, upright=False)
        _dot(own, scale.place(mark.value), y, hollow=mark.low is None)
    return svg


def _curves(drawing: Curves, series: Series) -> Element:
    points = [point for curve in drawing.curves for point in curve.points]
    values = [x for x, _ in points], [end for curve in drawing.curves for end in curve.ends]
    names = [curve.name for curve in drawing.curves]
    svg, across, up = _plane(
        (drawing.across, drawing.up), values, names, series, "curve", over=len(drawing.changes[:MOST_CHANGES])
    )
    for curve in drawing.curves:
        own = _group(svg, curve.name, series, curve.name)
        if curve.band:
            around = [(x, high) for x, _, high in curve.band] + [(x, low) for x, low, _ in reversed(curve.band)]
            SubElement(own, "polygon", {"points": _path(around, across, up), "class": "band"})
        SubElement(own, "polyline", {"points": _path(curve.points, across, up), "class": "curve"})
        for x, y in curve.points if len(curve.points) <= FEW_POINTS else ():
            _dot(own, across.place(x), up.place(y))
    for place, change in enumerate(drawing.changes[:MOST_CHANGES]):
        x, y = across.place(change.at), up.end - 6 - KEY_ROW * place
        own = SubElement(svg, "g", {"class": f"change {change.tone}"})
        _line(own, (x, y, x, up.begin), "mark")
        late = x > (across.begin + across.end) / 2
        _write(own, x - 4 if late else x + 4, y + 6, _shorten(change.text, 40), "tick", "end" if late else "start")
    return svg


def _front(drawing: ParetoFront, series: Series) -> Element:
    spots = drawing.spots
    values = _ends(spot.across for spot in spots), _ends(spot.up for spot in spots)
    axes = drawing.across, drawing.up
    svg, across, up = _plane(axes, values, [spot.name for spot in spots], series, "dot")
    SubElement(svg, "polyline", {"points": _path(_stair(spots), across, up), "class": "front"})
    for spot in spots:
        both = "; ".join(_describe(mark, axis) for mark, axis in zip((spot.across, spot.up), axes, strict=True))
        own = _group(svg, spot.name, series, f"{spot.name}: {both}; {'on' if spot.best else 'behind'} the front")
        x, y = across.place(spot.across.value), up.place(spot.up.value)
        _whisker(own, across, spot.across, y, upright=False)
        _whisker(own, up, spot.up, x, upright=True)
        _dot(own, x, y, hollow=not spot.best)
    return svg


def _bars(drawing: Bars, series: Series) -> Element:
    bars = drawing.bars[:MOST_ROWS]
    kinds = list(dict.fromkeys(part.kind for bar in bars for part in bar.parts))
    top = MARGIN + _key_height(kinds)
    bottom = top + ROW * len(bars)
    svg = _canvas(bottom + 40)
    _key(svg, kinds, [f"p{place % COLOURS}" for place in range(len(kinds))], "part")
    totals = [sum(part.value for part in bar.parts) for bar in bars]
    scale = _scale(drawing.axis, totals, NAMES, WIDTH - MARGIN, from_zero=True)
    _axis_across(svg, scale, top, bottom)
    for row, bar in enumerate(bars):
        y, at = top + ROW * row + 5, 0.0
        parts = ", ".join(f"{part.kind} {format_value(part.value, drawing.axis.unit)}" for part in bar.parts)
        own = _group(svg, bar.name, series, f"{bar.name}: {parts}")
        _write(own, NAMES - 10, y + 12, _shorten(bar.name), "name", "end")
        for part in bar.parts:
            begin, end = scale.place(at), scale.place(at + part.value)
            kind = f"part p{kinds.index(part.kind) % COLOURS}"
            _add(own, "rect", kind, x=begin, y=y, width=end - begin, height=ROW - 10)
            at += part.value
    return svg


def _samples(drawing: Samples, series: Series) -> Element:
    stretches = drawing.stretches
    values = (
        [end for one in stretches for end in (one.began_s, one.ended_s)],
        [value for one in stretches for value in one.samples],
    )
    names = list(dict.fromkeys(one.name for one in stretches))
    svg, across, up = _plane((drawing.across, drawing.up), values, names, series, "dot")
    for one in stretches:
        own = _group(svg, one.name, series, one.name)
        places = dict.fromkeys((round(across.place(x)), round(up.place(y))) for x, y in one.points)
        SubElement(own, "path", {"d": "".join(f"M{x} {y}h0" for x, y in places), "class": "samples"})
    return svg


_PICTURES: Mapping[type, Callable[[Any, Series], Element]] = {
    Intervals: _intervals, Curves: _curves, ParetoFront: _front, Bars: _bars, Samples: _samples,
}  # fmt: skip


def _plane(
    axes: tuple[Axis, Axis], values: tuple[Iterable[float | None], Iterable[float | None]], names: Sequence[str],
    series: Series, shape: str, *, over: int = 0,
) -> tuple[Element, Scale, Scale]:  # fmt: skip
    """An empty plane that holds all values, with the axis below (the first) and the one to its left, and a key above
    where several have values in it; `over`: how many lines of text it has above."""
    shown = names if len(names) > 1 else ()
    top = TOP + _key_height(shown) + KEY_ROW * over
    bottom = top + BOTTOM - TOP
    svg = _canvas(bottom + 50)
    across, up = _scale(axes[0], values[0], LEFT, WIDTH - MARGIN), _scale(axes[1], values[1], bottom, top)
    _key(svg, shown, [series_class(series.get(name, 0)) for name in shown], shape)
    for value, text in up.ticks():
        y = up.place(value)
        _line(svg, (across.begin, y, across.end, y), "grid")
        _write(svg, across.begin - 6, y + 4, text, "tick", "end")
    _write(svg, MARGIN, top - 14 - KEY_ROW * over, axes[1].title, "axis")
    _axis_across(svg, across, top, bottom)
    if (at := axes[1].line_at) is not None:
        _line(svg, (across.begin, up.place(at), across.end, up.place(at)), "one")
    return svg, across, up


def _axis_across(parent: Element, scale: Scale, top: float, bottom: float) -> None:
    """The axis below a picture, its grid, and the line that values are read against."""
    for value, text in scale.ticks():
        x = scale.place(value)
        _line(parent, (x, top, x, bottom), "grid")
        _write(parent, x, bottom + 15, text, "tick", "middle")
    if (at := scale.axis.line_at) is not None:
        _line(parent, (scale.place(at), top, scale.place(at), bottom), "one")
    _write(parent, (scale.begin + scale.end) / 2, bottom + 32, scale.axis.title, "axis", "middle")


def _key_height(names: Sequence[str]) -> float:
    return KEY_ROW * -(-len(names[:MOST_KEYS]) // _key_columns(names))


def _key_columns(names: Sequence[str]) -> int:
    """As many as have room for the longest name."""
    longest = max(map(len, names), default=0)
    return 3 if longest <= 18 else 2 if longest <= 30 else 1


def _key(parent: Element, names: Sequence[str], classes: Sequence[str], shape: str) -> None:
    """Whose each colour is: swatches, each with its name, at the top of a picture."""
    columns = _key_columns(names)
    for place, (name, own) in enumerate(zip(names[:MOST_KEYS], classes, strict=False)):
        x = MARGIN + place % columns * (WIDTH - MARGIN) / columns
        y = MARGIN + KEY_ROW * (place // columns)
        held = SubElement(parent, "g", {"class": own})
        if shape == "curve":
            _line(held, (x, y - 3, x + 20, y - 3), "curve")
        elif shape == "dot":
            _dot(held, x + 6, y - 3)
        else:
            _add(held, "rect", shape, x=x, y=y - 9, width=12, height=12)
        _write(held, x + 25, y + 1, _shorten(name, 60 // columns), "tick")


def _canvas(height: float) -> Element:
    size = f"0 0 {WIDTH} {height:g}"
    return Element("svg", {"viewBox": size, "role": "img", "xmlns": "http://www.w3.org/2000/svg"})


def _add(parent: Element, tag: str, kind: str, **numbers: float) -> Element:
    """An element of a class at a place; numbers to a tenth of a pixel."""
    return SubElement(parent, tag, {"class": kind, **{key: f"{value:.1f}" for key, value in numbers.items()}})


def _write(parent: Element, x: float, y: float, text: str, kind: str, anchor: str = "start") -> None:
    element = _add(parent, "text", kind, x=x, y=y)
    element.set("text-anchor", anchor)
    element.text = escape_control_chars(text)


def _line(parent: Element, ends: tuple[float, float, float, float], kind: str) -> None:
    x1, y1, x2, y2 = ends
    _add(parent, "line", kind, x1=x1, y1=y1, x2=x2, y2=y2)


def _dot(parent: Element, x: float, y: float, *, hollow: bool = False) -> None:
    """A value; hollow where it has no interval, or is behind others."""
    _add(parent, "circle", "hollow" if hollow else "dot", cx=x, cy=y, r=4.5)


def _whisker(parent: Element, scale: Scale, mark: Mark, at: float, *, upright: bool) -> None:
    """An interval with an end to each side; nothing where there is none."""
    if mark.low is None or mark.high is None:
        return
    begin, end = scale.place(mark.low), scale.place(mark.high)
    for ends in ((begin, at, end, at), (begin, at - 5, begin, at + 5), (end, at - 5, end, at + 5)):
        _line(parent, (ends[1], ends[0], ends[3], ends[2]) if upright else ends, "whisker")


def _group(parent: Element, name: str, series: Series, said: str) -> Element:
    """What belongs to a name, and what is shown of it when it is pointed at."""
    own = series_class(series.get(name, 0))
    found = SubElement(parent, "g", {"class": own, "data-variant": escape_control_chars(name)})
    SubElement(found, "title").text = escape_control_chars(said)
    return found


def _path(points: Iterable[tuple[float, float]], across: Scale, up: Scale) -> str:
    return " ".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in points)


def _shorten(text: str, most: int = 22) -> str:
    """A text for a picture; the table below it has the whole."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _ends(marks: Iterable[Mark]) -> list[float | None]:
    """All that a scale must hold of these marks."""
    return [end for mark in marks for end in (mark.value, mark.low, mark.high)]


def _describe(mark: Mark, axis: Axis) -> str:
    unit: Unit = axis.unit
    value = format_interval(mark.value, mark.low, mark.high, unit)
    return " ".join(part for part in (axis.title, value, mark.verdict) if part)


def _close_band(curve: Curve) -> Curve:
    """A curve whose band, where it has one, goes to the points that have no interval, as the reference has none."""
    if not curve.band:
        return curve
    ends = {x: (low, high) for x, low, high in curve.band}
    return dataclasses.replace(curve, band=tuple((x, *ends.get(x, (y, y))) for x, y in curve.points))


def _stair(spots: tuple[Spot, ...]) -> list[tuple[float, float]]:
    """The front as a stair: what lies behind it has something better next to it, or above or below it, whichever way is
    better there."""
    best = sorted((spot.across.value, spot.up.value) for spot in spots if spot.best)
    corners = [corner for (x, y), (right, _) in pairwise(best) for corner in ((x, y), (right, y))]
    return [*corners, *best[-1:]]
