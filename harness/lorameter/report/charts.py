"""Charts of a phase: a metric along each swept field, the loss of each variant by step, and variants in two measures.

Loss against cost, of what was trained; throughput against latency, of requests that have different numbers of prompts.
More prompts a request share what it costs to read the weights: all of them together get more tokens a second, and each
of them waits longer for its own. Neither number alone says how many to take.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lorameter.records.metrics import LOSSES, METRICS, Phase
from lorameter.report.blocks import (
    Axis,
    Cell,
    ChartGroup,
    Curve,
    Curves,
    Table,
    name_columns,
    say,
    value_cell,
    write_row,
)
from lorameter.report.figure import Figure, Mark, ParetoFront, Spot
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
        yield ChartGroup(title=title, charts=tuple(_on_one_scale(title, charts)), notes=notes, on_page=False)


def losses_by_step(series: Series) -> list[tuple[float, ...]]:
    """The losses at each step, of the trials that trained all steps: isolated trials and trainings that were cut short
    end earlier and are left out."""
    records = series.measuring("timed_loss")
    curves = [[loss for name in LOSSES for loss in record.samples.get(name, ())] for record in records]
    most = max(map(len, curves), default=0)
    return list(zip(*(losses for losses in curves if len(losses) == most), strict=True))


LATENCY, THROUGHPUT = "time_per_output_token_s", "output_tokens_per_s"
SERVING = "Throughput against latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoMeasures:
    """Variants in two metrics, of those that have both."""

    across: str
    up: str
    marks: Mapping[str, tuple[Mark, Mark]]

    @property
    def spots(self) -> tuple[Spot, ...]:
        """Each with whether it is on the front."""
        return tuple(
            Spot(name=name, across=x, up=y, best=not any(self._beats(other, (x, y)) for other in self.marks.values()))
            for name, (x, y) in self.marks.items()
        )

    @property
    def drawing(self) -> ParetoFront:
        """As a picture."""
        return ParetoFront(across=axis_of(self.across), up=axis_of(self.up), spots=self.spots)

    def _beats(self, one: tuple[Mark, Mark], other: tuple[Mark, Mark]) -> bool:
        """Whether it is better in one measure and no worse in the other."""
        signs = [-1 if METRICS[metric].higher_is_better else 1 for metric in (self.across, self.up)]
        pairs = [(sign * a.value, sign * b.value) for sign, a, b in zip(signs, one, other, strict=True)]
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


def axis_of(metric: str) -> Axis:
    """The axis of a metric."""
    return Axis(title=METRICS[metric].title, unit=METRICS[metric].unit)


def measure_both(shown: Mapping[str, Series], across: str, up: str) -> TwoMeasures | None:
    """The variants that have both metrics; None where fewer than two do."""
    marks: dict[str, tuple[Mark, Mark]] = {}
    for name, series in shown.items():
        x, y = (_mark(name, series, metric) for metric in (across, up))
        if x is not None and y is not None:
            marks[name] = x, y
    return TwoMeasures(across=across, up=up, marks=marks) if len(marks) > 1 else None


def tabulate_front(found: TwoMeasures) -> Table:
    """The numbers of a front."""
    front = found.drawing
    rows = (
        write_row(spot.name, _written(spot.across, front.across), _written(spot.up, front.up), _on_it(spot))
        for spot in front.spots
    )
    return Table(heads=name_columns("variant", front.across.title, front.up.title, "on the front"), rows=tuple(rows))


def tabulate_serving(shown: Mapping[str, Series]) -> Table | None:
    """Throughput and latency of variants whose requests have different numbers of prompts; None where all have one."""
    found = _serving(shown)
    if found is None:
        return None
    front = found.drawing
    rows = (
        write_row(
            spot.name, _prompts(shown[spot.name]), _written(spot.across, front.across), _written(spot.up, front.up),
            _on_it(spot),
        )
        for spot in front.spots
    )  # fmt: skip
    heads = name_columns("variant", "prompts", front.across.title, front.up.title, "on the front")
    said = (
        "output tokens/s: of all prompts of a request, over its time; on the front: no other has more of them and less "
        "time per token, by their estimates"
    )
    return Table(title=SERVING, heads=heads, rows=tuple(rows), notes=(say(said),), blank_line_before=True)


def draw_serving(shown: Mapping[str, Series]) -> Figure | None:
    """The same as a picture."""
    found, table = _serving(shown), tabulate_serving(shown)
    if found is None or table is None:
        return None
    return Figure(
        title=SERVING,
        says="To the left each prompt gets its tokens sooner, above all prompts of a request together get more of them "
        "a second. The dashed stair joins the variants that no other beats in both by its estimate; where intervals "
        "overlap the order is open.",
        drawing=found.drawing,
        table=replace(table, title="", notes=(), blank_line_before=False),
    )


def _serving(shown: Mapping[str, Series]) -> TwoMeasures | None:
    several = len({batch for series in shown.values() for batch in _batches(series)}) > 1
    return measure_both(shown, LATENCY, THROUGHPUT) if several else None


def _batches(series: Series) -> set[float]:
    """Prompts of its requests; a record that does not say is of one."""
    return {record.values.get("request_batch", 1.0) for record in series.measuring(LATENCY)}


def _prompts(series: Series) -> Cell:
    batch = max(_batches(series))
    return Cell(text=f"{batch:.0f}", value=batch)


def _mark(name: str, series: Series, metric: str) -> Mark | None:
    found = series.estimate(metric)
    if found is None or found.value is None:
        return None
    return Mark(name=name, value=found.value, low=found.low, high=found.high)


def _on_it(spot: Spot) -> str:
    return "yes" if spot.best else "no"


def _written(mark: Mark, axis: Axis) -> Cell:
    return value_cell(mark.value, mark.low, mark.high, axis.unit)
