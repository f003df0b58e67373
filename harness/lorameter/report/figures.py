"""The figures of a run in addition to its charts: ratios, losses, memory, cold starts, two measures at once, samples,
checks.

Each is left out where a run holds nothing for it. Every number of a figure is one that the terminal's report or the
records have; nothing is smoothed.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from kernels_check.check import Status
from lorameter.records.metrics import PEAKS, RSS_AT_START
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import first_few, format_bytes, format_value
from lorameter.report.blocks import Axis, Cell, Curve, Curves, Row, Table, Tone, name_columns, value_cell, write_row
from lorameter.report.charts import draw_serving, losses_by_step, measure_both, tabulate_front
from lorameter.report.figure import (
    Bar,
    Bars,
    BarSegment,
    Figure,
    FigureCheck,
    Intervals,
    Mark,
    Matrix,
    Samples,
    Stretch,
)
from lorameter.report.phase_table import PhaseTable
from lorameter.report.phrases import title_of_ratio
from lorameter.report.run_view import RunView
from lorameter.studies.from_run import read_own_workloads, read_study
from lorameter.studies.workload import OF_TOKENS
from lorameter.verdicts.series import Series, group_trials

Shown = Mapping[str, Series]
"""The trials of each variant, in the order of the study."""
HELD = {
    "base_weight_bytes": "base weights",
    "quantization_state_bytes": "quantisation constants",
    "adapter_bytes": "adapter",
    "gradient_bytes": "gradients",
    "optimizer_state_bytes": "optimizer state",
}
"""Kinds of memory that a step keeps, which do not overlap, and what they are called."""
MOST_NAMED = 3
"""Of variants that a figure leaves out."""
COMPARED_LOSSES = ("held_out_loss", "timed_loss")
"""What a variant has learnt; the first that was measured is drawn."""
COLD = {
    "cold_import_time_s": "import",
    "cold_load_time_s": "load",
    "cold_first_token_time_s": "first token",
    "cold_completion_time_s": "the other tokens",
}


def figures_of_run(run: Run, view: RunView) -> tuple[Figure, ...]:
    """All figures that the run has something for, in the order in which they are read: of the variants that the view
    shows, and next to its ratios of the phases that it shows whole."""
    groups = group_trials(run.records)
    shown = {name: groups[name, "variant"] for name in view.variants if (name, "variant") in groups}
    whole = {table.phase: table.metric for table in view.tables if table.phase in view.phases}
    found = [_ratios(table) for table in (*view.tables, *view.outcomes)]
    if "train" in whole:
        found += [_losses(shown), _memory(shown), _front(shown, whole["train"], _of_another_loss(run))]
        found += [_samples([record for record in run.records if record.name in shown])]
    if "generate" in whole:
        found += [draw_serving(shown)]
    if "cold" in whole:
        found += [_cold(shown)]
    if whole:
        found += [checks_matrix(shown)]
    return tuple(figure for figure in found if figure is not None)


def _of_another_loss(run: Run) -> set[str]:
    """Variants whose losses are those of other tokens than the study's."""
    own = read_own_workloads(run)
    common = read_study(run).workload if own else None
    return {name for name, one in own.items() if any(getattr(one, key) != getattr(common, key) for key in OF_TOKENS)}


def _ratios(table: PhaseTable) -> Figure | None:
    found = [(row.name, row.ratio) for row in table.rows if row.ratio is not None and row.ratio.ratio is not None]
    if not found:
        return None
    reference = next((row.name for row in table.rows if row.reference), "the reference")
    marks = tuple(
        Mark(name=name, value=one.ratio, low=one.low, high=one.high, verdict=one.verdict)
        for name, one in found
        if one.ratio is not None
    )
    about = f"{title_of_ratio(table.metric)}{f' on {table.site}' if table.site else ''} × {reference}"
    axis = Axis(title="right of 1 is worse", line_at=1.0)
    return Figure(
        title=about[:1].upper() + about[1:],
        says="A dot is the ratio of a variant to the reference, the line through it its interval.",
        drawing=Intervals(axis=axis, marks=marks),
        table=_of_marks("variant", axis, marks),
    )


def _losses(shown: Shown) -> Figure | None:
    curves, rows = [], []
    for name, series in shown.items():
        steps = losses_by_step(series)
        if len(steps) < 2:
            continue
        points = tuple((step, statistics.median(found)) for step, found in enumerate(steps, start=1))
        band = tuple((step, min(found), max(found)) for step, found in enumerate(steps, start=1))
        curves.append(Curve(name=name, points=points, band=band if len(steps[0]) > 1 else ()))
        ends = [Cell(text=f"{value:.4g}", value=value) for value in (points[0][1], points[-1][1])]
        rows.append(write_row(name, str(len(steps[0])), str(len(steps)), *ends))
    if not curves:
        return None
    return Figure(
        title="Losses of all variants",
        says="The training loss by step, the median of the replicates; the band is from the lowest to the highest of "
        "them.",
        drawing=Curves(across=Axis(title="step"), up=Axis(title="training loss"), curves=tuple(curves)),
        table=Table(heads=name_columns("variant", "replicates", "steps", "first", "last"), rows=tuple(rows)),
    )


def _memory(shown: Shown) -> Figure | None:
    bars = tuple(bar for name, series in shown.items() if (bar := _held(name, series)) is not None)
    if not bars:
        return None
    kinds = list(dict.fromkeys(part.kind for bar in bars for part in bar.parts))
    return Figure(
        title="Memory of training",
        says="What a step keeps, by kind, and what else its peak held (activations, work space, the process "
        "baseline); the median over replicates.",
        drawing=Bars(axis=Axis(title="memory", unit="byte"), bars=bars),
        table=_of_bars(bars, kinds, format_bytes),
    )


def _held(name: str, series: Series) -> Bar | None:
    of_kind = {kind: [record.memory[kind] for record in series.ok if kind in record.memory] for kind in HELD}
    parts = [
        BarSegment(kind=HELD[kind], value=statistics.median(found)) for kind, found in of_kind.items() if any(found)
    ]
    kind = next((kind for kind in PEAKS["train"] if any(kind in record.memory for record in series.ok)), None)
    if not parts or kind is None:
        return None
    peak = statistics.median(record.memory[kind] for record in series.ok if kind in record.memory)
    births = (
        [record.memory[RSS_AT_START] for record in series.ok if RSS_AT_START in record.memory]
        if kind.startswith("host")
        else []
    )
    if births:
        parts.insert(0, BarSegment(kind="process baseline", value=statistics.median(births)))
    rest = peak - sum(part.value for part in parts)
    return Bar(name=name, parts=(*parts, BarSegment(kind="rest of the peak", value=max(rest, 0.0))))


def _cold(shown: Shown) -> Figure | None:
    bars = []
    for name, series in shown.items():
        found = {kind: [s for samples in series.trials(metric) for s in samples] for metric, kind in COLD.items()}
        medians = {kind: statistics.median(samples) for kind, samples in found.items() if samples}
        if "first token" in medians and "the other tokens" in medians:  # a completion holds its first token
            medians["the other tokens"] = max(medians["the other tokens"] - medians["first token"], 0.0)
        if medians:
            bars.append(
                Bar(name=name, parts=tuple(BarSegment(kind=kind, value=value) for kind, value in medians.items()))
            )
    if not bars:
        return None
    return Figure(
        title="A cold start by phase",
        says="From a new interpreter to its first completion, piece after piece; the median of each over replicates.",
        drawing=Bars(axis=Axis(title="time", unit="s"), bars=tuple(bars)),
        table=_of_bars(bars, list(COLD.values()), lambda value: format_value(value, "s")),
    )


def _front(shown: Shown, cost: str, of_another_loss: set[str]) -> Figure | None:
    """Loss against what variants are compared by in training; None where one of them, or a second variant whose loss is
    that of the same tokens, is missing."""
    loss = next((metric for metric in COMPARED_LOSSES if any(one.trials(metric) for one in shown.values())), None)
    if loss is None:
        return None
    apart = sorted(of_another_loss & shown.keys())
    found = measure_both({name: series for name, series in shown.items() if name not in apart}, cost, loss)
    if found is None:
        return None
    return Figure(
        title="Loss against cost",
        says="To the left is faster, below is a lower loss after as many steps. The dashed stair joins the variants "
        "that no other beats in both by its estimate; where intervals overlap the order is open."
        + (f" Not drawn, since theirs are losses of other tokens: {first_few(apart, MOST_NAMED)}." if apart else ""),
        drawing=found.drawing,
        table=tabulate_front(found),
    )


def _samples(of: Sequence[TrialRecord]) -> Figure | None:
    records = [record for record in of if record.samples.get("step_time_s")]
    if not records:
        return None
    begin = min(record.started_unix_s for record in records)
    stretches = tuple(
        Stretch(
            name=record.name,
            began_s=record.started_unix_s - begin,
            ended_s=record.started_unix_s - begin + record.wall_time_s,
            samples=(*record.samples.get("warmup_step_time_s", ()), *record.samples["step_time_s"]),
        )
        for record in records
    )
    rows = tuple(_quartiles(record) for record in records)
    return Figure(
        title="Every step by time",
        says="Each dot is one step, warm-ups included, which shows drift and warm-up. Steps are spread evenly over "
        "the time of their trial: interleaved trials are above each other.",
        drawing=Samples(
            across=Axis(title="since the first trial", unit="s"), up=Axis(title="step time", unit="s"),
            stretches=stretches,
        ),
        table=Table(
            heads=name_columns("trial", "variant", "steps", "least", "quartile", "median", "quartile", "most", left=2),
            rows=rows,
        ),
    )  # fmt: skip


def _quartiles(record: TrialRecord) -> Row:
    samples = record.samples["step_time_s"]
    cuts = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    values = (min(samples), *cuts, max(samples))
    cells = (Cell(text=format_value(value, "s"), value=value) for value in values)
    return write_row(record.trial, record.name, str(len(samples)), *cells)


def _of_marks(head: str, axis: Axis, marks: Sequence[Mark]) -> Table:
    rows = (write_row(mark.name, _written(mark, axis), Cell(verdict=mark.verdict)) for mark in marks)
    return Table(heads=name_columns(head, axis.title, "verdict"), rows=tuple(rows))


def _written(mark: Mark, axis: Axis) -> Cell:
    return value_cell(mark.value, mark.low, mark.high, axis.unit)


def _of_bars(bars: Sequence[Bar], kinds: Sequence[str], write: Callable[[float], str]) -> Table:
    rows = []
    for bar in bars:
        held = {part.kind: part.value for part in bar.parts}
        cells = [Cell(text=write(held[kind]), value=held[kind]) if kind in held else Cell(text="–") for kind in kinds]
        total = sum(held.values())
        rows.append(write_row(bar.name, *cells, Cell(text=write(total), value=total)))
    return Table(heads=name_columns("variant", *kinds, "together"), rows=tuple(rows))


_STATUS_TONES: Mapping[Status, Tone] = {
    "fallback": "bad",
    "absent": "bad",
    "unknown": "warning",
    "not_applicable": "warning",
    "active": "good",
}
"""The colour of each status of a required path, the worst status first. Only `active` meets a requirement."""


def checks_matrix(shown: Mapping[str, Series]) -> Figure | None:
    """A row a path, a column a variant; None where nothing was checked."""
    checks = [check for series in shown.values() for record in series.records for check in record.checks]
    paths = dict.fromkeys(str(check["path"]) for check in checks)
    if not checks:
        return None
    rows = tuple((path, tuple(_evidence(series, path) for series in shown.values())) for path in paths)
    return Figure(
        title="Checks of the paths that ran",
        says="What kernels_check found of each path in each variant; a word opens its evidence.",
        drawing=Matrix(columns=tuple(shown), rows=rows),
        table=None,
    )


def _evidence(series: Series, path: str) -> FigureCheck | None:
    """All that was found of a path in a variant's trials, by the worst status."""
    found = [check for record in series.records for check in record.checks if check["path"] == path]
    if not found:
        return None
    worst = min((str(check["status"]) for check in found), key=_severity)
    observed = Counter(str(check["observed"]) for check in found if check["status"] == worst).most_common(1)[0][0]
    required = any(check["required"] is not None for check in found)
    counted = Counter(f"{check['status']}: {check['reason']}" for check in found)
    return FigureCheck(
        text=f"{worst}: {observed}" if observed not in ("", "None") else worst,
        tone=_STATUS_TONES.get(cast(Status, worst), "warning") if required else "plain",
        reasons=tuple(f"{reason} ({count} of {len(found)} trials)" for reason, count in counted.most_common()),
    )


def _severity(status: str) -> int:
    """The place of a status, the worst first; a status of a newer version counts as `unknown`."""
    order = list(_STATUS_TONES)
    return order.index(status if status in order else "unknown")
