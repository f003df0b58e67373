"""Each kind of figure as a picture."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from itertools import pairwise
from xml.etree.ElementTree import Element, SubElement, tostring

from kernels_check.terminal import escape_control_chars
from lorameter.records.units import Unit, format_interval, format_value
from lorameter.report.blocks import Cell, Curve, Curves
from lorameter.report.figure import (
    Bar,
    Bars,
    Drawing,
    Intervals,
    Mark,
    Matrix,
    ParetoFront,
    Samples,
    Spot,
)
from lorameter.report.html.scale import Scale, finite, scale_for
from lorameter.report.html.svg import (
    MARGIN,
    NAMES,
    ROW,
    SERIES,
    WIDTH,
    add,
    axis_across,
    canvas,
    dot,
    group,
    key,
    key_height,
    line,
    path,
    plane,
    shorten,
    whisker,
    write,
)

Series = Mapping[str, int]
"""The number of each variant, by which it has its colour."""
MOST_ROWS = 120
"""Rows that a picture has at most; the table below it has all."""
MOST_TICKS = 12
"""Names below a chart that still stand apart."""
FEW_POINTS = 12
"""Points of a curve that are marked one by one."""


def draw(drawing: Drawing, title: str, says: str, series: Series) -> str:
    """The SVG of a drawing, called by its title and described by what it says; empty for a matrix, which is a table."""
    if isinstance(drawing, Matrix):
        return ""
    svg = _picture(drawing, series)
    for place, (tag, text) in enumerate((("title", title), ("desc", says))):
        element = Element(tag)
        element.text = escape_control_chars(text)
        svg.insert(place, element)
    return tostring(svg, encoding="unicode")


def draw_chart(chart: Curves, above: str, series: Series) -> str:
    """The SVG of a chart that stands with others below a title."""
    across = dataclasses.replace(chart.across, named=chart.across.named[:MOST_TICKS])
    drawing = dataclasses.replace(chart, across=across, curves=tuple(map(_closed, chart.curves)))
    count = sum(len(curve.points) for curve in chart.curves)
    says = f"{count} values, with their intervals where they have any."
    return draw(drawing, f"{above}: {across.title}", says, series)


def _closed(curve: Curve) -> Curve:
    """A curve whose band, where it has one, goes to the points that have no interval, as the reference has none."""
    if not curve.band:
        return curve
    ends = {x: (low, high) for x, low, high in curve.band}
    return dataclasses.replace(curve, band=tuple((x, *ends.get(x, (y, y))) for x, y in curve.points))


@functools.singledispatch
def _picture(drawing: object, series: Series) -> Element:
    raise TypeError(f"no picture is known of {type(drawing).__name__}")


@_picture.register
def _(drawing: Intervals, series: Series) -> Element:
    marks = drawing.marks[:MOST_ROWS]
    bottom = MARGIN + ROW * len(marks)
    svg, axis = canvas(bottom + 40), drawing.axis
    scale = scale_for(axis, _ends(marks), NAMES, WIDTH - MARGIN)
    axis_across(svg, scale, MARGIN, bottom, axis)
    for place, mark in enumerate(marks):
        y = MARGIN + ROW * (place + 0.5)
        own = group(svg, mark.name, series, f"{mark.name}: {_told(mark, axis.title, axis.unit)}")
        write(own, NAMES - 10, y + 4, shorten(mark.name), "name", "end")
        whisker(own, scale, mark.low, mark.high, y, upright=False)
        dot(own, scale.place(mark.value), y, hollow=mark.low is None)
    return svg


@_picture.register
def _(drawing: Curves, series: Series) -> Element:
    points = [point for curve in drawing.curves for point in curve.points]
    edges = [end for curve in drawing.curves for _, low, high in curve.band for end in (low, high)]
    values = finite(x for x, _ in points), finite([*(y for _, y in points), *edges])
    drawn = plane((drawing.across, drawing.up), values, [curve.name for curve in drawing.curves], series, "curve")
    svg, across, up = drawn.svg, drawn.across, drawn.up
    for curve in drawing.curves:
        own = group(svg, curve.name, series, curve.name)
        if curve.band:
            around = [(x, high) for x, _, high in curve.band] + [(x, low) for x, low, _ in reversed(curve.band)]
            SubElement(own, "polygon", {"points": path(around, across, up), "class": "band"})
        SubElement(own, "polyline", {"points": path(curve.points, across, up), "class": "curve"})
        for x, y in curve.points if len(curve.points) <= FEW_POINTS else ():
            dot(own, across.place(x), up.place(y))
    return svg


@_picture.register
def _(drawing: ParetoFront, series: Series) -> Element:
    spots = drawing.spots
    values = _ends(spot.across for spot in spots), _ends(spot.up for spot in spots)
    drawn = plane((drawing.across, drawing.up), values, [spot.name for spot in spots], series, "dot")
    svg, across, up = drawn.svg, drawn.across, drawn.up
    SubElement(svg, "polyline", {"points": path(_stair(spots), across, up), "class": "front"})
    for spot in spots:
        own = group(svg, spot.name, series, _told_both(spot, drawing))
        x, y = across.place(spot.across.value), up.place(spot.up.value)
        whisker(own, across, spot.across.low, spot.across.high, y, upright=False)
        whisker(own, up, spot.up.low, spot.up.high, x, upright=True)
        dot(own, x, y, hollow=not spot.best)
    return svg


@_picture.register
def _(drawing: Bars, series: Series) -> Element:
    bars, axis = drawing.bars[:MOST_ROWS], drawing.axis
    kinds = list(dict.fromkeys(part.kind for bar in bars for part in bar.parts))
    top = MARGIN + key_height(kinds)
    bottom = top + ROW * len(bars)
    svg = canvas(bottom + 40)
    key(svg, kinds, [f"p{place % SERIES}" for place in range(len(kinds))], "part")
    totals = [sum(part.value for part in bar.parts) for bar in bars]
    scale = scale_for(axis, totals, NAMES, WIDTH - MARGIN, from_zero=True)
    axis_across(svg, scale, top, bottom, axis)
    for place, bar in enumerate(bars):
        _bar(svg, bar, top + ROW * place + 5, scale, kinds, series)
    return svg


def _bar(svg: Element, bar: Bar, y: float, scale: Scale, kinds: list[str], series: Series) -> None:
    told = ", ".join(f"{part.kind} {format_value(part.value, scale.unit)}" for part in bar.parts)
    own, at = group(svg, bar.name, series, f"{bar.name}: {told}"), 0.0
    write(own, NAMES - 10, y + 12, shorten(bar.name), "name", "end")
    for part in bar.parts:
        begin, end = scale.place(at), scale.place(at + part.value)
        add(own, "rect", f"part p{kinds.index(part.kind) % SERIES}", x=begin, y=y, width=end - begin, height=ROW - 10)
        at += part.value


@_picture.register
def _(drawing: Samples, series: Series) -> Element:
    stretches = drawing.stretches
    values = (
        [end for one in stretches for end in (one.began_s, one.ended_s)],
        finite(value for one in stretches for value in one.samples),
    )
    names = list(dict.fromkeys(one.name for one in stretches))
    drawn = plane((drawing.across, drawing.up), values, names, series, "dot")
    svg, across, up = drawn.svg, drawn.across, drawn.up
    for one in stretches:
        own = group(svg, one.name, series, one.name)
        places = dict.fromkeys((round(across.place(x)), round(up.place(y))) for x, y in one.points)
        SubElement(own, "path", {"d": "".join(f"M{x} {y}h0" for x, y in places), "class": "samples"})
    return svg


def draw_ratio(cell: Cell, bound: float) -> str:
    """A ratio with its interval around 1, for a table's cell; `bound` is the logarithm at the ends of the picture."""
    width, height = 120.0, 16.0
    svg = Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "class": "ratio", "aria-hidden": "true"})

    def place(ratio: float) -> float:
        return width / 2 * (1 + min(max(math.log(ratio) / bound, -1.0), 1.0) * 0.94)

    line(svg, (width / 2, 0, width / 2, height), "one")
    if cell.value:
        if cell.low and cell.high:
            line(svg, (place(cell.low), height / 2, place(cell.high), height / 2), "whisker")
        add(svg, "circle", "dot", cx=place(cell.value), cy=height / 2, r=3.5)
    return tostring(svg, encoding="unicode")


def _ends(marks: object) -> list[float]:
    """All that a scale must hold of these marks."""
    return list(finite(end for mark in marks for end in (mark.value, mark.low, mark.high)))  # type: ignore[attr-defined]


def _told(mark: Mark, title: str, unit: Unit) -> str:
    value = format_interval(mark.value, mark.low, mark.high, unit)
    return " ".join(part for part in (title, value, mark.verdict) if part)


def _told_both(spot: Spot, drawing: ParetoFront) -> str:
    values = (
        _told(mark, axis.title, axis.unit) for mark, axis in ((spot.across, drawing.across), (spot.up, drawing.up))
    )
    return f"{spot.name}: {'; '.join(values)}; {'on' if spot.best else 'behind'} the front"


def _stair(spots: tuple[Spot, ...]) -> list[tuple[float, float]]:
    """The front as a stair: what lies behind it has something better beside it, or above or below it, whichever way is
    better there."""
    best = sorted((spot.across.value, spot.up.value) for spot in spots if spot.best)
    corners = [corner for (x, y), (right, _) in pairwise(best) for corner in ((x, y), (right, y))]
    return [*corners, *best[-1:]]
