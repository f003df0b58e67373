"""A ratio drawn in a line of characters: its interval as a whisker, its value as a dot, and 1 as what they lie around.

All rows of a column share one scale, by logarithms, so that half and twice are equally far from 1. An interval that
reaches beyond the scale ends in an arrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from lorameter.report.blocks import Cell

LEAST_WIDTH, MOST_WIDTH = 11, 33
"""Odd, so that 1 has a character of its own."""
_LEAST_BOUND = math.log(1.05)


def scale_of(cells: Iterable[Cell]) -> float:
    """How far from 1 the scale reaches that shows these ratios, as a logarithm. Wide intervals do not shrink the rest:
    it reaches at most twice as far as the values."""
    values, ends = [0.0], [_LEAST_BOUND]
    for cell in cells:
        values += [abs(math.log(one)) for one in (cell.value,) if one]
        ends += [abs(math.log(one)) for one in (cell.value, cell.low, cell.high) if one]
    return max(_LEAST_BOUND, min(max(ends), 2 * max(values) + _LEAST_BOUND))


def draw_scale(bound: float, width: int) -> str:
    """What the ends of a scale and its middle are."""
    left, right = f"{math.exp(-bound):.2g}", f"{math.exp(bound):.2g}"
    centre = width // 2
    return f"{left:<{centre}}1{right:>{width - centre - 1}}"


def draw_whisker(cell: Cell, bound: float, width: int) -> str:
    """The ratio of a cell in so many characters; of a cell without one the middle alone."""
    centre = width // 2
    drawn = [" "] * width
    if cell.value:
        low, high = (one or cell.value for one in (cell.low, cell.high))
        if cell.low is not None or cell.high is not None:
            begin, end = (_place(one, bound, centre) for one in (low, high))
            for place in range(max(begin, 0), min(end, width - 1) + 1):
                drawn[place] = "─"
            if begin < end:
                drawn[max(begin, 0)] = "├" if begin >= 0 else "◂"
                drawn[min(end, width - 1)] = "┤" if end < width else "▸"
    if drawn[centre] == " ":
        drawn[centre] = "┊"
    elif drawn[centre] == "─":
        drawn[centre] = "┼"
    if cell.value:
        drawn[min(max(_place(cell.value, bound, centre), 0), width - 1)] = "●"
    return "".join(drawn)


def _place(ratio: float, bound: float, centre: int) -> int:
    return centre + round(math.log(ratio) / bound * centre)
