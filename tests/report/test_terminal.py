"""The one renderer: what it draws is what the document says, whatever its text looks like."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from harness.records.record import Failure, TrialRecord
from harness.report.live import LiveDisplay
from harness.report.table import Cell, Head, Line, Panel, Passage, Row, Section, Span, Table, say, write_row
from harness.report.terminal import text_of
from harness.run.plan import make_plan

HARNESS = Path(__file__).parents[2] / "harness"
HOSTILE = "a [/b] [red]c :smile: \x1b]0;title\x07\x9b2J \udc80 end"
SHOWN = "a [/b] [red]c :smile: \\x1b]0;title\\x07\\x9b2J \\udc80 end"
STYLED = re.compile(r"\x1b\[[0-9;]*m")


def hostile_document():
    """The same text in every place of a document that takes one."""
    cell = Cell(name=HOSTILE, text=HOSTILE, interval=HOSTILE, detail=HOSTILE, command=HOSTILE, verdict=HOSTILE)
    heads = (Head(text=HOSTILE), Head(text=HOSTILE, right=True))
    rows = (Row(cells=(cell, Cell(text=HOSTILE)), strong=True), write_row(HOSTILE, cell))
    lines = (say(HOSTILE, Span(text=HOSTILE, tone="alarm")),)
    return (
        Line(spans=(Span(text=HOSTILE),), indented=False, apart=True),
        Section(title=HOSTILE, beside=HOSTILE, lines=lines, tone="bad"),
        Table(title=HOSTILE, heads=heads, rows=rows, notes=lines),
        Table(heads=heads, rows=rows, stacked=True),
        Panel(title=HOSTILE, passages=(Passage(head=HOSTILE, text=HOSTILE),)),
    )


@pytest.mark.parametrize("coloured", [False, True])
def test_outside_text_is_printed_as_it_is_and_acts_on_nothing(coloured):
    """No part of it is taken for markup, an emoji or an escape sequence, in any place of a document."""
    document = hostile_document()
    text = text_of(document, width=4000, coloured=coloured)
    assert ("\x1b" in text) is coloured
    plain = STYLED.sub("", text)
    assert not [one for one in plain if one != "\n" and not one.isprintable()]
    assert plain.count(SHOWN) == repr(document).count(repr(HOSTILE)[1:-1])


def test_the_parts_of_a_cell_stand_on_one_line_or_below_each_other():
    """As its table asks; a part that is not there leaves no trace."""
    rows = (write_row(Cell(text="1 s", interval="[1, 2]", detail="host", verdict="improved"), Cell(detail="d")),)
    heads = (Head(text="a"), Head(text="b"))
    inline = text_of((Table(heads=heads, rows=rows),), width=80, coloured=False)
    assert "│ 1 s [1, 2] host improved │ d │" in inline
    stacked = text_of((Table(heads=heads, rows=rows, stacked=True),), width=80, coloured=False).splitlines()
    assert [line.strip("│ ").split("  ")[0] for line in stacked[3:6]] == ["1 s", "[1, 2] host", "improved"]


def test_colour_says_what_a_part_is():
    """A finding by its word, intervals and details faint where they stand below, a strong row bold."""
    cell = Cell(name="n", text="1 s", interval="[1, 2]", detail="host", verdict="regressed")
    heads = (Head(text="a"), Head(text="b"))
    rows = (write_row(cell, Cell(command="--try x")), write_row("said", "", strong=True))
    stacked = text_of((Table(heads=heads, rows=rows, stacked=True),), width=80, coloured=True)
    for drawn in ("\x1b[1mn\x1b[0m", "\x1b[2m[1, 2]", "\x1b[31mregressed", "\x1b[36m--try x", "\x1b[1msaid"):
        assert drawn in stacked
    assert "s [1, 2] \x1b[2mhost" in text_of((Table(heads=heads, rows=rows),), width=80, coloured=True)


def test_a_value_with_a_bracket_in_its_name_stays_on_its_line():
    """Nothing is read out of text: only an interval is set below its value."""
    rows = (write_row("lora [r 16]", Cell(text="–")),)
    text = text_of((Table(heads=(Head(text="a"), Head(text="b")), rows=rows, stacked=True),), width=80, coloured=False)
    assert "│ lora [r 16] │ – │" in text


def test_a_narrow_terminal_cuts_nothing(every_report):
    """Every character is there at any width, in each report."""
    for name, document in every_report.items():
        wide, narrow = (text_of(document, width=width, coloured=False) for width in (2000, 70))
        assert letters(narrow) == letters(wide), name


def letters(text):
    """The characters of a text that are neither space nor frame, sorted."""
    return sorted(one for one in text if not one.isspace() and not "─" <= one <= "╿")


def test_a_run_under_way_shows_names_and_reasons_as_they_are(small_study):
    """Progress is no markup either, on a terminal or in a log."""
    for terminal in (False, True):
        out = io.StringIO()
        with LiveDisplay(Console(file=out, width=4000, force_terminal=terminal, highlight=False)) as display:
            display.starting(make_plan(small_study), HOSTILE)
            display.trial_phase(make_plan(small_study).slots[0], HOSTILE)
            display.trial_ended(
                TrialRecord(
                    trial="r0-x", status="oom", name="x", variant="x", role="variant", replicate=0, position=0,
                    interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.5,
                    failure=Failure(phase="build", kind="MemoryError", message=HOSTILE),
                )
            )  # fmt: skip
        assert SHOWN in out.getvalue()
        assert not {"\x07", "\x9b", "\udc80"} & set(out.getvalue())


def test_the_renderer_alone_knows_rich():
    """Beside it the live display, which is no report."""
    knowing = {str(path.relative_to(HARNESS)) for path in HARNESS.rglob("*.py") if "rich" in imported(path)}
    assert knowing == {"report/terminal.py", "report/drawing.py", "report/live.py"}


def imported(path):
    """The packages that a module names in an import, wherever it stands, for the type checker alone or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]
