"""Which columns fit: whole numbers, whole words, and the least important left out first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from harness.report.layout import GAP, Column, fit, glue, measure, unglue

COLUMNS = st.builds(
    lambda least, good, more, rank: Column(least=least, good=least + good, natural=least + good + more, rank=rank),
    st.integers(1, 30), st.integers(0, 20), st.integers(0, 60), st.integers(0, 4),
)  # fmt: skip


@given(st.lists(COLUMNS, min_size=1, max_size=9), st.integers(5, 250))
def test_what_is_shown_fits_and_nothing_breaks(columns, width):
    """No column below what its longest word needs, all of them and the gaps within the width."""
    widths = fit(columns, width)
    must = [column for column in columns if not column.rank]
    if widths is None:
        assert sum(one.least for one in must) + GAP * (len(must) - 1) > width
        return
    shown = [wide for wide in widths if wide]
    assert sum(shown) + GAP * (len(shown) - 1) <= width
    for column, wide in zip(columns, widths, strict=True):
        assert wide == 0 or column.least <= wide <= column.natural
        assert wide or column.rank


@given(st.lists(COLUMNS, min_size=1, max_size=9), st.integers(5, 250))
def test_a_wider_terminal_never_shows_less(columns, width):
    """Columns come and none goes."""
    narrow, wide = fit(columns, width), fit(columns, width + 10)
    if narrow is not None:
        assert wide is not None
        assert {place for place, one in enumerate(narrow) if one} <= {place for place, one in enumerate(wide) if one}


def test_what_is_wanted_whole_is_left_to_another_layout():
    """Nothing is left out and nothing is hard to read, or there is none."""
    columns = [Column(least=5, good=16, natural=40), Column(least=10, good=10, natural=10, rank=1)]
    assert fit(columns, 28, whole=True) == (16, 10)
    assert fit(columns, 27, whole=True) is None
    assert fit(columns, 27) == (27, 0)


def test_the_highest_rank_goes_first():
    """Of equals the last."""
    columns = [Column(least=10, good=10, natural=10, rank=rank) for rank in (0, 1, 2, 2)]
    assert fit(columns, 46) == (10, 10, 10, 10)
    assert fit(columns, 45) == (10, 10, 10, 0)
    assert fit(columns, 33) == (10, 10, 0, 0)
    assert fit(columns, 10) == (10, 0, 0, 0)
    assert fit(columns, 9) is None


def test_a_column_is_measured_by_its_words_or_by_its_lines():
    """Numbers are whole, prose wraps; a number keeps its unit, and wide letters count twice."""
    assert measure(["1.5 ms\n[1.4, 1.6]"], whole=True) == Column(least=10, good=10, natural=10)
    assert measure(["one three"], whole=False) == Column(least=5, good=9, natural=9)
    assert measure(["about 12.5 ms or so"], whole=False).least == len("12.5 ms")
    assert measure(["漢字"], whole=True).natural == 4


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ue000")))
def test_what_is_glued_is_of_the_same_length_and_comes_back(text):
    """A line is measured with it, and printed without it."""
    assert cell_len(glue(text)) == cell_len(text)
    assert unglue(glue(text)) == text
