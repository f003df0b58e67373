"""The figures of a comparison of two sides: each ratio with its interval, by the phase of its metric."""

from __future__ import annotations

from lorameter.records.metrics import METRICS, PHASE_TITLES
from lorameter.report.blocks import Table, name_columns, write_ratio, write_row
from lorameter.report.curves import Axis
from lorameter.report.figure import Figure, Intervals, Mark
from lorameter.report.phrases import title_of_ratio
from lorameter.verdicts.comparison_report import ComparisonReport, ComparisonRow


def figures_of_comparison(report: ComparisonReport) -> tuple[Figure, ...]:
    """A figure a phase; ratios that could not be computed are in none."""
    by_phase: dict[str, list[ComparisonRow]] = {}
    for compared in report.comparisons:
        if compared.ratio is not None:
            known = METRICS.get(compared.metric)
            by_phase.setdefault("Others" if known is None else PHASE_TITLES[known.phase], []).append(compared)
    return tuple(_figure(title, found) for title, found in by_phase.items())


def _figure(title: str, found: list[ComparisonRow]) -> Figure:
    marks = tuple(
        Mark(
            name=f"{one.name}, {title_of_ratio(one.metric)}", value=one.ratio, low=one.low,
            high=one.high, verdict=one.verdict,
        )
        for one in found
        if one.ratio is not None
    )  # fmt: skip
    rows = tuple(
        write_row(one.name, title_of_ratio(one.metric), write_ratio(one, verdict=one.verdict)) for one in found
    )
    return Figure(
        title=f"{title}: candidate / base",
        says="A dot is the candidate's value as a multiple of the base's, the line through it its interval; right of "
        "1 is worse.",
        drawing=Intervals(axis=Axis(title="candidate / base; right of 1 is worse", line_at=1.0), marks=marks),
        table=Table(heads=name_columns("variant", "metric", "candidate / base", left=2), rows=rows),
    )
