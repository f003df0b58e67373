"""Charts as characters, by plotext: a line in braille, a dot a point, whiskers for intervals.

plotext gets numbers alone, and ticks that are written here. What it draws has no colour: a chart is read by its shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.records.units import Unit, format_value
from harness.report.table import Chart

HEIGHT = 8
"""Lines of a chart, its ticks included."""
MOST_TICKS = 5
"""Named places along x; more would run into each other."""


def plot(chart: Chart, width: int) -> list[str]:
    """The lines of a chart, each of that many characters."""
    import plotext

    places = [_across(point.x, chart) for point in chart.points]
    low, high = chart.span or _span(chart)
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plot_size(width, HEIGHT)
    plotext.theme("clear")
    plotext.xaxes(True, False)
    plotext.yaxes(True, False)
    plotext.ylim(low, high)
    plotext.plot(places, [point.y for point in chart.points], marker="braille")
    for place, point in zip(places, chart.points, strict=True):
        if point.low is not None and point.high is not None:
            plotext.plot([place, place], [max(point.low, low), min(point.high, high)], marker="braille")
    if chart.ticks:
        plotext.scatter(places, [point.y for point in chart.points], marker="•")
    named = _thinned(chart.ticks or [(one.x, f"{one.x:g}") for one in (chart.points[0], chart.points[-1])])
    plotext.xticks([_across(x, chart) for x, _ in named], [name for _, name in named])
    marks = sorted({low, (low + high) / 2, high})
    plotext.yticks(marks, _labels(marks, chart.unit))
    drawn = str(plotext.uncolorize(plotext.build()))
    lines = [line.rstrip()[:width].ljust(width) for line in drawn.split("\n")]
    return lines[:-1] if not lines[-1].strip() else lines


def _across(x: float, chart: Chart) -> float:
    return math.log(x) if chart.log else x


def _span(chart: Chart) -> tuple[float, float]:
    """From the least to the greatest of all points and whiskers, and a little beside where all are one."""
    ends = [end for point in chart.points for end in (point.y, point.low, point.high) if end is not None]
    low, high = min(ends), max(ends)
    slack = 0.02 * (abs(high) or 1.0)
    return (low, high) if high - low > slack / 10 else (low - slack, high + slack)


def _thinned(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks, or as many of them as have room, the first and the last among them."""
    if len(ticks) <= MOST_TICKS:
        return list(ticks)
    steps = [round(place * (len(ticks) - 1) / (MOST_TICKS - 1)) for place in range(MOST_TICKS)]
    return [ticks[place] for place in steps]


def _labels(marks: Sequence[float], unit: Unit) -> list[str]:
    """With as many digits as tell them apart."""
    if unit != "1":
        return [format_value(mark, unit) for mark in marks]
    apart = (marks[-1] - marks[0]) / 2 if len(marks) > 1 else abs(marks[0])
    places = max(0, 1 - math.floor(math.log10(apart))) if apart > 0 else 2
    return [f"{mark:.{min(places, 6)}f}" for mark in marks]
