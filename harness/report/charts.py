"""What a phase looks like: a metric along each field that the study sweeps, and the loss of each variant by step."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

from harness.records.metrics import LOSSES, Phase
from harness.report.phase_table import PhaseTable
from harness.report.table import Chart, Gallery, Point, say
from harness.report.words import title_of
from harness.studies.claim import is_number
from harness.studies.study import Study
from harness.verdicts.series import Groups, Series

LEAST_LEVELS = 3
"""Two points are no curve: a table says them."""
LEAST_STEPS = 6
MOST_CURVES = 8
"""Curves of losses that are shown; a study of fifty variants would fill the screen with them."""
_SWEPT: dict[Phase, tuple[str, ...]] = {"train": ("held_out_loss",), "generate": (), "cold": ()}
"""Metrics beside the one that a phase is compared by, of which a sweep is drawn."""


def with_charts(table: PhaseTable, study: Study, groups: Groups) -> PhaseTable:
    """The table with its charts, as far as there are any."""
    galleries = (*_sweeps(table, study, groups), *(_losses(study, groups) if table.phase == "train" else ()))
    return dataclasses.replace(table, galleries=galleries)


def _sweeps(table: PhaseTable, study: Study, groups: Groups) -> Iterator[Gallery]:
    swept = {axis: levels for axis in study.axes if len(levels := _numbers(study, axis)) >= LEAST_LEVELS}
    ratios = {row.name: row.ratio for row in table.rows}
    charts = []
    for axis, levels in swept.items():
        points = []
        for level, name in levels:
            found = ratios.get(name)
            if name == study.reference and name in ratios:
                points.append(Point(x=level, y=1.0))
            elif found is not None and found.ratio is not None:
                points.append(Point(x=level, y=found.ratio, low=found.low, high=found.high))
        charts.append(_chart(axis, points))
    yield from _gallery(f"{title_of(table.metric)} × {study.reference}, along each field", charts)
    for metric in _SWEPT[table.phase]:
        charts = [
            _chart(axis, [point for level, name in levels if (point := _estimated(groups, name, metric, level))])
            for axis, levels in swept.items()
        ]
        yield from _gallery(f"{title_of(metric)}, along each field", charts)


def _gallery(title: str, charts: Sequence[Chart]) -> Iterator[Gallery]:
    """Those that are curves, on one scale, so that what hardly matters looks so."""
    curves = [chart for chart in charts if len(chart.points) >= LEAST_LEVELS]
    if curves:
        yield Gallery(title=title, charts=tuple(_on_one_scale(curves)))


def _on_one_scale(charts: Sequence[Chart]) -> Iterator[Chart]:
    every = [point for chart in charts for point in chart.points]
    ends = [end for point in every for end in (point.y, point.low, point.high) if end is not None]
    slack = max(max(ends) - min(ends), 0.02 * abs(max(ends)), 1e-12) * 0.05
    yield from (dataclasses.replace(one, span=(min(ends) - slack, max(ends) + slack)) for one in charts)


def _chart(axis: str, points: Sequence[Point]) -> Chart:
    ticks = tuple((point.x, f"{point.x:g}") for point in points)
    return Chart(title=axis, points=tuple(points), ticks=ticks, log=bool(points) and points[0].x > 0)


def _numbers(study: Study, axis: str) -> list[tuple[float, str]]:
    """The levels of a field that are numbers, with their variants."""
    return [(float(level), name) for level, name in study.levels(axis) if is_number(level)]


def _estimated(groups: Groups, name: str, metric: str, level: float) -> Point | None:
    series = groups.get((name, "variant"))
    found = series.estimate(metric) if series is not None else None
    return (
        None if found is None or found.value is None else Point(x=level, y=found.value, low=found.low, high=found.high)
    )


def _losses(study: Study, groups: Groups) -> Iterator[Gallery]:
    """The median of the replicates at each step; of steps that every one of them took."""
    curves = [
        (variant.name, losses)
        for variant in study.variants
        if (series := groups.get((variant.name, "variant"))) and len(losses := losses_by_step(series)) >= LEAST_STEPS
    ]
    charts = [
        Chart(
            title=name,
            points=tuple(Point(x=step, y=statistics.median(found)) for step, found in enumerate(losses, start=1)),
        )
        for name, losses in curves[:MOST_CURVES]
    ]
    if charts:
        more = len(curves) - len(charts)
        notes = (say(f"and {more} more; --variant shows one"),) if more else ()
        yield Gallery(title="loss by step, median of the replicates", charts=tuple(_on_one_scale(charts)), notes=notes)


def losses_by_step(series: Series) -> list[tuple[float, ...]]:
    """The losses of all replicates at each step that every one of them took: curves of which one ends before the others
    would jump there."""
    curves = [[loss for name in LOSSES for loss in record.samples.get(name, ())] for record in series.ok]
    return list(zip(*filter(None, curves), strict=False))
