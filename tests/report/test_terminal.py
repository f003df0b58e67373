"""The one renderer: what it draws is what the document says, whatever its text looks like."""

from __future__ import annotations

import ast
import io
import math
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style

from harness.records.record import Failure, TrialRecord
from harness.report.drawing import STYLES
from harness.report.live import LiveDisplay
from harness.report.table import Cell, Fold, Head, Line, Panel, Passage, Row, Section, Span, Table, say, write_row
from harness.report.terminal import console_for, show, text_of
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
        Fold(summary=say("a line"), lines=lines),
        Panel(title=HOSTILE, passages=(Passage(head=HOSTILE, text=HOSTILE),)),
    )


@pytest.mark.parametrize("coloured", [False, True])
def test_outside_text_is_printed_as_it_is_and_acts_on_nothing(coloured):
    """No part of it is taken for markup, an emoji or an escape sequence, in any place of a document."""
    document = hostile_document()
    text = text_of(document, width=4000, coloured=coloured, verbose=True)
    assert ("\x1b" in text) is coloured
    plain = STYLED.sub("", text)
    assert not [one for one in plain if one != "\n" and not one.isprintable()]
    unfolded = repr([block for block in document if not isinstance(block, Fold)])
    assert plain.count(SHOWN) == unfolded.count(repr(HOSTILE)[1:-1]) + 2  # the two spans of the line that unfolds


def rows_of(cells, width, heads=2):
    """A table of one row as printed, line by line."""
    names = tuple(Head(text="abc"[place], right=place > 0) for place in range(heads))
    table = Table(heads=names, rows=(Row(cells=cells),))
    return [line.split() for line in text_of((table,), width=width, coloured=False).splitlines()[2:]]


def test_an_interval_stands_beside_its_value_or_below():
    """Below where there is no room beside; a part that is not there leaves no trace."""
    cells = (Cell(text="name"), Cell(text="1 s", interval="[1, 2]", detail="host"))
    assert rows_of(cells, 80) == [["name", "1", "s", "[1,", "2]", "host"]]
    assert rows_of(cells, 18) == [["name", "1", "s"], ["[1,", "2]", "host"]]


def test_colour_says_what_a_part_is():
    """A finding by its word, intervals and details faint, a strong row bold."""
    cell = Cell(name="n", text="1 s", interval="[1, 2]", detail="host", verdict="regressed", said="slower")
    heads = (Head(text="a"), Head(text="b"))
    rows = (write_row(cell, Cell(command="--try x")), write_row("said", "", strong=True))
    text = text_of((Table(heads=heads, rows=rows),), width=80, coloured=True)
    for drawn in ("1mn\x1b[0m", "2m[1, 2]", "2mhost", "mslower", "m--try x", "\x1b[1msaid"):
        assert drawn in text
    assert "regressed" not in text
    assert text.split("slower")[0].rsplit("\x1b[", 1)[1] != text.split("--try x")[0].rsplit("\x1b[", 1)[1]


def test_a_value_with_a_bracket_in_its_name_stays_on_its_line():
    """Nothing is read out of text: only an interval is set below its value."""
    assert rows_of((Cell(text="lora [r 16]"), Cell(text="–")), 80) == [["lora", "[r", "16]", "–"]]


def test_what_folds_is_a_line_and_unfolds_when_asked():
    """It ends between words, and where something is folded it is said how it unfolds; a pipe gets all of it."""
    fold = Fold(summary=say("noise  ", "one two three four five six"), lines=(say("all of it"),))
    hint = "Notices and statistics stand in full with --verbose.\n"
    assert text_of((fold,), width=60, coloured=False) == f"  noise  one two three four five six\n{hint}"
    assert text_of((fold,), width=24, coloured=False).splitlines()[0] == "  noise  one two three …"
    assert text_of((fold,), width=24, coloured=False, verbose=True) == "  all of it\n"
    piped = console_for(io.StringIO())
    show((fold,), piped)
    assert piped.file.getvalue() == "  all of it\n"


WIDTHS = (80, 100, 120, 200)
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


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("verbose", [False, True])
def test_no_line_is_too_long_and_no_word_or_number_is_broken(every_report, spoken, width, verbose):
    """Of every report: what is narrower leaves out whole columns, and says which."""
    for name, document in every_report.items():
        text = text_of(document, width=width, coloured=False, verbose=verbose)
        assert max(map(cell_len, text.splitlines())) <= width, name
        said = spoken[name] | {"no", "room", "here", "for:"}
        new = {word for word in words(text) if word.rstrip(",") not in said and word not in said}
        assert {word for word in new if not re.fullmatch(r"[\d.]+", word)} == set(), name  # but the ends of a scale


@pytest.mark.parametrize("width", WIDTHS)
def test_a_number_stays_with_its_unit_and_its_interval(every_report, width):
    """No line ends within an interval, or between a number and its unit, in tables and in sentences."""
    for name, document in every_report.items():
        for line in text_of(document, width=width, coloured=False, verbose=True).splitlines():
            assert not re.search(r"\[-?[\d.]+,$", line.rstrip()), (name, line)
            assert not re.match(r"\s*(%|[mµ]?s\b|[KMG]iB)", line), (name, line)


def test_a_terminal_narrower_than_a_table_shows_its_rows_below_each_other(every_report):
    """Nothing is cut or lost that may not be left out."""
    text = text_of(every_report["comparison"], width=40, coloured=False)
    assert max(map(cell_len, text.splitlines())) <= 40
    assert "regressed" in text
    assert "1.37" in text


def test_what_follows_a_long_lead_breaks_nowhere_within_a_number():
    """Beside it where all of it has room, below it where not; a lead that is wider than the terminal wraps, too."""
    line = say("1.0016 [0.9983, 1.0049] equivalent, as far as can be told", lead="topic (2222222222) against main")
    assert text_of((line,), width=100, coloured=False).count("\n") == 1
    below = text_of((line,), width=60, coloured=False).splitlines()
    assert below[0] == "  topic (2222222222) against main"
    assert below[1].split(" equivalent")[0].strip() == "1.0016 [0.9983, 1.0049]"
    narrow = text_of((line,), width=28, coloured=False).splitlines()
    assert [text.strip() for text in narrow[:2]] == ["topic (2222222222) against", "main"]
    assert max(map(cell_len, narrow)) <= 28


def test_wider_terminals_show_more(every_report):
    """What people ask first at 80 columns, everything at 200."""
    narrow, wide = (text_of(every_report["run"], width=width, coloured=False) for width in (80, 200))
    for word in ("× lora-r16", "verdict", "step time", "[+9.1 %, +11 %]", "slower", "equivalent"):
        assert word in narrow
    assert "no room here for: peak memory" in narrow
    assert "no room here" not in wide
    for head in ("real tokens/s", "train loss", "held-out loss", "peak memory, host"):
        assert head in wide


def test_a_terminal_without_colour_says_the_same(every_report, monkeypatch):
    """NO_COLOR takes the colours, and no word; every finding has a word of its own."""
    coloured = text_of(every_report["run"], width=120, coloured=True)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = text_of(every_report["run"], width=120, coloured=True)
    assert re.search(r"\x1b\[[\d;]*3[0-8]", coloured)
    assert not re.search(r"\x1b\[[\d;]*3[0-8]", plain)
    assert STYLED.sub("", plain) == STYLED.sub("", coloured)


def linear(value):
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def seen_by(rgb, eye):
    """The linear light of a colour as an eye sees it (Machado, Oliveira & Fernandes 2009, severity 1)."""
    light = [linear(one / 255) for one in rgb]
    return [sum(weight * one for weight, one in zip(row, light, strict=True)) for row in eye]


EYES = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)
    ),
}  # fmt: skip


def lab(light):
    """CIE Lab of linear light."""
    light = [min(max(one, 0.0), 1.0) for one in light]
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    whites = (0.9505, 1.0, 1.089)
    xyz = [sum(a * b for a, b in zip(row, light, strict=True)) / white for row, white in zip(rows, whites, strict=True)]
    x, y, z = (one ** (1 / 3) if one > 0.008856 else 7.787 * one + 16 / 116 for one in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def colours():
    """The colour of each tone that has one."""
    found = {tone: Style.parse(written).color for tone, written in STYLES.items()}
    return {tone: colour.get_truecolor() for tone, colour in found.items() if colour is not None}


@pytest.mark.parametrize("eye", EYES)
def test_every_eye_tells_good_from_bad(eye):
    """Their colours lie apart by many times what an eye needs (2.3), also to those that see no red or green."""
    seen = {tone: lab(seen_by(colour, EYES[eye])) for tone, colour in colours().items()}
    for other in ("bad", "alarm", "warning"):
        assert math.dist(seen["good"], seen[other]) > 40, other


def test_every_tone_can_be_read_on_black_and_on_white():
    """A contrast of 3 to 1 (WCAG 2.1, parts of pictures and large text), and no tone that only one background shows."""
    for tone, rgb in colours().items():
        red, green, blue = (linear(one / 255) for one in rgb)
        light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert min((light + 0.05) / 0.05, 1.05 / (light + 0.05)) >= 3, tone


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
    assert knowing == {"report/terminal.py", "report/drawing.py", "report/layout.py", "report/live.py"}


def imported(path):
    """The packages that a module names in an import, wherever it stands, for the type checker alone or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]
