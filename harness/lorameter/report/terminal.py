"""Reports on a terminal in colour, by rich; in a pipe as plain text.

No text is read as markup, so a title such as `a [/b] c` is shown as it is, and none reaches the terminal with a
control character in it. No word and no number is broken where the terminal is as wide as the longest of them: tables
give up columns, and prose wraps between words.

The colours for good and bad are blue and orange, which red-green colour-blind readers can distinguish, and none of
them says what no word says.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from typing import Literal

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel as RichPanel
from rich.table import Table as RichTable
from rich.text import Text

from kernels_check.terminal import escape_control_chars
from lorameter.report.blocks import (
    Block,
    Cell,
    ChartGroup,
    Collapsible,
    ColumnHeader,
    Document,
    Line,
    Panel,
    Row,
    Section,
    Table,
    Tone,
    say,
    tone_of,
)
from lorameter.report.layout import ColumnSpec, fit, glue, measure, unglue
from lorameter.report.plots import LEAST_WIDTH, MOST_WIDTH, draw_scale, draw_whisker, plot, scale_of

STYLES: dict[Tone, str] = {
    "plain": "",
    "strong": "bold",
    "faint": "dim",
    "good": "color(33)",
    "note": "color(30)",
    "warning": "color(136)",
    "bad": "color(166)",
    "alarm": "bold color(161)",
    "odd": "color(97)",
    "command": "color(30)",
}
_INDENT = "  "
_CHART_WIDTH = 38


def render_block(block: Block, console: Console, *, verbose: bool = False) -> Iterator[RenderableType]:
    """What to print for a block, from its first line to its last; `verbose` unfolds."""
    if isinstance(block, Line):
        yield _paragraph(block, console, len(block.label))
    elif isinstance(block, Section):
        yield from _section(block, console)
    elif isinstance(block, Collapsible):
        yield from _fold(block, console, verbose=verbose)
    elif isinstance(block, Table):
        if block.blank_line_before:
            yield ""
        yield from _table(block, console)
        yield from _paragraphs(block.notes, console)
    elif isinstance(block, ChartGroup):
        yield from _gallery(block, console)
    else:
        yield _panel(block)


def draw_text(text: str, tone: Tone = "plain") -> Text:
    """Outside text, shown as it is."""
    return Text(escape_control_chars(text), style=STYLES[tone])


def _paragraphs(lines: Sequence[Line], console: Console) -> Iterator[Text]:
    lead = max((len(line.label) for line in lines), default=0)
    yield from (_paragraph(line, console, lead) for line in lines)


def _paragraph(line: Line, console: Console, lead: int) -> Text:
    """Wrapped between words, with a hanging indent after its lead, or below a lead that leaves no room."""
    begin = Text(_INDENT * line.indented).append_text(draw_text(line.label.ljust(lead), "faint"))
    begin.append(_INDENT if lead else "")
    indent = min(begin.cell_len, console.width // 3)
    body = Text().join(draw_text(span.text, span.tone) for span in line.spans)
    drawn = Text("\n" * line.blank_line_before)
    if begin.cell_len + body.cell_len > console.width and begin.cell_len > indent:
        begin.rstrip()
        drawn.append_text(_wrapped(begin, console.width, console)).append("\n")
        begin = Text(" " * indent)
    for number, part in enumerate(_wrapped(body, console.width - indent, console).split("\n", allow_blank=True)):
        drawn.append_text(begin if number == 0 else Text("\n" + " " * indent)).append_text(part)
    return drawn


def _wrapped(text: Text, width: int, console: Console) -> Text:
    """The text in lines of that width, each broken between words and within no number."""
    text.plain = glue(text.plain)
    lines = text.wrap(console, max(width, 1), overflow="fold")
    for line in lines:
        line.rstrip()
        line.plain = unglue(line.plain)
    return Text("\n").join(lines)


def _section(section: Section, console: Console) -> Iterator[Text]:
    title = draw_text(section.title)
    title.stylize(f"bold {STYLES[section.tone]}")
    yield Text("\n" * section.blank_line_before).append_text(title).append_text(draw_text(section.subtitle))
    yield from _paragraphs(section.lines, console)


def _fold(fold: Collapsible, console: Console, *, verbose: bool) -> Iterator[Text]:
    if verbose:
        yield from _paragraphs(fold.lines, console)
        return
    whole = _paragraph(fold.summary, console, len(fold.summary.label))
    first, *rest = whole.split("\n")
    if not console.is_terminal:
        yield whole
        return
    if rest:
        room = max(console.width - 2, 1)
        first = first.wrap(console, room)[0] if first.cell_len > room else first
        first.rstrip()
        first.append(" …")
    yield first


def _table(table: Table, console: Console) -> Iterator[RenderableType]:
    if table.title:
        yield draw_text(table.title, "strong")
    for stacked in (False, True):
        columns = _columns(table, stacked=stacked)
        widths = fit([measured for _, _, measured in columns], console.width, whole=not stacked)
        if widths is None:
            continue
        yield _drawn(table, columns, widths, console, stacked=stacked)
        absent = [table.heads[place].name for (place, whisker, _), width in zip(columns, widths, strict=True)
                  if not width and not whisker]  # fmt: skip
        if absent:
            yield _paragraph(say(f"hidden columns (narrow terminal): {', '.join(absent)}"), console, 0)
        return
    yield from _records(table, console)


def _heads(table: Table) -> list[tuple[ColumnHeader, bool, int]]:
    """The heads of what is drawn: behind that of a ratio the one of its whiskers; with the place of its cells."""
    return [
        (head, whisker, place)
        for place, head in enumerate(table.heads)
        for whisker in ((False, True) if head.ratio and any(row.cells[place].value for row in table.rows) else (False,))
    ]


def _columns(table: Table, *, stacked: bool) -> list[tuple[int, bool, ColumnSpec]]:
    found = []
    for head, whisker, place in _heads(table):
        if stacked and head.joins_left:
            continue
        if whisker:
            column = ColumnSpec(least=LEAST_WIDTH, good=LEAST_WIDTH, natural=MOST_WIDTH, rank=head.picture_priority)
            found.append((place, True, column))
            continue
        texts = (_cell(_joined(table, row, place, stacked=stacked), stacked=stacked).plain for row in table.rows)
        cells = measure(texts, whole=head.right, rank=head.drop_priority)
        above = measure([escape_control_chars(head.text)], whole=False).least
        least, good, natural = (max(above, one) for one in (cells.least, cells.good, cells.natural))
        found.append((place, False, ColumnSpec(least=least, good=good, natural=natural, rank=head.drop_priority)))
    return found


def _drawn(
    table: Table,
    columns: Sequence[tuple[int, bool, ColumnSpec]],
    widths: Sequence[int],
    console: Console,
    *,
    stacked: bool,
) -> RichTable:
    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [(place, whisker, width) for (place, whisker, _), width in zip(columns, widths, strict=True) if width]
    bounds = {place: scale_of(row.cells[place] for row in table.rows) for place, whisker, _ in shown if whisker}
    odd = {place: width - 1 + width % 2 for place, whisker, width in shown if whisker}
    for place, whisker, width in shown:
        head = table.heads[place]
        scale = draw_text(draw_scale(bounds[place], odd[place]), "faint") if whisker else None
        text = scale or _wrapped(draw_text(head.text), width, console)
        drawn.add_column(text, justify="right" if head.right and not whisker else "left", overflow="fold", width=width)
    for row in table.rows:
        cells = [
            draw_text(draw_whisker(row.cells[place], bounds[place], odd[place]), _tone(row, place))
            if whisker
            else _wrapped(_cell(_joined(table, row, place, stacked=stacked), stacked=stacked), width, console)
            for place, whisker, width in shown
        ]
        drawn.add_row(*cells, style="bold" if row.strong else "", end_section=row.ends_group)
    return drawn


def _joined(table: Table, row: Row, place: int, *, stacked: bool) -> Cell:
    """The cell, in a narrow table with the finding of the column that joins it."""
    cell = row.cells[place]
    if not stacked or place + 1 == len(table.heads) or not table.heads[place + 1].joins_left:
        return cell
    return dataclasses.replace(cell, verdict=row.cells[place + 1].verdict, said=row.cells[place + 1].said)


def _tone(row: Row, place: int) -> Tone:
    """That of the first finding from the ratio on."""
    return next((tone_of(cell.verdict) for cell in row.cells[place:] if cell.verdict), "plain")


def _records(table: Table, console: Console) -> Iterator[Text]:
    """The rows below each other, for a terminal that is narrower than what must be shown."""
    for row in table.rows:
        lines = [
            say(cell.words, label=escape_control_chars(head.text))
            for head, cell in zip(table.heads, row.cells, strict=True)
            if cell.words
        ]
        yield from _paragraphs(lines, console)
        yield Text()


def _cell(cell: Cell, *, stacked: bool) -> Text:
    """The parts on one line; stacked, the interval is on a line of its own below the finding."""
    interval: tuple[str, str, Tone] = ("\n" if stacked else " ", cell.interval, "faint")
    finding: tuple[str, str, Tone] = (" ", cell.said or cell.verdict, tone_of(cell.verdict))
    others: tuple[tuple[str, str, Tone], ...] = ((" ", cell.detail, "faint"), (" ", cell.command, "command"))
    parts: tuple[tuple[str, str, Tone], ...] = (
        ("", cell.name, "strong"),
        (_INDENT, cell.text, "plain"),
        *((finding, interval, *others) if stacked else (interval, *others, finding)),
    )
    drawn = Text()
    for before, text, tone in parts:
        if text:
            drawn.append(before if drawn else "")
            drawn.append_text(draw_text(text, tone))
    return drawn


def _gallery(gallery: ChartGroup, console: Console) -> Iterator[Text]:
    """Charts side by side, as many as have room."""
    yield Text("\n").append_text(draw_text(gallery.title, "strong"))
    if not console.encoding.lower().startswith("utf"):
        yield _paragraph(say("charts are drawn where the terminal takes UTF-8"), console, 0)
        return
    width = min(_CHART_WIDTH, console.width)
    per_row = max(1, (console.width + 2) // (width + 2))
    for first in range(0, len(gallery.charts), per_row):
        group = gallery.charts[first : first + per_row]
        titles = [draw_text(chart.across.title, "faint") for chart in group]
        for title in titles:
            title.truncate(width, overflow="ellipsis", pad=True)
        rows = [Text(_INDENT).join(titles)]
        rows += [Text(_INDENT.join(line)) for line in zip(*(plot(chart, width) for chart in group), strict=True)]
        for row in rows:
            row.rstrip()
            yield row
    yield from _paragraphs(gallery.notes, console)


def _panel(panel: Panel) -> RichPanel:
    body = Text()
    for passage in panel.passages:
        body.append_text(draw_text(f"{passage.head}\n", "faint")).append_text(draw_text(f"{passage.text}\n\n"))
    body.rstrip()
    return RichPanel(body, title=draw_text(panel.title), title_align="left")


PIPED_WIDTH = 200
"""Nothing may be cut where there is no terminal whose width one could ask."""


FOLDED = "--verbose shows full notices and statistics."


def console_for(file: object | None = None, *, stderr: bool = False) -> Console:
    """A console that knows whether it is a terminal. Otherwise the text is plain, and as wide as $COLUMNS says, else
    `PIPED_WIDTH`."""
    console = Console(file=file, stderr=stderr, highlight=False)  # type: ignore[arg-type]
    if not console.is_terminal:
        width = None if os.environ.get("COLUMNS", "").isdigit() else PIPED_WIDTH
        console = Console(file=file, stderr=stderr, highlight=False, width=width, no_color=True)  # type: ignore[arg-type]
    return console


def show(document: Document, console: Console, *, verbose: bool = False) -> None:
    """Print a report and repeat its verdict below it; `verbose` unfolds what is folded."""
    for block in document:
        for drawn in render_block(block, console, verbose=verbose):
            console.print(drawn)
    if not verbose and any(isinstance(block, Collapsible) for block in document):
        console.print(draw_text(FOLDED, "faint"))
    for block in _last(document):
        for drawn in render_block(block, console, verbose=verbose):
            console.print(drawn)


def _last(document: Document) -> Iterator[Section]:
    """What is repeated below a report, so that a reader of a long one need not scroll up."""
    for block in document:
        if isinstance(block, Section) and block.last:
            yield dataclasses.replace(block, blank_line_before=True)
    found = [
        block.lines if isinstance(block, Section) else [block]
        for block in document
        if isinstance(block, (Line, Section))
    ]
    if lines := tuple(line for lines in found for line in lines if line.last):
        yield Section(title="", lines=lines, blank_line_before=False)


def text_of(document: Document, *, width: int, coloured: bool, verbose: bool = False) -> str:
    """A report as the text that a terminal of that width would be sent."""
    text = io.StringIO()
    colours: Literal["auto"] | None = "auto" if coloured else None
    console = Console(file=text, force_terminal=coloured, color_system=colours, width=width, highlight=False)
    show(document, console, verbose=verbose)
    return text.getvalue()
