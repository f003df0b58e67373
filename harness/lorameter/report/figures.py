"""The figures of a run's HTML page, and the charts of a phase, which the terminal also draws.

A figure is omitted if a run has no data for it. Every number in a figure comes from the terminal's report or from the
records; nothing is smoothed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import cast

from kernels_check.check import Status
from lorameter.measurements.metrics import METRICS, PEAKS, is_difference_metric
from lorameter.measurements.peaks import RSS_AT_START
from lorameter.measurements.steps import losses_of_steps
from lorameter.records.record import TrialRecord
from lorameter.records.units import first_few
from lorameter.report.blocks import (
    Axis,
    Bars,
    Block,
    Cell,
    Chart,
    ChartGroup,
    Curve,
    Figure,
    Finding,
    Intervals,
    Matrix,
    Point,
    Table,
    Tone,
    name_columns,
    to_line,
    value_cell,
    write_number,
    write_ratio,
    write_row,
    write_value,
)
from lorameter.report.phrases import metric_title, ratio_title
from lorameter.report.run_view import PhaseTable, RunView
from lorameter.stats import Comparison
from lorameter.studies.claim import is_number
from lorameter.studies.study import Study, is_of_tokens
from lorameter.studies.study_file import read_own_workloads
from lorameter.studies.workload import OF_TOKENS
from lorameter.verdicts.series import Series

SeriesByVariant = Mapping[str, Series]
"""The trials of each variant, in study order."""
PERSISTENT_MEMORY = {
    "base_weight_bytes": "base weights",
    "quantization_state_bytes": "quantisation constants",
    "adapter_bytes": "adapter",
    "gradient_bytes": "gradients",
    "optimizer_state_bytes": "optimizer state",
}
"""Kinds of memory that persist during a step, which do not overlap, with their names."""
MAX_NAMED = 3
"""Maximum names of variants that a figure leaves out."""
COMPARED_LOSSES = ("held_out_loss", "timed_loss")
"""Losses of a variant; the first measured one is drawn."""
COLD = {
    "cold_import_time_s": "import",
    "cold_load_time_s": "load",
    "cold_first_token_time_s": "first token",
    "cold_completion_time_s": "the other tokens",
}
MIN_LEVELS = 3
"""Minimum levels of a curve: two points are shown in a table."""
MIN_STEPS = 6
MAX_CURVES = 8
"""Maximum loss curves; a study with fifty variants would fill the screen."""
LATENCY, THROUGHPUT = "time_per_output_token_s", "output_tokens_per_s"
SERVING = "Throughput against latency"
_TONES: Mapping[Status, Tone] = {
    "fallback": "bad",
    "absent": "bad",
    "unknown": "warning",
    "not_applicable": "warning",
    "active": "good",
}
"""The colour of each status of a required path, the worst status first. Only `active` meets a requirement."""


def draw_run_figures(view: RunView) -> tuple[Figure, ...]:
    """All figures for which the run has data, in page order: ratios of the view, then the phases that it shows
    completely."""
    variants = view.series
    whole = {table.phase: table.metric for table in view.tables if table.phase in view.phases}
    figures = [_ratios(table, view.study.reference) for table in (*view.tables, *view.outcomes)]
    if "train" in whole:
        figures += [_losses(variants), _memory(variants), _front(view, variants, whole["train"])]
        figures += [_samples([record for record in view.run.records if record.name in variants])]
    figures += [_draw_serving(variants)] if "generate" in whole else []
    figures += [_cold(variants)] if "cold" in whole else []
    figures += [_checks(variants)] if whole else []
    return tuple(figure for figure in figures if figure is not None)


def _ratios(table: PhaseTable, reference: str) -> Figure | None:
    title = f"{ratio_title(table.metric)}{f' on {table.site}' if table.site else ''}"
    if any(one.share is not None for one in table.ratios.values()):
        about, worse = f"gain in {title}, {reference} = 1", "left of 1 is worse"
        caption = "A dot is the part of the reference's gain that a variant has, the line through it its interval."
    elif is_difference_metric(table.metric):
        higher = METRICS[table.metric].higher_is_better
        about, worse = f"{title} minus {reference}", f"{'left' if higher else 'right'} of 0 is worse"
        caption = "A dot is the difference of a variant to the reference, the line through it its interval."
    else:
        about, worse = f"{title} × {reference}", "right of 1 is worse"
        caption = "A dot is the ratio of a variant to the reference, the line through it its interval."
    return draw_ratios(about[:1].upper() + about[1:], caption, worse, table.ratios)


def draw_ratios(title: str, caption: str, about: str, comparisons: Mapping[str, Comparison]) -> Figure | None:
    """Ratios with their intervals and verdicts, as a picture and as a table; None without any."""
    values = {name: one.value for name, one in comparisons.items()}
    found = {name: one for name, one in comparisons.items() if values[name] is not None}
    rows = (write_row(name, write_ratio(one), Cell(verdict=one.verdict)) for name, one in found.items())
    marks = (Cell(name=name, value=values[name], low=one.low, high=one.high, verdict=one.verdict)
             for name, one in found.items())  # fmt: skip
    differences = any(one.difference is not None for one in found.values())
    drawing = Intervals(axis=Axis(title=about, line_at=0.0 if differences else 1.0), marks=tuple(marks))
    table = Table(heads=name_columns("variant", about, "verdict"), rows=tuple(rows))
    return Figure(title=title, caption=caption, drawing=drawing, table=table) if found else None


def _losses(variants: SeriesByVariant) -> Figure | None:
    losses = {name: steps for name, series in variants.items() if len(steps := _losses_by_step(series)) > 1}
    if not losses:
        return None
    curves = (
        Curve(
            name=name,
            points=tuple(
                Point(x=number, y=statistics.median(step), y_interval=(min(step), max(step)) if len(step) > 1 else None)
                for number, step in enumerate(steps, start=1)
            ),
        )
        for name, steps in losses.items()
    )
    rows = (
        write_row(
            name,
            str(len(steps[0])),
            str(len(steps)),
            *(write_number(statistics.median(steps[place]), ".4g") for place in (0, -1)),
        )
        for name, steps in losses.items()
    )
    return Figure(
        title="Losses of all variants",
        caption="The training loss by step, the median of the replicates; the band is from the lowest to the highest "
        "of them.",
        drawing=Chart(across=Axis(title="step"), up=Axis(title="training loss"), curves=tuple(curves)),
        table=Table(heads=name_columns("variant", "replicates", "steps", "first", "last"), rows=tuple(rows)),
    )


def _memory(variants: SeriesByVariant) -> Figure | None:
    caption = (
        "What a step keeps, by kind, and what else its peak held (activations, work space, the process baseline); the "
        "median over replicates."
    )
    bars = {name: kind_bytes for name, series in variants.items() if (kind_bytes := _memory_by_kind(series))}
    return _bars("Memory of training", caption, Axis(title="memory", unit="byte"), bars)


def _memory_by_kind(series: Series) -> dict[str, float]:
    """The median size of each kind of memory, and the rest of the peak; empty if no kind or no peak is known."""

    def median(kind: str) -> float:
        return statistics.median([record.memory[kind] for record in series.ok if kind in record.memory] or [0])

    peak = next((kind for kind in PEAKS["train"] if median(kind)), None)
    kind_bytes = {word: median(kind) for kind, word in PERSISTENT_MEMORY.items() if median(kind)}
    if peak is None or not kind_bytes:
        return {}
    if peak.startswith("host") and median(RSS_AT_START):
        kind_bytes = {"process baseline": median(RSS_AT_START), **kind_bytes}
    return kind_bytes | {"rest of the peak": max(median(peak) - sum(kind_bytes.values()), 0.0)}


def _cold(variants: SeriesByVariant) -> Figure | None:
    bars = {name: medians for name, series in variants.items() if (medians := _cold_parts(series))}
    caption = "From a new interpreter to its first completion, piece after piece; the median of each over replicates."
    return _bars("A cold start by phase", caption, Axis(title="time", unit="s"), bars)


def _cold_parts(series: Series) -> dict[str, float]:
    """The median time of each part of a cold start that was measured."""
    medians = {
        title: statistics.median([sample for trial in series.trials(metric) for sample in trial])
        for metric, title in COLD.items()
        if series.trials(metric)
    }
    if "first token" in medians and "the other tokens" in medians:  # a completion includes its first token
        medians["the other tokens"] = max(medians["the other tokens"] - medians["first token"], 0.0)
    return medians


def _bars(title: str, caption: str, axis: Axis, bars: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Bars as a picture and as a table; None without any."""
    kinds = list(dict.fromkeys(kind for sizes in bars.values() for kind in sizes))
    rows = (
        write_row(
            name,
            *(write_value(sizes[kind], axis.unit) if kind in sizes else "–" for kind in kinds),
            write_value(sum(sizes.values()), axis.unit),
        )
        for name, sizes in bars.items()
    )
    table = Table(heads=name_columns("variant", *kinds, "together"), rows=tuple(rows))
    return Figure(title=title, caption=caption, drawing=Bars(axis=axis, bars=bars), table=table) if bars else None


def _front(view: RunView, variants: SeriesByVariant, cost: str) -> Figure | None:
    """Loss against the metric of training, for variants whose loss is over the same tokens."""
    loss = next((metric for metric in COMPARED_LOSSES if any(one.trials(metric) for one in variants.values())), None)
    if loss is None:
        return None
    own, common = read_own_workloads(view.run), view.study.workload
    others = sorted(
        name
        for name in own.keys() & variants.keys()
        if any(getattr(own[name], key) != getattr(common, key) for key in OF_TOKENS)
    )
    excluded = f" Not drawn, because their losses are over other tokens: {first_few(others, MAX_NAMED)}."
    caption = f"To the left is faster, below is a lower loss after as many steps.{excluded if others else ''}"
    same = {name: series for name, series in variants.items() if name not in others}
    return _draw_front(same, cost, loss, "Loss against cost", caption)


def _samples(trials: Sequence[TrialRecord]) -> Figure | None:
    records = [record for record in trials if record.samples.get("step_time_s")]
    if not records:
        return None
    begin = min(record.started_unix_s for record in records)
    curves = (
        Curve(
            name=name,
            points=tuple(point for one in records if one.name == name for point in _spread_steps(one, begin)),
        )
        for name in dict.fromkeys(record.name for record in records)
    )
    rows = (
        write_row(
            record.trial,
            record.name,
            str(len(record.samples["step_time_s"])),
            *(write_value(time_s, "s") for time_s in _five_numbers(record.samples["step_time_s"])),
        )
        for record in records
    )
    heads = name_columns("trial", "variant", "steps", "least", "quartile", "median", "quartile", "most", left=2)
    across, up = Axis(title="since the first trial", unit="s"), Axis(title="step time", unit="s")
    return Figure(
        title="Every step by time",
        caption="Each dot is one step, warm-ups included, which shows drift and warm-up. Steps are spread evenly over "
        "the time of their trial: interleaved trials are above each other.",
        drawing=Chart(across=across, up=up, curves=tuple(curves), style="specks"),
        table=Table(heads=heads, rows=tuple(rows)),
    )


def _spread_steps(record: TrialRecord, begin: float) -> Iterator[Point]:
    """The steps of a trial, spread evenly over its time since `begin`."""
    steps = (*record.samples.get("warmup_step_time_s", ()), *record.samples["step_time_s"])
    pace_s = record.wall_time_s / len(steps)
    for number, step_s in enumerate(steps):
        yield Point(x=record.started_unix_s - begin + pace_s * (number + 0.5), y=step_s)


def _five_numbers(samples: Sequence[float]) -> tuple[float, ...]:
    """The minimum, the quartiles and the maximum."""
    several = samples if len(samples) > 1 else [*samples, *samples]
    return min(samples), *statistics.quantiles(several, n=4, method="inclusive"), max(samples)


def _checks(variants: SeriesByVariant) -> Figure | None:
    """A row for each path, a column for each variant; None without checks."""
    paths = dict.fromkeys(
        str(check["path"]) for series in variants.values() for one in series.records for check in one.checks
    )
    if not paths:
        return None
    rows = tuple((path, tuple(_finding(series, path) for series in variants.values())) for path in paths)
    return Figure(
        title="Checks of the paths that ran",
        caption="What kernels_check found of each path in each variant; a word opens its evidence.",
        drawing=Matrix(columns=tuple(variants), rows=rows),
        table=None,
    )


def _finding(series: Series, path: str) -> Finding | None:
    """The worst status of a path in a variant's trials, with the reasons from all trials."""
    checks = [check for record in series.records for check in record.checks if check["path"] == path]
    if not checks:
        return None
    worst = min((cast(Status, check["status"]) for check in checks), key=list(_TONES).index)
    observed = Counter(str(check["observed"]) for check in checks if check["status"] == worst).most_common(1)[0][0]
    required = any(check["required"] is not None for check in checks)
    counted = Counter(f"{check['status']}: {check['reason']}" for check in checks)
    return Finding(
        text=f"{worst}: {observed}" if observed not in ("", "None") else worst,
        tone=_TONES[worst] if required else "plain",
        reasons=tuple(f"{reason} ({count} of {len(checks)} trials)" for reason, count in counted.most_common()),
    )


def describe_charts(view: RunView, table: PhaseTable) -> Iterator[Block]:
    """The charts and further tables of a phase that is shown completely."""
    variants = table.series
    if table.phase == "generate" and (serving := _draw_serving(variants)) and serving.table:
        note = "on the front: no other has more output tokens/s and less time per token"
        yield dataclasses.replace(serving.table, title=SERVING, notes=(to_line(note),))
    yield from _sweeps(view.study, variants, table)
    if table.phase == "train":
        yield from _loss_charts(variants)


def _sweeps(study: Study, variants: SeriesByVariant, table: PhaseTable) -> Iterator[ChartGroup]:
    """The ratio, and for training the held-out loss, along each field with enough numeric levels."""
    levels_by_axis = {
        axis: [(float(level), name) for level, name in study.levels(axis) if is_number(level)] for axis in study.axes
    }
    points: dict[str, _Value] = {
        name: (one.ratio, one.low, one.high) for name, one in table.ratios.items() if one.ratio is not None
    }
    if study.reference in variants:
        points[study.reference] = (1.0, None, None)
    title = f"{metric_title(table.metric)} × {study.reference}, along each field"
    yield from _gallery(title, [_sweep(axis, levels, points) for axis, levels in levels_by_axis.items()])
    if table.phase == "train":
        losses = _estimates(variants, "held_out_loss")
        comparable = {axis: levels for axis, levels in levels_by_axis.items() if not is_of_tokens(axis)}
        charts = [_sweep(axis, levels, losses) for axis, levels in comparable.items()]
        yield from _gallery(f"{metric_title('held_out_loss')}, along each field", charts)


_Value = tuple[float, float | None, float | None]


def _estimates(variants: SeriesByVariant, metric: str) -> dict[str, _Value]:
    """The estimate of each variant that has one, with its interval."""
    found = {name: series.estimate(metric) for name, series in variants.items()}
    return {name: (one.value, one.low, one.high) for name, one in found.items() if one is not None}


def _sweep(axis: str, levels: Iterable[tuple[float, str]], values: Mapping[str, _Value]) -> Chart:
    """The values of the variants that have one, by their level of a field."""
    points = [
        Point(x=level, y=values[name][0], y_interval=_interval(values[name]))
        for level, name in levels
        if name in values
    ]
    named = tuple((point.x, f"{point.x:g}") for point in points)
    across = Axis(title=axis, named=named, log=bool(points) and points[0].x > 0)
    return Chart(across=across, up=Axis(title=""), curves=(Curve(name=axis, points=tuple(points)),))


def _interval(value: _Value) -> tuple[float, float] | None:
    _, low, high = value
    return None if low is None or high is None else (low, high)


def _gallery(title: str, charts: Sequence[Chart]) -> Iterator[ChartGroup]:
    """The charts with enough points, on a common scale, so that small effects look small."""
    curves = [chart for chart in charts if len(chart.curves[0].points) >= MIN_LEVELS]
    if not curves:
        return
    points = [point for chart in curves for point in chart.curves[0].points]
    ends = [end for point in points for end in (point.y, *(point.y_interval or ()))]
    slack = max(max(ends) - min(ends), 0.02 * abs(max(ends)), 1e-12) * 0.05
    up = Axis(title=title, span=(min(ends) - slack, max(ends) + slack))
    yield ChartGroup(title=title, charts=tuple(dataclasses.replace(chart, up=up) for chart in curves))


def _loss_charts(variants: SeriesByVariant) -> Iterator[ChartGroup]:
    """The median over replicates at each step."""
    losses = {name: steps for name, series in variants.items() if len(steps := _losses_by_step(series)) >= MIN_STEPS}
    curves = [
        Curve(
            name=name,
            points=tuple(Point(x=number, y=statistics.median(step)) for number, step in enumerate(steps, start=1)),
        )
        for name, steps in list(losses.items())[:MAX_CURVES]
    ]
    charts = [Chart(across=Axis(title=curve.name), up=Axis(title=""), curves=(curve,)) for curve in curves]
    more = len(losses) - len(charts)
    notes = (to_line(f"and {more} more; --variant shows one"),) if more else ()
    for gallery in _gallery("loss by step, median of the replicates", charts):
        yield dataclasses.replace(gallery, notes=notes, on_page=False)


def _losses_by_step(series: Series) -> list[tuple[float, ...]]:
    """The losses at each step, for trials that trained all steps: isolated trials and truncated trainings end earlier
    and are left out."""
    records = series.measuring("timed_loss")
    curves = [losses_of_steps(record) for record in records]
    most = max(map(len, curves), default=0)
    return list(zip(*(losses for losses in curves if len(losses) == most), strict=True))


def _draw_front(
    variants: SeriesByVariant,
    across: str,
    up: str,
    title: str,
    caption: str,
    prompts: Mapping[str, float] | None = None,
) -> Figure | None:
    """The variants that have both metrics, with the Pareto front joined; None with fewer than two variants. `prompts`
    becomes a column of the table."""
    xs, ys = _estimates(variants, across), _estimates(variants, up)
    names = [name for name in xs if name in ys]
    if len(names) < 2:
        return None
    x_sign, y_sign = (-1 if METRICS[metric].higher_is_better else 1 for metric in (across, up))
    costs = {name: (x_sign * xs[name][0], y_sign * ys[name][0]) for name in names}
    dominated = {
        name
        for name, (x, y) in costs.items()
        if any(other[0] <= x and other[1] <= y and other != (x, y) for other in costs.values())
    }
    curves = tuple(
        Curve(
            name=name,
            points=(
                Point(x=xs[name][0], y=ys[name][0], x_interval=_interval(xs[name]), y_interval=_interval(ys[name])),
            ),
            hollow=name in dominated,
        )
        for name in names
    )
    rows = (
        write_row(
            name,
            *([write_number(prompts[name])] if prompts else []),
            value_cell(*xs[name], METRICS[across].unit),
            value_cell(*ys[name], METRICS[up].unit),
            "no" if name in dominated else "yes",
        )
        for name in names
    )
    best = sorted((curve.points[0].x, curve.points[0].y) for curve in curves if not curve.hollow)
    corners = [corner for (x, y), (right, _) in pairwise(best) for corner in ((x, y), (right, y))]
    axes = [Axis(title=METRICS[metric].title, unit=METRICS[metric].unit) for metric in (across, up)]
    titles = [*(["prompts"] if prompts else []), *(axis.title for axis in axes), "on the front"]
    front = tuple(Point(x=x, y=y) for x, y in (*corners, *best[-1:]))
    return Figure(
        title=title,
        caption=f"{caption} The dashed line joins the variants that no other beats in both by its estimate; "
        "where intervals overlap the order is open.",
        drawing=Chart(across=axes[0], up=axes[1], curves=curves, style="dots", front=front),
        table=Table(heads=name_columns("variant", *titles), rows=tuple(rows)),
    )


def _draw_serving(variants: SeriesByVariant) -> Figure | None:
    """Throughput and latency of variants whose requests have different numbers of prompts; None if all have one
    prompt."""
    prompts = {name: max(one.values.get("request_batch", 1.0) for one in series.measuring(LATENCY))
               for name, series in variants.items() if series.measuring(LATENCY)}  # fmt: skip
    if len(set(prompts.values())) < 2:
        return None
    caption = (
        "Further left, each prompt gets its tokens sooner; further up, all prompts of a request together get more "
        "tokens per second."
    )
    return _draw_front(variants, LATENCY, THROUGHPUT, SERVING, caption, prompts)
