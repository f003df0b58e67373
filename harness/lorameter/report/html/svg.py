"""Pieces of which pictures are made, as SVG: built with the standard library's XML, so that no text becomes an element.

Colours and fonts are classes of the page's style sheet (a series is `s0` to `s15`), so one picture serves light, dark
and paper. Whatever belongs to a variant carries its name, by which a reader hides it, and tells its numbers when
it is pointed at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

from kernels_check.terminal import escape_control_chars
from lorameter.report.blocks import Axis
from lorameter.report.html.scale import Scale, scale_for

WIDTH = 520
"""Of every picture in its own pixels; the page stretches it."""
MARGIN = 14
ROW = 26
NAMES = 170
"""Room for the names of variants to the left of rows."""
LEFT, TOP, BOTTOM = 64, 30, 240
"""The borders of a plane that has no key."""
SERIES = 16
"""Colours that eyes can tell apart. With more variants, those that vary the same field share a colour."""


def canvas(height: float) -> Element:
    """An empty picture."""
    size = f"0 0 {WIDTH} {height:g}"
    return Element("svg", {"viewBox": size, "role": "img", "xmlns": "http://www.w3.org/2000/svg"})


def add(parent: Element, tag: str, kind: str, **numbers: float) -> Element:
    """An element of a class at a place; numbers to a tenth of a pixel."""
    return SubElement(parent, tag, {"class": kind, **{key: f"{value:.1f}" for key, value in numbers.items()}})


def write(parent: Element, x: float, y: float, text: str, kind: str, anchor: str = "start") -> None:
    """A text at a place, made visible."""
    element = add(parent, "text", kind, x=x, y=y)
    element.set("text-anchor", anchor)
    element.text = escape_control_chars(text)


def line(parent: Element, ends: tuple[float, float, float, float], kind: str) -> None:
    """A straight line from x, y to x, y."""
    x1, y1, x2, y2 = ends
    add(parent, "line", kind, x1=x1, y1=y1, x2=x2, y2=y2)


def dot(parent: Element, x: float, y: float, *, hollow: bool = False) -> None:
    """A value; hollow where it has no interval, or is behind others."""
    add(parent, "circle", "hollow" if hollow else "dot", cx=x, cy=y, r=4.5)


def path(points: Iterable[tuple[float, float]], across: Scale, up: Scale) -> str:
    """Points of values as an SVG list of points."""
    return " ".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in points)


def whisker(parent: Element, scale: Scale, low: float | None, high: float | None, at: float, *, upright: bool) -> None:
    """An interval with an end to each side; nothing where there is none."""
    if low is None or high is None:
        return
    begin, end = scale.place(low), scale.place(high)
    for ends in ((begin, at, end, at), (begin, at - 5, begin, at + 5), (end, at - 5, end, at + 5)):
        line(parent, (ends[1], ends[0], ends[3], ends[2]) if upright else ends, "whisker")


def group(parent: Element, name: str, series: Mapping[str, int], told: str) -> Element:
    """What belongs to a name, and what is told of it when it is pointed at."""
    number = series.get(name, 0)
    found = SubElement(parent, "g", {"class": series_class(number), "data-variant": escape_control_chars(name)})
    SubElement(found, "title").text = escape_control_chars(told)
    return found


def series_class(number: int) -> str:
    """The classes of a series by its number."""
    return f"s s{number % SERIES}"


def number_series(names: Sequence[str]) -> dict[str, int]:
    """The number of each variant, by which it has its colour: its own, or with more variants than colours that of its
    group, which is the name up to its first `=` or digit."""
    if len(names) <= SERIES:
        return {name: number for number, name in enumerate(names)}
    groups = {name: re.split(r"[=\d]", name, maxsplit=1)[0] for name in names}
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    return {name: numbers[group] for name, group in groups.items()}


KEY_ROW = 18
KEY_COLUMNS = 3
MOST_KEYS = 24
"""Names that a key has at most; with more, pointing at a mark tells whose it is."""


def key_height(names: Sequence[str]) -> float:
    """What a key of these names takes of a picture's height."""
    return KEY_ROW * -(-len(names[:MOST_KEYS]) // KEY_COLUMNS)


def key(parent: Element, names: Sequence[str], classes: Sequence[str], shape: str) -> None:
    """Whose each colour is: swatches of a shape's class, each with its name, at the top of a picture."""
    for place, (name, own) in enumerate(zip(names[:MOST_KEYS], classes, strict=False)):
        x = MARGIN + place % KEY_COLUMNS * (WIDTH - MARGIN) / KEY_COLUMNS
        y = MARGIN + KEY_ROW * (place // KEY_COLUMNS)
        held = SubElement(parent, "g", {"class": own})
        if shape == "curve":
            line(held, (x, y - 3, x + 20, y - 3), "curve")
        elif shape == "dot":
            dot(held, x + 6, y - 3)
        else:
            add(held, "rect", shape, x=x, y=y - 9, width=12, height=12)
        write(held, x + 25, y + 1, shorten(name, 34), "tick")


def shorten(text: str, most: int = 28) -> str:
    """A text for a picture; the table below it has the whole."""
    return text if len(text) <= most else text[: most - 1] + "…"


def axis_across(parent: Element, scale: Scale, top: float, bottom: float, axis: Axis) -> None:
    """The axis below a picture, its grid, and the line that values are read against."""
    for value, text in scale.ticks():
        x = scale.place(value)
        line(parent, (x, top, x, bottom), "grid")
        write(parent, x, bottom + 15, text, "tick", "middle")
    if axis.line_at is not None:
        line(parent, (scale.place(axis.line_at), top, scale.place(axis.line_at), bottom), "one")
    write(parent, (scale.begin + scale.end) / 2, bottom + 32, axis.title, "axis", "middle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """A picture with an axis below and one to its left, and a key above where several have values in it."""

    svg: Element
    across: Scale
    up: Scale
    top: float
    bottom: float


def plane(
    axes: tuple[Axis, Axis], values: tuple[Iterable[float], Iterable[float]], names: Sequence[str],
    series: Mapping[str, int], shape: str,
) -> Plane:  # fmt: skip
    """An empty plane that holds all values; the axis below is the first."""
    shown = names if len(names) > 1 else ()
    top = TOP + key_height(shown)
    bottom = top + BOTTOM - TOP
    svg = canvas(bottom + 50)
    across = scale_for(axes[0], values[0], LEFT, WIDTH - MARGIN)
    up = scale_for(axes[1], values[1], bottom, top)
    key(svg, shown, [series_class(series.get(name, 0)) for name in shown], shape)
    for value, text in up.ticks():
        y = up.place(value)
        line(svg, (across.begin, y, across.end, y), "grid")
        write(svg, across.begin - 6, y + 4, text, "tick", "end")
    write(svg, MARGIN, top - 14, axes[1].title, "axis")
    axis_across(svg, across, top, bottom, axes[0])
    if (at := axes[1].line_at) is not None:
        line(svg, (across.begin, up.place(at), across.end, up.place(at)), "one")
    return Plane(svg=svg, across=across, up=up, top=top, bottom=bottom)
