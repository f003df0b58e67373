"""Ratios drawn around 1: on one scale, symmetric by logarithms, with an arrow where an interval goes on."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from harness.report.table import Cell
from harness.report.whisker import draw_scale, draw_whisker, scale_of

BOUND = math.log(2)


def ratio(value, low=None, high=None):
    return Cell(value=value, low=low, high=high, unit="1")


def test_one_is_in_the_middle_and_half_and_twice_are_equally_far():
    """A cell without a ratio shows where 1 is."""
    assert draw_whisker(Cell(), BOUND, 11) == "     ┊     "
    assert draw_whisker(ratio(1.0), BOUND, 11) == "     ●     "
    assert draw_whisker(ratio(2.0), BOUND, 11) == "     ┊    ●"
    assert draw_whisker(ratio(0.5), BOUND, 11) == "●    ┊     "


def test_an_interval_is_a_whisker_through_one_or_beside_it():
    """Its ends, its value and the middle each have a character."""
    beside = draw_whisker(ratio(1.4, 1.15, 1.75), BOUND, 21)
    assert beside[10:].strip("┊ ") == "├──●──┤"
    assert set(beside[:10]) == {" "}
    through = draw_whisker(ratio(1.2, 0.8, 1.75), BOUND, 21)
    assert through.strip() == "├──┼──●────┤"
    assert through[10] == "┼"


def test_what_goes_beyond_the_scale_ends_in_an_arrow():
    """The value stays on it."""
    assert draw_whisker(ratio(1.5, 0.1, 9.0), BOUND, 11) == "◂────┼──●─▸"
    assert draw_whisker(ratio(9.0), BOUND, 11)[-1] == "●"


def test_the_scale_fits_the_values_and_no_wide_interval_shrinks_them():
    """At least 5 % to either side."""
    assert math.isclose(scale_of([Cell(), ratio(1.0)]), math.log(1.05))
    assert math.isclose(scale_of([ratio(1.2, 1.1, 1.3)]), math.log(1.3))
    assert scale_of([ratio(1.2, 0.01, 100.0)]) < math.log(1.6)
    assert draw_scale(math.log(2), 11) == "0.5  1    2"


@given(
    st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.sampled_from([11, 13, 21, 33]),
)  # fmt: skip
def test_whatever_the_numbers_are_it_is_as_wide_as_asked(first, second, third, width):
    """And shows the value once."""
    low, value, high = sorted((first, second, third))
    cell = ratio(value, low, high)
    drawn = draw_whisker(cell, scale_of([cell]), width)
    assert len(drawn) == width
    assert drawn.count("●") == 1
    assert len(draw_scale(scale_of([cell]), width)) >= width
