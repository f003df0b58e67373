"""Blocks as rich draws them; nothing else of a report knows rich.

No text is read as markup, so a title such as `a [/b] c` is shown as it is, and none reaches the terminal with a
control character in it.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.panel import Panel as RichPanel
from rich.table import Table as RichTable
from rich.text import Text

from harness.report.table import Block, Cell, Line, Panel, Row, Section, Table, Tone, tone_of
from kernels_check.visible import make_visible

STYLES: dict[Tone, str] = {
    "plain": "",
    "strong": "bold",
    "faint": "dim",
    "good": "green",
    "note": "cyan",
    "warning": "yellow",
    "bad": "red",
    "alarm": "bold red",
    "odd": "magenta",
    "command": "cyan",
}
_INDENT = "  "


def draw_block(block: Block) -> Iterator[RenderableType]:
    """What to print for a block, from its first line to its last."""
    if isinstance(block, Line):
        yield _line(block)
    elif isinstance(block, Section):
        yield from _section(block)
    elif isinstance(block, Table):
        if block.apart:
            yield ""
        yield _table(block)
        yield from map(_line, block.notes)
    else:
        yield _panel(block)


def draw_text(text: str, tone: Tone = "plain") -> Text:
    """Outside text, shown as it is."""
    return Text(make_visible(text), style=STYLES[tone])


def _line(line: Line) -> Text:
    drawn = Text("\n" * line.apart + _INDENT * line.indented)
    for span in line.spans:
        drawn.append_text(draw_text(span.text, span.tone))
    return drawn


def _section(section: Section) -> Iterator[Text]:
    title = draw_text(section.title)
    title.stylize(f"bold {STYLES[section.tone]}")
    yield Text("\n" * section.apart).append_text(title).append_text(draw_text(section.beside))
    yield from map(_line, section.lines)


def _table(table: Table) -> RichTable:
    title = draw_text(table.title, "strong") if table.title else None
    drawn = RichTable(title=title, title_justify="left")
    for head in table.heads:
        column = drawn.add_column
        column(draw_text(head.text), justify="right" if head.right else "left", overflow="fold", max_width=head.widest)
    for row in table.rows:
        _add(drawn, row, stacked=table.stacked)
    return drawn


def _add(drawn: RichTable, row: Row, *, stacked: bool) -> None:
    cells = (_cell(cell, stacked=stacked) for cell in row.cells)
    drawn.add_row(*cells, style="bold" if row.strong else "", end_section=row.ends_group)


def _cell(cell: Cell, *, stacked: bool) -> Text:
    """The parts on one line, or the interval and the verdict each on one of its own."""
    below = "\n" if stacked else " "
    parts: tuple[tuple[str, str, Tone], ...] = (
        ("", cell.name, "strong"),
        (_INDENT, cell.text, "plain"),
        (below, cell.interval, "faint" if stacked else "plain"),
        (" ", cell.detail, "faint"),
        (" ", cell.command, "command"),
        (below, cell.verdict, tone_of(cell.verdict)),
    )
    drawn = Text()
    for before, text, tone in parts:
        if text:
            drawn.append(before if drawn else "")
            drawn.append_text(draw_text(text, tone))
    return drawn


def _panel(panel: Panel) -> RichPanel:
    body = Text()
    for passage in panel.passages:
        body.append_text(draw_text(f"{passage.head}\n", "faint")).append_text(draw_text(f"{passage.text}\n\n"))
    body.rstrip()
    return RichPanel(body, title=draw_text(panel.title), title_align="left")
