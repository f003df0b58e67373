"""Prints reports on a terminal in colour with rich, and as plain text into a pipe.

No text is parsed as markup, so a title such as `a [/b] c` is shown unchanged, and no control character reaches the
terminal. Words and numbers are not broken if there is room for the longest one: tables drop columns, and prose wraps
between words.

Charts are drawn with plotext, without colour, since they are read by shape; it receives only numbers, and ticks that
are formatted here. All ratios of a column share one logarithmic scale, so that half and twice are equally far from 1;
an interval that extends beyond the scale ends in an arrow.

Good is blue and bad is orange, which red-green colour-blind readers can distinguish. A colour never carries information
that the words do not.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.panel import Panel as RichPanel
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from lorameter.report.blocks import (
    Axis,
    Block,
    Cell,
    Chart,
    ChartGroup,
    Collapsible,
    ColumnHeader,
    Document,
    Line,
    Row,
    Section,
    Span,
    Table,
    Tone,
    ratio_axis_limit,
    to_line,
    verdict_tone,
)
from lorameter.terminal import escape_control_chars

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
PIPED_WIDTH = 200
"""Characters in a line if neither a terminal nor $COLUMNS limits it."""
_INDENT = "  "
_CHART_WIDTH = 38
_GAP = 2
"""Characters between two columns."""
_MIN_PROSE_WIDTH = 16
"""Characters below which prose is hard to read."""
_WHISKER_PRIORITY = 5
"""Priority of a ratio's picture when a narrow table drops columns; the ratio column has the same numbers."""
_GLUE = "\ue000"
"""Replaces a space at which a line must not break, since rich breaks lines at every Unicode space."""
_UNBREAKABLE = re.compile(
    r"(?<=\d) (?=%|(?:[mnµ]?s|min|h|[KMGT]?i?B|[kmµ]?J|W|°C)\b)|(?<=[±×]) (?=[\d.])|(?<=\w) (?=±)"
    r"|(?<=\d) (?=(?:of|to) \d)|(?<=\[)[^\[\]\n]*\d[^\[\]\n]*(?=\])"
)
"""Matches spaces between a number and its unit, and spaces inside an interval."""


def draw_text(text: str, tone: Tone = "plain") -> Text:
    """Text from outside the report, shown unchanged."""
    return Text(escape_control_chars(text), style=STYLES[tone])


def _unbreakable(text: str, tone: Tone = "plain") -> Text:
    """The text, with no line break between a number and its unit or inside an interval."""
    return draw_text(_UNBREAKABLE.sub(lambda found: found[0].replace(" ", _GLUE), text), tone)


def _draw(block: Block, console: Console, *, verbose: bool) -> Iterator[RenderableType]:
    """The renderables of a block, in order; `verbose` expands collapsed blocks."""
    if isinstance(block, Line):
        yield from _paragraphs([block], console)
    elif isinstance(block, Section):
        if block.title:
            title = _unbreakable(block.title)
            title.stylize(f"bold {STYLES[block.tone]}")
            yield title
        yield from _paragraphs(block.lines, console)
    elif isinstance(block, Collapsible):
        several = f" ({len(block.lines)} lines with --verbose)" if len(block.lines) > 1 else ""
        summary = dataclasses.replace(block.summary, spans=(*block.summary.spans, Span(text=several, tone="faint")))
        yield from _paragraphs(block.lines if verbose else [summary], console, cut=not verbose)
    elif isinstance(block, Table):
        yield from _table(block, console)
        yield from _paragraphs(block.notes, console)
    elif isinstance(block, ChartGroup):
        yield from _chart_group(block, console)
    else:
        passages = (draw_text(f"{author}\n", "faint") + draw_text(text) for author, text in block.passages)
        yield RichPanel(Text("\n\n").join(passages), title=draw_text(block.title), title_align="left")


def _paragraphs(lines: Sequence[Line], console: Console, *, cut: bool = False) -> Iterator[RenderableType]:
    """Each line wrapped between words, with a hanging indent after its label; with `cut`, cut to one terminal line."""
    widest = max((cell_len(escape_control_chars(line.label)) for line in lines), default=0)
    for line in lines:
        before = (len(_INDENT) if line.indented else 0) + (widest + len(_INDENT) if widest else 0)
        lead = min(before, console.width // 3)
        body = Text().join(_unbreakable(span.text, span.tone) for span in line.spans)
        if cut and console.is_terminal and body.cell_len > console.width - lead:
            body = body.wrap(console, max(console.width - lead - 2, 1))[0]
            body.rstrip()
            body.append(" …")
        grid = RichTable.grid(Column(width=lead, overflow="fold"), Column(overflow="fold"))
        grid.add_row(_unbreakable(f"{_INDENT * line.indented}{line.label}", "faint"), body)
        yield grid if before else body


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """A column as drawn; a ratio becomes two columns, one with numbers and one with whiskers."""

    head: ColumnHeader
    place: int
    whisker: bool
    texts: tuple[Text, ...]
    priority: int
    longest: int
    """Characters of its longest word or number, including the header."""
    least: int
    """Minimum characters for easy reading."""
    natural: int
    """Characters needed to avoid wrapping."""


def _table(table: Table, console: Console) -> Iterator[RenderableType]:
    """A table with one line a row if all columns fit; otherwise intervals go below their values, and columns that do
    not fit are dropped."""
    if table.title:
        yield _unbreakable(table.title, "strong")
    columns = list(_columns(table, stacked=False))
    if _total(columns) > console.width:
        columns = list(_columns(table, stacked=True))
    visible = list(columns)
    while _total(visible) > console.width and (droppable := [column for column in visible if column.priority]):
        visible.remove(max(droppable, key=lambda column: (column.priority, column.place)))
    if sum(column.longest for column in visible) + _GAP * (len(visible) - 1) > console.width:
        yield from _records(table, console)
        return
    yield _grid(table, visible, console)
    hidden = [column.head.text for column in columns if column not in visible and not column.whisker]
    if hidden:
        yield from _paragraphs([to_line(f"hidden columns (narrow terminal): {', '.join(hidden)}")], console)


def _total(columns: Sequence[_Column]) -> int:
    return sum(column.least for column in columns) + _GAP * (len(columns) - 1)


def _columns(table: Table, *, stacked: bool) -> Iterator[_Column]:
    for place, head in enumerate(table.heads):
        if stacked and head.joins_left:
            continue
        cells = [_joined(table, row, place) if stacked else row.cells[place] for row in table.rows]
        texts = tuple(_cell(cell, stacked=stacked) for cell in cells)
        lines = [line for text in texts for line in text.plain.split("\n")]
        words = lines if head.right else [word for line in lines for word in line.split()]
        longest = max(map(cell_len, [*words, *_unbreakable(head.text).plain.split()]), default=0)
        natural = max([longest, *map(cell_len, lines)])
        least = max(longest, min(natural, _MIN_PROSE_WIDTH))
        yield _Column(head=head, place=place, whisker=False, texts=texts, priority=head.drop_priority,
                      longest=longest, least=least, natural=natural)  # fmt: skip
        if head.ratio and any(row.cells[place].value for row in table.rows):
            yield _Column(head=head, place=place, whisker=True, texts=(), priority=_WHISKER_PRIORITY,
                          longest=MIN_WHISKER_WIDTH, least=MIN_WHISKER_WIDTH, natural=MAX_WHISKER_WIDTH)  # fmt: skip


def _joined(table: Table, row: Row, place: int) -> Cell:
    """The cell, followed by the verdict of the column that is joined to it."""
    cell, after = row.cells[place], place + 1
    if after == len(table.heads) or not table.heads[after].joins_left:
        return cell
    return dataclasses.replace(cell, verdict=row.cells[after].verdict, verdict_text=row.cells[after].verdict_text)


def _cell(cell: Cell, *, stacked: bool) -> Text:
    """The parts of a cell on one line; if stacked, the interval is on its own line below the verdict."""
    verdict: list[tuple[str, str, Tone]] = [(" ", cell.verdict_text or cell.verdict, verdict_tone(cell.verdict))]
    parts: list[tuple[str, str, Tone]] = [
        ("", cell.name, "strong"),
        (_INDENT, cell.text, "plain"),
        *(verdict if stacked else []),
        ("\n" if stacked else " ", cell.interval, "faint"),
        (" ", cell.detail, "faint"),
        (" ", cell.command, "command"),
        *([] if stacked else verdict),
    ]
    drawn = Text()
    for before, text, tone in parts:
        if text:
            drawn.append(before if drawn else "")
            drawn.append_text(_unbreakable(text, tone))
    return drawn


def _grid(table: Table, columns: Sequence[_Column], console: Console) -> RichTable:
    """The table, with each column at its minimum width; the remaining width is divided among narrow columns in
    proportion to what they lack."""
    has_room = _total(columns) <= console.width
    widths = [column.least if has_room else column.longest for column in columns]
    lacks = [column.natural - width for column, width in zip(columns, widths, strict=True)]
    left = console.width - sum(widths) - _GAP * (len(columns) - 1)
    left, lacking = max(0, min(left, sum(lacks))), sum(lacks)
    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    cells = []
    for column, least, lack in zip(columns, widths, lacks, strict=True):
        extra = left * lack // max(lacking, 1)
        left, lacking = left - extra, lacking - lack
        width, head, texts = least + extra, _unbreakable(column.head.text), column.texts
        if column.whisker:
            bound, odd = ratio_axis_limit([row.cells[column.place] for row in table.rows]), width - 1 + width % 2
            head = draw_text(draw_scale(bound, odd), "faint")
            texts = tuple(draw_text(draw_whisker(row.cells[column.place], bound, odd), _tone(row, column.place))
                          for row in table.rows)  # fmt: skip
        right = column.head.right and not column.whisker
        drawn.add_column(head, justify="right" if right else "left", overflow="fold", width=width)
        cells.append(texts)
    for row, drawn_cells in zip(table.rows, zip(*cells, strict=True), strict=True):
        drawn.add_row(*drawn_cells, style="bold" if row.strong else "", end_section=row.ends_group)
    return drawn


def _records(table: Table, console: Console) -> Iterator[RenderableType]:
    """The rows one below the other, for a terminal narrower than the required columns."""
    for row in table.rows:
        cells = zip(table.heads, row.cells, strict=True)
        yield from _paragraphs([to_line(cell.words, label=head.text) for head, cell in cells if cell.words], console)
        yield ""


def _tone(row: Row, place: int) -> Tone:
    """The tone of the first verdict at or after the ratio column."""
    return next((verdict_tone(cell.verdict) for cell in row.cells[place:] if cell.verdict), "plain")


def _chart_group(group: ChartGroup, console: Console) -> Iterator[RenderableType]:
    """Charts in rows, with as many side by side as fit."""
    yield draw_text(group.title, "strong")
    width, drawn = min(_CHART_WIDTH, console.width - 2), list[Text]()
    for chart in group.charts:
        title = draw_text(chart.across.title, "faint")
        title.truncate(width, overflow="ellipsis")
        drawn.append(Text("\n").join([title, *map(Text, draw_chart(chart, width))]))
    yield Columns(drawn, width=width, padding=(0, 2))
    yield from _paragraphs(group.notes, console)


# --- charts -----------------------------------------------------------------------------------------------------------

CHART_HEIGHT = 8
"""Lines of a chart, including its ticks."""
MAX_TICKS = 5
"""Maximum ticks along x; more would overlap."""


def draw_chart(chart: Chart, width: int) -> list[str]:
    """The lines of a chart, with at most `width` characters each."""
    import plotext

    across, points = chart.across, [point for curve in chart.curves for point in curve.points]
    low, high = chart.up.span or (min(point.y for point in points), max(point.y for point in points))
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plot_size(width, CHART_HEIGHT)
    plotext.theme("clear")
    plotext.xaxes(True, False)
    plotext.yaxes(True, False)
    plotext.ylim(low, high)
    for curve in chart.curves:
        places, values = [_place(point.x, across) for point in curve.points], [point.y for point in curve.points]
        plotext.plot(places, values, marker="braille")
        for place, point in zip(places, curve.points, strict=True):
            if point.y_interval:
                least, most = point.y_interval
                plotext.plot([place] * 2, [max(least, low), min(most, high)], marker="braille")
        if across.named:
            plotext.scatter(places, values, marker="•")
    ends = (min(point.x for point in points), max(point.x for point in points))
    named = _select_ticks(across.named or [(x, f"{x:g}") for x in ends])
    plotext.xticks([_place(x, across) for x, _ in named], [name for _, name in named])
    marks = sorted({low, (low + high) / 2, high})
    plotext.yticks(marks, _labels(marks))
    drawn = str(plotext.uncolorize(plotext.build())).rstrip()
    return [line[:width] for line in drawn.split("\n")]


def _place(x: float, across: Axis) -> float:
    return math.log(x) if across.log else x


def _select_ticks(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks, or as many as fit, always including the first and the last."""
    if len(ticks) <= MAX_TICKS:
        return list(ticks)
    steps = [round(place * (len(ticks) - 1) / (MAX_TICKS - 1)) for place in range(MAX_TICKS)]
    return [ticks[place] for place in steps]


def _labels(marks: Sequence[float]) -> list[str]:
    """Labels with as many digits as needed to distinguish them."""
    spread = (marks[-1] - marks[0]) / 2 or abs(marks[0])
    places = max(0, 1 - math.floor(math.log10(spread))) if spread else 2
    return [f"{mark:.{min(places, 6)}f}" for mark in marks]


MIN_WHISKER_WIDTH, MAX_WHISKER_WIDTH = 11, 33
"""Odd, so that 1 has its own character."""


def draw_scale(bound: float, width: int) -> str:
    """The values at the ends and the middle of a scale."""
    left, right = f"{math.exp(-bound):.2g}", f"{math.exp(bound):.2g}"
    centre = width // 2
    return f"{left:<{centre}}1{right:>{width - centre - 1}}"


def draw_whisker(cell: Cell, bound: float, width: int) -> str:
    """The ratio of a cell in `width` characters; only the middle for a cell without a ratio."""
    centre = width // 2
    drawn = [" "] * width
    if cell.value:
        value, begin, end = (
            centre + round(math.log(one or cell.value) / bound * centre) for one in (cell.value, cell.low, cell.high)
        )
        for place in range(max(begin, 0), min(end, width - 1) + 1):
            drawn[place] = "─"
        if begin < end:
            drawn[max(begin, 0)] = "├" if begin >= 0 else "◂"
            drawn[min(end, width - 1)] = "┤" if end < width else "▸"
    drawn[centre] = {" ": "┊", "─": "┼"}.get(drawn[centre], drawn[centre])
    if cell.value:
        drawn[min(max(value, 0), width - 1)] = "●"
    return "".join(drawn)


# --- output -----------------------------------------------------------------------------------------------------------


def console_for(file: object | None = None, *, stderr: bool = False) -> Console:
    """A console that detects a terminal. Otherwise its text is plain, as wide as $COLUMNS or else `PIPED_WIDTH`."""
    console = Console(file=file, stderr=stderr, highlight=False)  # type: ignore[arg-type]
    if not console.is_terminal:
        width = None if os.environ.get("COLUMNS", "").isdigit() else PIPED_WIDTH
        console = Console(file=file, stderr=stderr, highlight=False, width=width, no_color=True)  # type: ignore[arg-type]
    return console


def show(document: Document, console: Console, *, verbose: bool | None = None) -> None:
    """Print a report and repeat its verdict below it; `verbose` expands collapsed blocks, and is None for a command
    without this option."""
    with console.capture() as captured:
        _print(document, console, verbose=bool(verbose))
        if verbose is False and any(isinstance(block, Collapsible) for block in document):
            console.print(draw_text("--verbose shows full notices and statistics.", "faint"))
        if last := _repeated_sections(document):
            console.print()
            _print(last, console, verbose=bool(verbose))
    console.file.write(re.sub(" +$", "", captured.get().replace(_GLUE, " "), flags=re.MULTILINE))
    console.file.flush()


def _print(document: Sequence[Block], console: Console, *, verbose: bool) -> None:
    """Print each block; an empty line comes before one that begins a part of the report."""
    for number, block in enumerate(document):
        after_line = number > 0 and isinstance(document[number - 1], Line)
        begins_part = isinstance(block, (Section, Table, ChartGroup))
        if number and (begins_part or (isinstance(block, Line) and not block.indented and not after_line)):
            console.print()
        for drawn in _draw(block, console, verbose=verbose):
            console.print(drawn)


def _repeated_sections(document: Document) -> list[Section]:
    """The blocks repeated below a report, so that a reader of a long report need not scroll up."""
    sections = [block for block in document if isinstance(block, Section)]
    lines = [block for block in document if isinstance(block, Line)] + [line for one in sections for line in one.lines]
    repeated = tuple(line for line in lines if line.last)
    return [*(one for one in sections if one.last), *([Section(title="", lines=repeated)] if repeated else [])]


def render_text(document: Document, *, width: int, coloured: bool, verbose: bool = False) -> str:
    """A report as text for a terminal of the given width."""
    text = io.StringIO()
    colours: Literal["auto"] | None = "auto" if coloured else None
    console = Console(file=text, force_terminal=coloured, color_system=colours, width=width, highlight=False)
    show(document, console, verbose=verbose)
    return text.getvalue()
