"""Draws charts with characters: curves with plotext, and a ratio with its interval in one line.

plotext receives only numbers, and ticks that are formatted here. Charts have no colour: they are read by shape. All
ratios of a column share one logarithmic scale, so that half and twice are equally far from 1; an interval that extends
beyond the scale ends in an arrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorameter.report.blocks import Axis, Cell, Chart

HEIGHT = 8
"""Lines of a chart, including its ticks."""
MAX_TICKS = 5
"""Maximum ticks along x; more would overlap."""


def plot(chart: Chart, width: int) -> list[str]:
    """The lines of a chart, with at most `width` characters each."""
    import plotext

    across, points = chart.across, [point for curve in chart.curves for point in curve.points]
    low, high = chart.up.span or (min(point.y for point in points), max(point.y for point in points))
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plot_size(width, HEIGHT)
    plotext.theme("clear")
    plotext.xaxes(True, False)
    plotext.yaxes(True, False)
    plotext.ylim(low, high)
    for curve in chart.curves:
        places, values = [_place(point.x, across) for point in curve.points], [point.y for point in curve.points]
        plotext.plot(places, values, marker="braille")
        for place, point in zip(places, curve.points, strict=True):
            if point.y_interval:
                least, most = point.y_interval
                plotext.plot([place] * 2, [max(least, low), min(most, high)], marker="braille")
        if across.named:
            plotext.scatter(places, values, marker="•")
    ends = (min(point.x for point in points), max(point.x for point in points))
    named = _select_ticks(across.named or [(x, f"{x:g}") for x in ends])
    plotext.xticks([_place(x, across) for x, _ in named], [name for _, name in named])
    marks = sorted({low, (low + high) / 2, high})
    plotext.yticks(marks, _labels(marks))
    drawn = str(plotext.uncolorize(plotext.build())).rstrip()
    return [line[:width] for line in drawn.split("\n")]


def _place(x: float, across: Axis) -> float:
    return math.log(x) if across.log else x


def _select_ticks(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks, or as many as fit, always including the first and the last."""
    if len(ticks) <= MAX_TICKS:
        return list(ticks)
    steps = [round(place * (len(ticks) - 1) / (MAX_TICKS - 1)) for place in range(MAX_TICKS)]
    return [ticks[place] for place in steps]


def _labels(marks: Sequence[float]) -> list[str]:
    """Labels with as many digits as needed to distinguish them."""
    spread = (marks[-1] - marks[0]) / 2 or abs(marks[0])
    places = max(0, 1 - math.floor(math.log10(spread))) if spread else 2
    return [f"{mark:.{min(places, 6)}f}" for mark in marks]


MIN_WIDTH, MAX_WIDTH = 11, 33
"""Odd, so that 1 has its own character."""
_MIN_BOUND = math.log(1.05)


def ratio_axis_limit(cells: Sequence[Cell]) -> float:
    """The distance from 1, as a logarithm, to which the scale of these ratios extends. Wide intervals do not shrink the
    rest: it extends at most twice as far as the values."""
    values = [abs(math.log(cell.value)) for cell in cells if cell.value]
    ends = [abs(math.log(end)) for cell in cells for end in (cell.value, cell.low, cell.high) if end]
    return max(_MIN_BOUND, min(max(ends, default=0.0), 2 * max(values, default=0.0) + _MIN_BOUND))


def draw_scale(bound: float, width: int) -> str:
    """The values at the ends and the middle of a scale."""
    left, right = f"{math.exp(-bound):.2g}", f"{math.exp(bound):.2g}"
    centre = width // 2
    return f"{left:<{centre}}1{right:>{width - centre - 1}}"


def draw_whisker(cell: Cell, bound: float, width: int) -> str:
    """The ratio of a cell in `width` characters; only the middle for a cell without a ratio."""
    centre = width // 2
    drawn = [" "] * width
    if cell.value:
        value, begin, end = (
            centre + round(math.log(one or cell.value) / bound * centre) for one in (cell.value, cell.low, cell.high)
        )
        for place in range(max(begin, 0), min(end, width - 1) + 1):
            drawn[place] = "─"
        if begin < end:
            drawn[max(begin, 0)] = "├" if begin >= 0 else "◂"
            drawn[min(end, width - 1)] = "┤" if end < width else "▸"
    drawn[centre] = {" ": "┊", "─": "┼"}.get(drawn[centre], drawn[centre])
    if cell.value:
        drawn[min(max(value, 0), width - 1)] = "●"
    return "".join(drawn)
