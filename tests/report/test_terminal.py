"""Tests of the terminal renderer: it prints what the document says, whatever the text contains."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from lorameter.report.blocks import (
    Cell,
    Collapsible,
    ColumnHeader,
    Line,
    Panel,
    Row,
    Section,
    Span,
    Table,
    say,
    write_row,
)
from lorameter.report.terminal import text_of

HOSTILE = "a [/b] [red]c :smile: \x1b]0;title\x07\x9b2J \udc80 end"
SHOWN = "a [/b] [red]c :smile: \\x1b]0;title\\x07\\x9b2J \\udc80 end"
STYLED = re.compile(r"\x1b\[[0-9;]*m")


def hostile_document():
    """Return a document with the same text in every field that takes text."""
    cell = Cell(name=HOSTILE, text=HOSTILE, interval=HOSTILE, detail=HOSTILE, command=HOSTILE, verdict=HOSTILE)
    heads = (ColumnHeader(text=HOSTILE), ColumnHeader(text=HOSTILE, right=True))
    rows = (Row(cells=(cell, Cell(text=HOSTILE)), strong=True), write_row(HOSTILE, cell))
    lines = (say(HOSTILE, Span(text=HOSTILE, tone="alarm")),)
    return (
        Line(spans=(Span(text=HOSTILE),), indented=False),
        Section(title=HOSTILE, lines=lines, tone="bad"),
        Table(title=HOSTILE, heads=heads, rows=rows, notes=lines),
        Collapsible(summary=say("a line"), lines=lines),
        Panel(title=HOSTILE, passages=((HOSTILE, HOSTILE),)),
    )


@pytest.mark.parametrize("coloured", [False, True])
def test_outside_text_is_printed_as_it_is_and_acts_on_nothing(coloured):
    """Text in any field is not interpreted as markup, an emoji or an escape sequence."""
    document = hostile_document()
    text = text_of(document, width=4000, coloured=coloured, verbose=True)
    assert ("\x1b" in text) is coloured
    plain = STYLED.sub("", text)
    assert not [one for one in plain if one != "\n" and not one.isprintable()]
    unfolded = repr([block for block in document if not isinstance(block, Collapsible)])
    assert plain.count(SHOWN) == unfolded.count(repr(HOSTILE)[1:-1]) + 2  # the two spans of the collapsed line


def test_a_collapsed_block_is_its_summary_and_verbose_expands_it():
    """A collapsed block shows its summary and the number of lines that --verbose adds; a line below the report repeats
    it."""
    fold = Collapsible(summary=say("noise  ", "one two three four five six"), lines=(say("all of it"),))
    hint = "--verbose shows full notices and statistics.\n"
    assert text_of((fold,), width=60, coloured=False) == f"  noise  one two three four five six\n{hint}"
    assert text_of((fold,), width=24, coloured=False).splitlines()[:2] == ["  noise  one two three", "  four five six"]
    assert text_of((fold,), width=24, coloured=False, verbose=True) == "  all of it\n"
    several = Collapsible(summary=say("noise"), lines=(say("one"), say("two")))
    assert text_of((several,), width=60, coloured=False) == f"  noise (2 lines with --verbose)\n{hint}"


@pytest.mark.parametrize("verbose", [False, True])
def test_every_report_fits_80_columns_and_keeps_a_number_with_its_unit(every_report, verbose):
    """No line breaks inside an interval or between a number and its unit, in tables and in sentences."""
    for name, document in every_report.items():
        for line in text_of(document, width=80, coloured=False, verbose=verbose).splitlines():
            assert cell_len(line) <= 80, name
            assert not re.search(r"\[-?[\d.]+,$", line.rstrip()), (name, line)
            assert not re.match(r"\s*(%|[mµ]?s\b|[KMG]iB)", line), (name, line)


def test_a_terminal_without_colour_shows_the_same_words(every_report, monkeypatch):
    """NO_COLOR removes the colours but no word; every finding has its own word."""
    coloured = text_of(every_report["run"], width=120, coloured=True)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = text_of(every_report["run"], width=120, coloured=True)
    assert re.search(r"\x1b\[[\d;]*3[0-8]", coloured)
    assert not re.search(r"\x1b\[[\d;]*3[0-8]", plain)
    assert STYLED.sub("", plain) == STYLED.sub("", coloured)
