"""What a phase looks like: a metric along each field that the study sweeps, and the loss of each variant by step."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

from lorameter.records.metrics import LOSSES, METRICS, Phase
from lorameter.report.blocks import ChartGroup, say
from lorameter.report.curves import Axis, Curve, Curves
from lorameter.report.pareto import tabulate_serving
from lorameter.report.phase_table import PhaseTable
from lorameter.report.phrases import title_of
from lorameter.studies.claim import is_number
from lorameter.studies.study import Study, is_of_tokens
from lorameter.verdicts.series import Groups, Series

LEAST_LEVELS = 3
"""Two points are no curve: a table says them."""
LEAST_STEPS = 6
MOST_CURVES = 8
"""Curves of losses that are shown; a study of fifty variants would fill the screen with them."""
_SWEPT: dict[Phase, tuple[str, ...]] = {"train": ("held_out_loss",), "generate": (), "cold": ()}
"""Metrics that a sweep draws, in addition to the one that a phase is compared by."""

_Point = tuple[float, float, float | None, float | None]
"""Place, value, and the ends of its interval where it has one."""


def add_charts(table: PhaseTable, study: Study, groups: Groups) -> PhaseTable:
    """The table with its charts and further blocks, if there are any."""
    galleries = (*_sweeps(table, study, groups), *(_losses(study, groups) if table.phase == "train" else ()))
    serving = None
    if table.phase == "generate":
        names = [variant.name for variant in study.variants]
        serving = tabulate_serving({name: groups[name, "variant"] for name in names if (name, "variant") in groups})
    return dataclasses.replace(table, galleries=galleries, serving=serving)


def _sweeps(table: PhaseTable, study: Study, groups: Groups) -> Iterator[ChartGroup]:
    swept = {axis: levels for axis in study.axes if len(levels := _numbers(study, axis)) >= LEAST_LEVELS}
    ratios = {row.name: row.ratio for row in table.rows}
    charts = []
    for axis, levels in swept.items():
        points: list[_Point] = []
        for level, name in levels:
            found = ratios.get(name)
            if name == study.reference and name in ratios:
                points.append((level, 1.0, None, None))
            elif found is not None and found.ratio is not None:
                points.append((level, found.ratio, found.low, found.high))
        charts.append(_chart(axis, points))
    yield from _gallery(f"{title_of(table.metric)} × {study.reference}, along each field", charts)
    for metric in _SWEPT[table.phase]:
        charts = [
            _chart(axis, [point for level, name in levels if (point := _estimated(groups, name, metric, level))])
            for axis, levels in swept.items()
            if not (METRICS[metric].is_loss and is_of_tokens(axis))
        ]
        yield from _gallery(f"{title_of(metric)}, along each field", charts)


def _gallery(title: str, charts: Sequence[Curves]) -> Iterator[ChartGroup]:
    """Those that are curves, on one scale, so that what hardly matters looks so."""
    curves = [chart for chart in charts if len(chart.curves[0].points) >= LEAST_LEVELS]
    if curves:
        yield ChartGroup(title=title, charts=tuple(_on_one_scale(title, curves)))


def _on_one_scale(title: str, charts: Sequence[Curves]) -> Iterator[Curves]:
    ends = [end for chart in charts for curve in chart.curves for end in curve.ends]
    slack = max(max(ends) - min(ends), 0.02 * abs(max(ends)), 1e-12) * 0.05
    up = Axis(title=title, span=(min(ends) - slack, max(ends) + slack))
    yield from (dataclasses.replace(one, up=up) for one in charts)


def _chart(axis: str, points: Sequence[_Point]) -> Curves:
    across = Axis(title=axis, named=tuple((x, f"{x:g}") for x, *_ in points), log=bool(points) and points[0][0] > 0)
    curve = Curve(
        name=axis,
        points=tuple((x, y) for x, y, _, _ in points),
        band=tuple((x, low, high) for x, _, low, high in points if low is not None and high is not None),
    )
    return Curves(across=across, up=Axis(title=""), curves=(curve,))


def _numbers(study: Study, axis: str) -> list[tuple[float, str]]:
    """The levels of a field that are numbers, with their variants."""
    return [(float(level), name) for level, name in study.levels(axis) if is_number(level)]


def _estimated(groups: Groups, name: str, metric: str, level: float) -> _Point | None:
    series = groups.get((name, "variant"))
    found = series.estimate(metric) if series is not None else None
    return None if found is None or found.value is None else (level, found.value, found.low, found.high)


def _losses(study: Study, groups: Groups) -> Iterator[ChartGroup]:
    """The median of the replicates at each step."""
    curves = [
        (variant.name, losses)
        for variant in study.variants
        if (series := groups.get((variant.name, "variant"))) and len(losses := losses_by_step(series)) >= LEAST_STEPS
    ]
    charts = [
        Curves(
            across=Axis(title=name),
            up=Axis(title=""),
            curves=(
                Curve(
                    name=name,
                    points=tuple((float(step), statistics.median(found)) for step, found in enumerate(losses, start=1)),
                ),
            ),
        )
        for name, losses in curves[:MOST_CURVES]
    ]
    if charts:
        more = len(curves) - len(charts)
        notes = (say(f"and {more} more; --variant shows one"),) if more else ()
        title = "loss by step, median of the replicates"
        yield ChartGroup(title=title, charts=tuple(_on_one_scale(title, charts)), notes=notes)


def losses_by_step(series: Series) -> list[tuple[float, ...]]:
    """The losses at each step, of the trials that trained all steps: isolated trials and trainings that were cut short
    end earlier and are left out."""
    records = series.measuring("timed_loss")
    curves = [[loss for name in LOSSES for loss in record.samples.get(name, ())] for record in records]
    most = max(map(len, curves), default=0)
    return list(zip(*(losses for losses in curves if len(losses) == most), strict=True))
