"""The one renderer: what it draws is what the document says, whatever its text looks like."""

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
    """The same text in every place of a document that takes one."""
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
    """No part of it is taken for markup, an emoji or an escape sequence, in any place of a document."""
    document = hostile_document()
    text = text_of(document, width=4000, coloured=coloured, verbose=True)
    assert ("\x1b" in text) is coloured
    plain = STYLED.sub("", text)
    assert not [one for one in plain if one != "\n" and not one.isprintable()]
    unfolded = repr([block for block in document if not isinstance(block, Collapsible)])
    assert plain.count(SHOWN) == unfolded.count(repr(HOSTILE)[1:-1]) + 2  # the two spans of the line that unfolds


def test_what_folds_is_a_line_and_unfolds_when_asked():
    """In a pipe the line wraps; below the report is how it unfolds."""
    fold = Collapsible(summary=say("noise  ", "one two three four five six"), lines=(say("all of it"),))
    hint = "--verbose shows full notices and statistics.\n"
    assert text_of((fold,), width=60, coloured=False) == f"  noise  one two three four five six\n{hint}"
    assert text_of((fold,), width=24, coloured=False).splitlines()[:2] == ["  noise  one two three", "  four five six"]
    assert text_of((fold,), width=24, coloured=False, verbose=True) == "  all of it\n"


DRAWN = re.compile(r"[─-╿⠀-⣿┊●◂▸•…]")


def words(text):
    """The words and numbers of a text, without what is drawn."""
    return {word for word in DRAWN.sub(" ", text).split() if word}


@pytest.fixture(scope="module")
def spoken(every_report):
    """The words of each report where nothing wraps and nothing folds, and where it folds."""
    return {
        name: words(text_of(document, width=5000, coloured=False, verbose=True))
        | words(text_of(document, width=5000, coloured=False))
        for name, document in every_report.items()
    }


@pytest.mark.parametrize(("width", "verbose"), [(80, False), (80, True), (120, True)])
def test_no_line_is_too_long_and_no_word_or_number_is_broken(every_report, spoken, width, verbose):
    """Of every report: what is narrower leaves out whole columns, and says which."""
    for name, document in every_report.items():
        text = text_of(document, width=width, coloured=False, verbose=verbose)
        assert max(map(cell_len, text.splitlines())) <= width, name
        said = spoken[name] | {"hidden", "columns", "(narrow", "terminal):"}
        new = {word for word in words(text) if word.rstrip(",") not in said and word not in said}
        assert {word for word in new if not re.fullmatch(r"[\d.]+", word)} == set(), name  # but the ends of a scale


@pytest.mark.parametrize("width", [80, 120])
def test_a_number_stays_with_its_unit_and_its_interval(every_report, width):
    """No line ends within an interval, or between a number and its unit, in tables and in sentences."""
    for name, document in every_report.items():
        for line in text_of(document, width=width, coloured=False, verbose=True).splitlines():
            assert not re.search(r"\[-?[\d.]+,$", line.rstrip()), (name, line)
            assert not re.match(r"\s*(%|[mµ]?s\b|[KMG]iB)", line), (name, line)


def test_a_terminal_without_colour_says_the_same(every_report, monkeypatch):
    """NO_COLOR takes the colours, and no word; every finding has a word of its own."""
    coloured = text_of(every_report["run"], width=120, coloured=True)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = text_of(every_report["run"], width=120, coloured=True)
    assert re.search(r"\x1b\[[\d;]*3[0-8]", coloured)
    assert not re.search(r"\x1b\[[\d;]*3[0-8]", plain)
    assert STYLED.sub("", plain) == STYLED.sub("", coloured)
