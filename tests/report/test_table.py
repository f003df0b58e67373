"""The parts of a report: values are written once, and outside text is made harmless in one place."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.records.units import format_interval
from harness.report.table import (
    Cell,
    Span,
    list_sections,
    name_columns,
    say,
    tone_of,
    write_ratio,
    write_row,
    write_value,
)
from harness.stats import compare_trials
from harness.verdicts.outcome import EXIT_OF
from harness.verdicts.series import without_numbers
from kernels_check.visible import make_visible


@pytest.mark.parametrize("ends", [(0.048, 0.052), (None, None)])
def test_a_value_is_written_with_its_interval_and_keeps_its_numbers(ends):
    """On one line it reads as everywhere; a renderer that computes needs to parse nothing."""
    cell = write_value(0.05, *ends, "s")
    assert cell.line == format_interval(0.05, *ends, "s")
    assert (cell.value, cell.low, cell.high, cell.unit) == (0.05, *ends, "s")


def test_bytes_have_three_digits_each_in_its_own_unit():
    """And where they lie is said after the bracket."""
    cell = write_value(2**30, 2**20, 2**30, "byte", detail="host")
    assert (cell.text, cell.interval, cell.detail) == ("1 GiB", "[1 MiB, 1 GiB]", "host")
    assert cell.line == "1 GiB [1 MiB, 1 GiB] host"


def test_a_ratio_is_written_with_its_verdict_or_as_a_dash():
    """Where there is no ratio the finding still stands."""
    found = compare_trials([[1.0], [1.1]], [[2.0], [2.2]], pairing="replicate")
    assert write_ratio(found, verdict=found.verdict).line.startswith("2.000 [")
    assert write_ratio(found, verdict="improved").line.endswith("] improved")
    assert write_ratio(found).verdict == ""
    assert write_ratio(without_numbers("invalid", "why"), verdict="invalid").line == "– invalid"


def test_words_make_rows_lines_and_sections():
    """Text is taken where a cell or a span may stand, and a list of nothing is no section."""
    assert write_row("a", Cell(verdict="improved")).cells == (Cell(text="a"), Cell(verdict="improved"))
    assert say("a ", Span(text="b", tone="bad")).text == "a b"
    assert [section.title for section in list_sections({"Notes": (), "Differing": ("x",)})] == ["Differing"]
    assert [head.right for head in name_columns("variant", "metric", "ratio", left=2)] == [False, False, True]


def test_every_verdict_has_a_tone():
    """Those that are no finding have one of their own, and a new word is none of the good or bad."""
    assert {tone_of(verdict) for verdict in EXIT_OF} == {"good", "bad", "note", "warning", "alarm", "odd"}
    assert tone_of("never heard of") == "odd"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain · ≥ é 😀 👩‍🔬", "plain · ≥ é 😀 👩‍🔬"),
        ("two\n\tlines", "two\n\tlines"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("bell\a back\b nul\0 cr\r del\x7f", "bell\\x07 back\\x08 nul\\x00 cr\\x0d del\\x7f"),
        ("C1 \x9b31m \x85", "C1 \\x9b31m \\x85"),
        ("abc\u202egpj\u2066x\u2069", "abc\\u202egpj\\u2066x\\u2069"),
        ("half \udcff", "half \\udcff"),
    ],
)
def test_what_would_act_on_a_terminal_is_written_out(text, shown):
    """Escape sequences, bells, erasing, reordering and what cannot be encoded; letters of any script stay."""
    assert make_visible(text) == shown


@given(st.text(st.characters(codec=None)))
def test_no_text_keeps_a_control_character(text):
    """Whatever comes in, what goes out can be written and acts on nothing."""
    shown = make_visible(text)
    assert not [one for one in shown if one not in "\n\t" and unicodedata.category(one) in ("Cc", "Cs")]
    shown.encode()
    assert make_visible(shown) == shown
