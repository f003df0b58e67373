"""Blocks of a report: typed lines, sections, tables, charts and figures, independent of the renderer.

Every report is a document: a sequence of these blocks. The document decides the content, its order, the digits, and
which parts may be dropped if there is too little room; the renderer decides colours, widths, borders and escapes. So a
new renderer is one module that takes a document, and every renderer can draw a new report.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lorameter.records.units import Unit, format_bytes, format_value, split_interval
from lorameter.stats import Comparison

Tone: TypeAlias = Literal["plain", "strong", "faint", "good", "note", "warning", "bad", "alarm", "odd", "command"]
"""The role of a piece of text; `odd` is neither good nor bad, a `command` is for the user to type."""

_MIN_BOUND = math.log(1.05)
"""The least distance from 1, as a logarithm, to which the scale of ratios extends."""
_TONES: Mapping[str, Tone] = {
    "regressed": "bad",
    "improved": "good",
    "equivalent": "note",
    "inconclusive": "warning",
    "invalid": "alarm",
    "supported": "good",
    "refuted": "bad",
    "good": "good",
    "note": "note",
    "bad": "warning",
    "unfit": "alarm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A piece of text in one tone."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One paragraph."""

    spans: tuple[Span, ...]
    label: str = ""
    """A one-word subject of the paragraph; the labels of a section are aligned."""
    indented: bool = True
    """Whether it belongs to the line above it."""
    last: bool = False
    """Whether a terminal repeats it below the report."""

    @property
    def text(self) -> str:
        """The text without its label and tones."""
        return "".join(span.text for span in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A title and the lines below it."""

    title: str
    lines: tuple[Line, ...] = ()
    tone: Tone = "plain"
    last: bool = False
    """Whether a terminal repeats it below the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnHeader:
    """The header of a column, with its layout rules."""

    text: str
    key: str = ""
    """The name of its numbers in a JSON document; empty if they are not in one."""
    right: bool = False
    """Whether its cells are right-aligned, like numbers."""
    drop_priority: int = 0
    """Columns with a higher value are dropped first if there is too little room; 0 is never dropped."""
    collapse_if_constant: bool = False
    """Whether a note below the table replaces the column if all of its cells are equal."""
    ratio: bool = False
    """Whether its values are ratios, which a renderer draws around 1."""
    joins_left: bool = False
    """Whether a narrow table shows its cells after the value in the column on its left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One fact in separate parts. A renderer lays out the parts without rounding or parsing."""

    name: str = ""
    """A one-word subject of the text."""
    text: str = ""
    """Text, or the value with its unit."""
    interval: str = ""
    """The interval of the value, in brackets."""
    detail: str = ""
    command: str = ""
    """A command to type."""
    verdict: str = ""
    """The machine-readable verdict; it decides the tone."""
    verdict_text: str = ""
    """The verdict as shown to users; empty if it is the same word."""
    value: float | None = None
    """The number behind the text, in its base unit."""
    low: float | None = None
    high: float | None = None

    @property
    def line(self) -> str:
        """All parts on one line, with the machine-readable verdict."""
        parts = (self.name, self.text, self.interval, self.detail, self.command, self.verdict)
        return " ".join(part for part in parts if part)

    @property
    def words(self) -> str:
        """All parts on one line, with the verdict as shown to users."""
        return dataclasses.replace(self, verdict=self.verdict_text or self.verdict).line


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The cells of one row, in column order."""

    cells: tuple[Cell, ...]
    strong: bool = False
    ends_group: bool = False
    """Whether a new group of rows follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under headers."""

    heads: tuple[ColumnHeader, ...]
    rows: tuple[Row, ...]
    title: str = ""
    notes: tuple[Line, ...] = ()
    """Lines below the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collapsible:
    """A one-line summary that expands to all lines on request."""

    summary: Line
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Groups of text passages from outside, each with its author."""

    title: str
    passages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The quantity on one axis of a chart."""

    title: str
    unit: Unit = "1"
    line_at: float | None = None
    """A reference value at which a line is drawn, such as 1 for ratios."""
    named: tuple[tuple[float, str], ...] = ()
    """Ticks with their names; () lets the renderer choose."""
    log: bool = False
    span: tuple[float, float] | None = None
    """Its ends; None: the renderer chooses them from the values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point in a chart, with optional intervals in both directions."""

    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points of one variant, or of one of its trials."""

    name: str
    points: tuple[Point, ...]
    hollow: bool = False
    """Whether another variant is better in both directions (dominates it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change in the values of a curve, with its size and cause."""

    at: float
    text: str
    tone: Tone


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over one axis: joined lines with a band, dots with intervals, or single specks."""

    across: Axis
    up: Axis
    curves: tuple[Curve, ...]
    style: Literal["joined", "dots", "specks"] = "joined"
    changes: tuple[Change, ...] = ()
    front: tuple[Point, ...] = ()
    """Corners of the Pareto front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartGroup:
    """Charts side by side, each with the title of its horizontal axis."""

    title: str
    charts: tuple[Chart, ...]
    notes: tuple[Line, ...] = ()
    on_page: bool = True
    """Whether an HTML page shows them; some have a figure there instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """A line for each mark: its name, its value, and its interval if it has one."""

    axis: Axis
    marks: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A stacked bar for each variant; segments of one kind have one colour."""

    axis: Axis
    bars: Mapping[str, Mapping[str, float]]
    """The size of each segment, by variant and kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The status of a check in a variant, and its evidence."""

    text: str
    tone: Tone
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """The finding of each path in each variant; the block is its own table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Finding | None, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture on an HTML page, its caption, and the table of its numbers."""

    title: str
    caption: str
    drawing: Intervals | Chart | Bars | Matrix
    table: Table | None


Block: TypeAlias = Line | Section | Collapsible | Table | ChartGroup | Panel
Document: TypeAlias = tuple[Block, ...]


def to_line(*parts: str | Span, label: str = "", indented: bool = True) -> Line:
    """Make one line from plain text and spans."""
    spans = tuple(part if isinstance(part, Span) else Span(text=part) for part in parts)
    return Line(spans=spans, label=label, indented=indented)


def make_invalid_lines(reasons: str | None, remedy: str = "") -> tuple[Line, ...]:
    """The first line of an invalid run's report; empty for a valid run."""
    line = to_line(Span(text=f"INVALID: {reasons}", tone="alarm"), f". {remedy}" if remedy else "", indented=False)
    return () if reasons is None else (line,)


def to_lines(texts: Iterable[str]) -> tuple[Line, ...]:
    """A plain line for each text."""
    return tuple(to_line(text) for text in texts)


def list_sections(lists: Mapping[str, Sequence[str]]) -> tuple[Section, ...]:
    """A section for each non-empty list, by its title."""
    return tuple(Section(title=title, lines=to_lines(texts)) for title, texts in lists.items() if texts)


def name_columns(*texts: str, left: int = 1) -> tuple[ColumnHeader, ...]:
    """Headers: the first `left` are for text, the others for numbers."""
    return tuple(ColumnHeader(text=text, right=place >= left) for place, text in enumerate(texts))


def write_row(*cells: str | Cell, strong: bool = False, ends_group: bool = False) -> Row:
    """A row of texts and cells."""
    written = tuple(cell if isinstance(cell, Cell) else Cell(text=cell) for cell in cells)
    return Row(cells=written, strong=strong, ends_group=ends_group)


def value_cell(
    value: float, low: float | None, high: float | None, unit: Unit, *, detail: str = "", verdict: str = ""
) -> Cell:
    """A value with its interval, with as many digits as the interval supports. For bytes, both use one unit if
    possible, and the interval is omitted if its ends look the same."""
    text, interval = split_interval(value, low, high, unit)
    if unit == "byte" and low is not None and high is not None:
        text, ends = format_bytes(value), [format_bytes(end) for end in (low, high)]
        same = f" {text.partition(' ')[2]}"
        interval = "" if ends[0] == ends[1] else f"[{', '.join(end.removesuffix(same) for end in ends)}]"
    return Cell(text=text, interval=interval, detail=detail, verdict=verdict, value=value, low=low, high=high)


def write_value(value: float, unit: Unit) -> Cell:
    """A value without an interval, with three digits."""
    return Cell(text=format_value(value, unit), value=value)


def write_number(value: float | None, form: str = "g") -> Cell:
    """A plain number in a Python format; a dash for None."""
    return Cell(text="–") if value is None else Cell(text=f"{value:{form}}", value=value)


def write_share(share: float, low: float | None, high: float | None) -> tuple[str, str]:
    """A share of a gain in per cent, and its interval."""
    ends = [None if end is None else 100 * end for end in (low, high)]
    text, interval = split_interval(100 * share, ends[0], ends[1], "1")
    return f"{text} %", interval


def write_ratio(comparison: Comparison, *, verdict: str = "") -> Cell:
    """A ratio, share or difference with its interval, and optionally its verdict; a dash if there is none."""
    ratio, low, high = comparison.ratio, comparison.low, comparison.high
    if comparison.difference is not None:
        cell = value_cell(comparison.difference, low, high, "1", verdict=verdict)
        return cell if comparison.difference < 0 else dataclasses.replace(cell, text=f"+{cell.text}")
    if comparison.share is not None:
        text, interval = write_share(comparison.share, low, high)
        return Cell(text=text, interval=interval, verdict=verdict, value=comparison.share, low=low, high=high)
    return Cell(text="–", verdict=verdict) if ratio is None else value_cell(ratio, low, high, "1", verdict=verdict)


def ratio_axis_limit(cells: Sequence[Cell]) -> float:
    """The distance from 1, as a logarithm, to which the scale of these ratios extends. Wide intervals do not shrink the
    rest: it extends at most twice as far as the values."""
    values = [abs(math.log(cell.value)) for cell in cells if cell.value]
    ends = [abs(math.log(end)) for cell in cells for end in (cell.value, cell.low, cell.high) if end]
    return max(_MIN_BOUND, min(max(ends, default=0.0), 2 * max(values, default=0.0) + _MIN_BOUND))


def collapse_constant_columns(table: Table) -> Table:
    """Replace each constant column that may collapse by a note."""
    places = range(len(table.heads))
    constant = [
        place
        for place in places
        if table.heads[place].collapse_if_constant
        and len(table.rows) > 1
        and len({row.cells[place] for row in table.rows}) == 1
    ]
    texts = {table.heads[place].text: table.rows[0].cells[place].words for place in constant}
    notes = (to_line(f"{head}: {text}, in every row") for head, text in texts.items() if text not in ("", "–"))
    varying = [place for place in places if place not in constant]
    return dataclasses.replace(
        table,
        heads=tuple(table.heads[place] for place in varying),
        rows=tuple(dataclasses.replace(row, cells=tuple(row.cells[place] for place in varying)) for row in table.rows),
        notes=(*notes, *table.notes),
    )


def verdict_tone(verdict: str) -> Tone:
    """The tone of a verdict; `odd` if it is neither good nor bad."""
    return _TONES.get(verdict, "odd")
