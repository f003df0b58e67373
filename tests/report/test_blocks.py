"""Tests of the parts of a report: values are formatted once, and foreign text is escaped in one place."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_check.terminal import escape_control_chars


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
def test_terminal_control_characters_are_escaped(text, shown):
    """Escape sequences, bells, erasing, reordering and unencodable characters are escaped; letters of all scripts
    stay."""
    assert escape_control_chars(text) == shown


@given(st.text(st.characters(codec=None)))
def test_no_text_keeps_a_control_character(text):
    """For any input, the output can be encoded and has no effect on a terminal."""
    shown = escape_control_chars(text)
    assert not [one for one in shown if one not in "\n\t" and unicodedata.category(one) in ("Cc", "Cs")]
    shown.encode()
    assert escape_control_chars(shown) == shown
