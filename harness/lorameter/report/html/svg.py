"""Figures as SVG, built with the standard library's XML, so that no text becomes an element.

Colours and fonts are classes of the page's style sheet (a variant is `s0` to `s15`), so one picture serves light, dark
and paper. An element of a variant carries its name, by which a reader hides it, and shows its numbers when it is
pointed at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from kernels_check.terminal import escape_control_chars
from lorameter.records.units import format_interval, format_value, scale_of
from lorameter.report.blocks import Axis, Bars, Cell, Chart, Curve, Intervals, Matrix

Colours = Mapping[str, int]
"""The number of each variant, by which it has its colour."""
WIDTH, MARGIN, ROW, NAMES = 520, 14, 26, 190
"""Of every picture in its own pixels, which the page stretches; the height of a row, and the room for its name."""
LEFT, TOP, HEIGHT = 64, 30, 210
"""The left border, the upper border and the height of a plane without a key."""
COLOURS = 16
"""Colours that eyes can tell apart. With more variants, those that vary the same field share one."""
KEY_ROW, MOST_KEYS, MOST_CHANGES = 18, 24, 6
"""Lines above a picture: names, with more of which pointing at a mark shows whose it is, and changes."""
MOST_ROWS, MOST_TICKS, FEW_POINTS, TICKS = 120, 12, 12, 5
"""Rows and named ticks at most; points of a curve that are marked one by one; round numbers at an axis, about."""


def draw(drawing: Intervals | Bars | Chart | Matrix, title: str, says: str, colours: Colours) -> str:
    """The SVG of a drawing with its title and description; empty for a matrix, which is a table."""
    if isinstance(drawing, Matrix):
        return ""
    if isinstance(drawing, Chart):
        svg = _chart(drawing, colours)
    else:
        svg = _intervals(drawing, colours) if isinstance(drawing, Intervals) else _bars(drawing, colours)
    for place, (tag, text) in enumerate((("title", title), ("desc", says))):
        element = Element(tag)
        element.text = escape_control_chars(text)
        svg.insert(place, element)
    return tostring(svg, encoding="unicode")


def draw_ratio(cell: Cell, bound: float) -> str:
    """A ratio with its interval around 1, for a table's cell; `bound` is the logarithm at the ends of the picture."""
    svg = Element("svg", {"viewBox": "0 0 120 16", "class": "ratio", "aria-hidden": "true"})
    axis = Axis(title="", log=True)
    scale = Scale(low=math.exp(-bound), high=math.exp(bound), begin=3.6, end=116.4, axis=axis)
    _line(svg, (60, 0, 60, 16), "one")
    if cell.value:
        if cell.low and cell.high:
            _line(svg, (scale.place(cell.low), 8, scale.place(cell.high), 8), "whisker")
        _add(svg, "circle", "dot", cx=scale.place(cell.value), cy=8, r=3.5)
    return tostring(svg, encoding="unicode")


def colour_class(number: int) -> str:
    """The classes of a variant by its number."""
    return f"s s{number % COLOURS}"


def number_variants(names: Sequence[str]) -> dict[str, int]:
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
            return list(self.axis.named[:MOST_TICKS])
        factor, symbol = scale_of(max(abs(self.low), abs(self.high)), self.axis.unit)
        least = (self.high - self.low) / factor / TICKS
        power = 10.0 ** math.floor(math.log10(least))
        step = next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / factor / step - 1e-9), math.floor(self.high / factor / step + 1e-9)
        suffix = symbol if symbol.startswith("/") else f" {symbol}".rstrip()
        return [(place * step * factor, f"{place * step:.{places}f}{suffix}") for place in range(first, last + 1)]


def _scale(axis: Axis, values: Iterable[float | None], begin: float, end: float) -> Scale:
    """A scale that holds all values and the axis' line, with a little room around them."""
    found = [one for one in (*values, axis.line_at) if one is not None and math.isfinite(one)]
    low, high = axis.span or ((min(found), max(found)) if found else (0.0, 1.0))
    if axis.log:
        room = (high / low) ** 0.04 if high > low else 1.1
        return Scale(low=low / room, high=high * room, begin=begin, end=end, axis=axis)
    room = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return Scale(low=low - room, high=high + room, begin=begin, end=end, axis=axis)


def _intervals(drawing: Intervals, colours: Colours) -> Element:
    marks, axis = drawing.marks[:MOST_ROWS], drawing.axis
    bottom = MARGIN + ROW * len(marks)
    svg = _canvas(bottom + 40)
    scale = _scale(axis, [end for mark in marks for end in (mark.value, mark.low, mark.high)], NAMES, WIDTH - MARGIN)
    _axis_across(svg, scale, MARGIN, bottom)
    for place, mark in enumerate(marks):
        y = MARGIN + ROW * (place + 0.5)
        value = format_interval(mark.value, mark.low, mark.high, axis.unit)
        own = _group(svg, mark.name, colours, f"{mark.name}: {axis.title} {value} {mark.verdict}".rstrip())
        _write(own, NAMES - 10, y + 4, _shorten(mark.name), "name", "end")
        if mark.low is not None and mark.high is not None:
            _whisker(own, scale.place(mark.low), scale.place(mark.high), y)
        _dot(own, scale.place(mark.value), y, hollow=mark.low is None)
    return svg


def _bars(drawing: Bars, colours: Colours) -> Element:
    bars, unit = dict(list(drawing.bars.items())[:MOST_ROWS]), drawing.axis.unit
    kinds = list(dict.fromkeys(kind for held in bars.values() for kind in held))
    top = MARGIN + _key_height(kinds)
    bottom = top + ROW * len(bars)
    svg = _canvas(bottom + 40)
    _key(svg, kinds, [f"p{place % COLOURS}" for place in range(len(kinds))], "part")
    most = max(sum(held.values()) for held in bars.values())
    scale = Scale(low=0.0, high=1.04 * most or 1.0, begin=NAMES, end=WIDTH - MARGIN, axis=drawing.axis)
    _axis_across(svg, scale, top, bottom)
    for row, (name, held) in enumerate(bars.items()):
        y, at = top + ROW * row + 5, 0.0
        own = _group(
            svg, name, colours, f"{name}: {', '.join(f'{k} {format_value(v, unit)}' for k, v in held.items())}"
        )
        _write(own, NAMES - 10, y + 12, _shorten(name), "name", "end")
        for kind, size in held.items():
            begin, end = scale.place(at), scale.place(at + size)
            classes = f"part p{kinds.index(kind) % COLOURS}"
            _add(own, "rect", classes, x=begin, y=y, width=end - begin, height=ROW - 10)
            at += size
    return svg


def _chart(chart: Chart, colours: Colours) -> Element:
    """A plane with a key above where it has several curves, and changes below the key."""
    names = list(dict.fromkeys(curve.name for curve in chart.curves))
    shown, changes = names if len(names) > 1 else (), chart.changes[:MOST_CHANGES]
    top = TOP + _key_height(shown) + KEY_ROW * len(changes)
    bottom = top + HEIGHT
    svg = _canvas(bottom + 50)
    points = [point for curve in chart.curves for point in curve.points]
    across = _scale(chart.across, [x for one in points for x in (one.x, *(one.x_interval or ()))], LEFT, WIDTH - MARGIN)
    up = _scale(chart.up, [y for one in points for y in (one.y, *(one.y_interval or ()))], bottom, top)
    _key(svg, shown, [colour_class(colours.get(name, 0)) for name in shown], chart.style)
    for value, text in up.ticks():
        y = up.place(value)
        _line(svg, (across.begin, y, across.end, y), "grid")
        _write(svg, across.begin - 6, y + 4, text, "tick", "end")
    _write(svg, MARGIN, top - 14 - KEY_ROW * len(changes), chart.up.title, "axis")
    _axis_across(svg, across, top, bottom)
    if chart.front:
        SubElement(svg, "polyline", {"points": _path(chart.front, across, up), "class": "front"})
    draw_curve = {"joined": _joined, "dots": _dots, "specks": _specks}[chart.style]
    for curve in chart.curves:
        draw_curve(_group(svg, curve.name, colours, _describe(curve, chart)), curve, across, up)
    for place, change in enumerate(changes):
        x, y = across.place(change.at), top - 6 - KEY_ROW * place
        own = SubElement(svg, "g", {"class": f"change {change.tone}"})
        _line(own, (x, y, x, bottom), "mark")
        late = x > (across.begin + across.end) / 2
        _write(own, x - 4 if late else x + 4, y + 6, _shorten(change.text, 40), "tick", "end" if late else "start")
    return svg


def _describe(curve: Curve, chart: Chart) -> str:
    """The name of a curve; of a single point its numbers too."""
    if chart.style != "dots":
        return curve.name
    (point,) = curve.points
    (x_low, x_high), (y_low, y_high) = (ends or (None, None) for ends in (point.x_interval, point.y_interval))
    x = format_interval(point.x, x_low, x_high, chart.across.unit)
    y = format_interval(point.y, y_low, y_high, chart.up.unit)
    return (
        f"{curve.name}: {chart.across.title} {x}; {chart.up.title} {y}; {'behind' if curve.hollow else 'on'} the front"
    )


def _joined(own: Element, curve: Curve, across: Scale, up: Scale) -> None:
    """A line through the points; around it the band of their intervals."""
    ends = [(point.x, *(point.y_interval or (point.y, point.y))) for point in curve.points]
    if any(point.y_interval for point in curve.points):
        around = [(x, high) for x, _, high in ends] + [(x, low) for x, low, _ in reversed(ends)]
        SubElement(own, "polygon", {"points": _path(around, across, up), "class": "band"})
    line = _path([(point.x, point.y) for point in curve.points], across, up)
    SubElement(own, "polyline", {"points": line, "class": "curve"})
    for point in curve.points if len(curve.points) <= FEW_POINTS else ():
        _dot(own, across.place(point.x), up.place(point.y))


def _dots(own: Element, curve: Curve, across: Scale, up: Scale) -> None:
    for point in curve.points:
        x, y = across.place(point.x), up.place(point.y)
        if point.x_interval:
            begin, end = map(across.place, point.x_interval)
            _whisker(own, begin, end, y)
        if point.y_interval:
            begin, end = map(up.place, point.y_interval)
            _whisker(own, begin, end, x, upright=True)
        _dot(own, x, y, hollow=curve.hollow)


def _specks(own: Element, curve: Curve, across: Scale, up: Scale) -> None:
    places = dict.fromkeys((round(across.place(point.x)), round(up.place(point.y))) for point in curve.points)
    SubElement(own, "path", {"d": "".join(f"M{x} {y}h0" for x, y in places), "class": "samples"})


def _axis_across(parent: Element, scale: Scale, top: float, bottom: float) -> None:
    """The axis below a picture, its grid, and the line that values are read against."""
    for value, text in scale.ticks():
        x = scale.place(value)
        _line(parent, (x, top, x, bottom), "grid")
        _write(parent, x, bottom + 15, text, "tick", "middle")
    if (at := scale.axis.line_at) is not None:
        _line(parent, (scale.place(at), top, scale.place(at), bottom), "one")
    _write(parent, (scale.begin + scale.end) / 2, bottom + 32, scale.axis.title, "axis", "middle")


def _key_columns(names: Sequence[str]) -> int:
    """As many as have room for the longest name."""
    longest = max(map(len, names), default=0)
    return 3 if longest <= 18 else 2 if longest <= 30 else 1


def _key_height(names: Sequence[str]) -> float:
    return KEY_ROW * -(-len(names[:MOST_KEYS]) // _key_columns(names))


def _key(parent: Element, names: Sequence[str], classes: Sequence[str], style: str) -> None:
    """Whose each colour is: swatches, each with its name, at the top of a picture."""
    columns = _key_columns(names)
    for place, (name, own) in enumerate(zip(names[:MOST_KEYS], classes, strict=False)):
        x = MARGIN + place % columns * (WIDTH - MARGIN) / columns
        y = MARGIN + KEY_ROW * (place // columns)
        held = SubElement(parent, "g", {"class": own})
        if style == "joined":
            _line(held, (x, y - 3, x + 20, y - 3), "curve")
        elif style == "part":
            _add(held, "rect", style, x=x, y=y - 9, width=12, height=12)
        else:
            _dot(held, x + 6, y - 3)
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


def _whisker(parent: Element, begin: float, end: float, at: float, *, upright: bool = False) -> None:
    """An interval with a bar at each end."""
    for x1, y1, x2, y2 in ((begin, at, end, at), (begin, at - 5, begin, at + 5), (end, at - 5, end, at + 5)):
        _line(parent, (y1, x1, y2, x2) if upright else (x1, y1, x2, y2), "whisker")


def _group(parent: Element, name: str, colours: Colours, said: str) -> Element:
    """The elements of a variant, and what is shown of it when it is pointed at."""
    classes = {"class": colour_class(colours.get(name, 0)), "data-variant": escape_control_chars(name)}
    found = SubElement(parent, "g", classes)
    SubElement(found, "title").text = escape_control_chars(said)
    return found


def _path(points: Iterable[tuple[float, float]], across: Scale, up: Scale) -> str:
    return " ".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in points)


def _shorten(text: str, most: int = 22) -> str:
    """A text for a picture; the table below it has the whole."""
    return text if len(text) <= most else text[: most - 1] + "…"
