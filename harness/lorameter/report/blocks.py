"""What a report is made of: lines, sections, tables, curves and panels, typed, and written for no renderer.

Every report is a document: a sequence of these blocks. It decides what is shown, in which order and with how many
digits, what may be left out where there is no room, and what is drawn; colours, widths, borders, escapes and how
something is drawn are the renderer's alone. So a new renderer is one module that takes a document, and a new report is
drawn by every renderer there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from lorameter.records.units import Unit, format_bytes, format_value, split_interval

if TYPE_CHECKING:
    from lorameter.stats import Comparison


Tone: TypeAlias = Literal["plain", "strong", "faint", "good", "note", "warning", "bad", "alarm", "odd", "command"]
"""What a piece of text is to its reader; `odd` is neither good nor bad, a `command` is there to be typed."""

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
class Axis:
    """What a direction of a picture measures."""

    title: str
    unit: Unit = "1"
    line_at: float | None = None
    """A value that all others are read against, as 1 is of ratios."""
    named: tuple[tuple[float, str], ...] = ()
    """Values that are named next to it, and by what; () leaves that to the renderer."""
    log: bool = False
    """Whether it is laid out by the logarithm, as values are that double; they are above 0."""
    span: tuple[float, float] | None = None
    """Its ends; None is what its values need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Values of one variant in an order, with a band around them where there is one."""

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    """Place, lower and upper end, of the points that have an interval."""

    @property
    def ends(self) -> tuple[float, ...]:
        """All of its values, those of its band among them."""
        return (*(y for _, y in self.points), *(end for _, low, high in self.band for end in (low, high)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A place at which the values of a curve change, with its size and what changed."""

    at: float
    text: str
    tone: Tone


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Curves over one axis."""

    across: Axis
    up: Axis
    curves: tuple[Curve, ...]
    changes: tuple[Change, ...] = ()


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
    """What the paragraph is about, in a word; printed before it, and aligned with the other leads of a section."""
    indented: bool = True
    """Whether it belongs to the line above it."""
    blank_line_before: bool = False
    """Whether an empty line precedes it."""
    last: bool = False
    """Whether a terminal repeats it below the report."""

    @property
    def text(self) -> str:
        """All of it but its lead, without its tones."""
        return "".join(span.text for span in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A title and the lines below it."""

    title: str
    lines: tuple[Line, ...] = ()
    subtitle: str = ""
    """What follows the title on its line without being part of it."""
    tone: Tone = "plain"
    blank_line_before: bool = True
    """Whether an empty line precedes it."""
    last: bool = False
    """Whether a terminal repeats it below the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnHeader:
    """What a column holds."""

    text: str
    right: bool = False
    """Whether its cells end below each other, as numbers do."""
    drop_priority: int = 0
    """The higher, the sooner it may be left out where there is no room; 0 is never left out."""
    collapse_if_constant: bool = False
    """Whether what is equal in all of its cells is said once, below the table."""
    ratio: bool = False
    """Whether its values are ratios, drawn around 1, which is no difference."""
    picture_priority: int = 1
    """The drop priority of the picture of a ratio, which repeats what its column says in numbers."""
    joins_left: bool = False
    """Whether a narrow table shows its cells in the column on its left, behind the value."""
    plain: str = ""
    """What it is called in a sentence, where that is something else than its text."""

    @property
    def name(self) -> str:
        """What it is called in a sentence."""
        return self.plain or self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One fact, in the parts that it has. A renderer lays out the parts; it rounds nothing and parses nothing."""

    name: str = ""
    """What the text is about, in a word."""
    text: str = ""
    """Words, or the value with its unit."""
    interval: str = ""
    """What the value's interval is, in brackets."""
    detail: str = ""
    """What is read last, if at all."""
    command: str = ""
    """What to type."""
    verdict: str = ""
    """The finding's word, as programs know it; it decides the tone."""
    said: str = ""
    """What people see instead; empty where it is that word."""
    value: float | None = None
    """The number behind the text, in its base unit; None where there is none."""
    low: float | None = None
    high: float | None = None
    unit: Unit | None = None

    @property
    def line(self) -> str:
        """All parts on one line, in the words that programs know."""
        parts = (self.name, self.text, self.interval, self.detail, self.command, self.verdict)
        return " ".join(part for part in parts if part)

    @property
    def words(self) -> str:
        """All parts on one line, in the words for people."""
        return dataclasses.replace(self, verdict=self.said, said="").line if self.said else self.line


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The cells of one row, in the order of the heads."""

    cells: tuple[Cell, ...]
    strong: bool = False
    ends_group: bool = False
    """Whether the next row is about something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under heads."""

    heads: tuple[ColumnHeader, ...]
    rows: tuple[Row, ...]
    title: str = ""
    notes: tuple[Line, ...] = ()
    """What a reader of the table must know; below it."""
    blank_line_before: bool = False
    """Whether an empty line precedes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collapsible:
    """A text in one line, and in full on request."""

    summary: Line
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartGroup:
    """Charts side by side, each named by the title of its horizontal axis."""

    title: str
    charts: tuple[Curves, ...]
    notes: tuple[Line, ...] = ()
    on_page: bool = True
    """Whether a page shows them; it has a figure of its own for some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """Text of someone else, and its author."""

    head: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Passages that belong together."""

    title: str
    passages: tuple[Quote, ...]


Block: TypeAlias = Line | Section | Collapsible | Table | ChartGroup | Panel
Document: TypeAlias = tuple[Block, ...]


_INVALID = "INVALID: "


def say(*parts: str | Span, label: str = "", indented: bool = True, blank_line_before: bool = False) -> Line:
    """One line of plain text and of spans."""
    spans = tuple(part if isinstance(part, Span) else Span(text=part) for part in parts)
    return Line(spans=spans, label=label, indented=indented, blank_line_before=blank_line_before)


def say_invalid(reasons: str | None) -> tuple[Line, ...]:
    """The first line of a report that does not count; none of one that does."""
    if reasons is None:
        return ()
    return (Line(spans=(Span(text=f"{_INVALID}{reasons}", tone="alarm"),), indented=False, last=True),)


def says_invalid(block: Block) -> bool:
    """Whether it is such a line."""
    return isinstance(block, Line) and block.text.startswith(_INVALID)


def say_each(texts: Iterable[str]) -> tuple[Line, ...]:
    """A plain line of each text."""
    return tuple(say(text) for text in texts)


def list_sections(lists: Mapping[str, Sequence[str]]) -> Iterator[Section]:
    """A section of each list by its title; an empty one is none."""
    for title, texts in lists.items():
        if texts:
            yield Section(title=title, lines=say_each(texts))


def name_columns(*texts: str, left: int = 1) -> tuple[ColumnHeader, ...]:
    """Heads, the first so many of words and the others of numbers."""
    return tuple(ColumnHeader(text=text, right=place >= left) for place, text in enumerate(texts))


def write_row(*cells: str | Cell, strong: bool = False) -> Row:
    """A row of words and of cells."""
    return Row(cells=tuple(cell if isinstance(cell, Cell) else Cell(text=cell) for cell in cells), strong=strong)


def value_cell(value: float, low: float | None, high: float | None, unit: Unit, *, detail: str = "") -> Cell:
    """A value with its interval, with as many digits as that supports; bytes each in the unit that reads best."""
    if unit == "byte" and low is not None and high is not None:
        text, interval = format_bytes(value), f"[{format_bytes(low)}, {format_bytes(high)}]"
    else:
        text, interval = split_interval(value, low, high, unit)
    return Cell(text=text, interval=interval, detail=detail, value=value, low=low, high=high, unit=unit)


def write_seconds(seconds: float) -> Cell:
    """A time that is a part of something with an interval."""
    return Cell(text=format_value(seconds, "s"), value=seconds, unit="s")


def write_bytes(size: int) -> Cell:
    """A size that was counted."""
    return Cell(text=format_bytes(size), value=size, unit="byte")


def write_share(share: float) -> Cell:
    """A part of a whole in percent."""
    return Cell(text=f"{share:.1%}", value=share, unit="1")


def write_ratio(found: Comparison, *, verdict: str = "") -> Cell:
    """A ratio with its interval, and where asked for the verdict on it; a dash where there is no ratio."""
    if found.ratio is None:
        return Cell(text="–", verdict=verdict)
    return dataclasses.replace(value_cell(found.ratio, found.low, found.high, "1"), verdict=verdict)


def collapse_constant_columns(table: Table) -> Table:
    """The table without columns whose cells all say the same, which a line below it says instead."""
    kept, notes = [], []
    for place, head in enumerate(table.heads):
        cells = [row.cells[place] for row in table.rows]
        if head.collapse_if_constant and len(cells) > 1 and len(set(cells)) == 1:
            notes += [say(f"{head.name}: {cells[0].words}, in every row")] if cells[0].words not in ("", "–") else []
        else:
            kept.append(place)
    return dataclasses.replace(
        table,
        heads=tuple(table.heads[place] for place in kept),
        rows=tuple(dataclasses.replace(row, cells=tuple(row.cells[place] for place in kept)) for row in table.rows),
        notes=(*notes, *table.notes),
    )


def tone_of(verdict: str) -> Tone:
    """The tone of a finding's word; of one that is neither good nor bad, `odd`."""
    return _TONES.get(verdict, "odd")
