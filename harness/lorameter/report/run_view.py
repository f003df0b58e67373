"""The view model of a run: what every renderer shows, decided once.

A table for each phase, or for each metric that was asked for; the control that says what no difference looks like here,
the notices with their remedies. No number without its interval; a trial that is not ok is named with its status and
reason, and is in no estimate. `encode_run` writes the view as the JSON document that programs read.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import msgspec

from lorameter.errors import UsageError
from lorameter.records import codec
from lorameter.records.metrics import METRICS, PEAKS, PHASES, Phase, columns_of
from lorameter.records.record import Notice
from lorameter.records.store import Run
from lorameter.records.time_breakdown import TimeBreakdown
from lorameter.report.blocks import Line
from lorameter.report.charts import add_charts
from lorameter.report.facts import facts_of
from lorameter.report.phase_table import PEAK, RATIO, TAILS, PhaseTable, VariantRow, tabulate_metric, tabulate_phase
from lorameter.studies.from_run import read_study
from lorameter.studies.study import Study, unknown
from lorameter.verdicts.compare import LimitsOf, default_limits, matching
from lorameter.verdicts.comparison_input import is_memory
from lorameter.verdicts.notices import notices_of
from lorameter.verdicts.series import Groups, group_trials
from lorameter.verdicts.sites import is_mixed, join_notices, runs_of_sites, say_machines, unmeasured_sites
from lorameter.verdicts.validity import Fault, RunValidity, is_single_script_run, run_validity, say_faults

Sort = Literal["study", "name", "ratio", "value", "memory"]
SORTS: tuple[Sort, ...] = get_args(Sort)
"""In which order variants stand: that of the study, by name, by ratio to the reference, by estimate, by peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFilter:
    """What a report of a run shows; everything by default."""

    metrics: tuple[str, ...] = ()
    """Names or patterns: a table of each of these in place of those of the phases."""
    variants: tuple[str, ...] = ()
    """Names or patterns of variants, in addition to the reference."""
    phases: tuple[str, ...] = ()
    sort: Sort = "study"
    limits_of: LimitsOf = default_limits
    """Tolerance and margin by variant and metric."""


EVERYTHING = ReportFilter()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """All that a report says of a run."""

    run: str
    path: str
    title: str
    facts: tuple[Line, ...]
    deviations: tuple[str, ...]
    """What differs from the study as it is written."""
    notes: tuple[str, ...]
    """What the study says of itself."""
    tables: tuple[PhaseTable, ...]
    outcomes: tuple[PhaseTable, ...]
    """Peak memory and loss of the variants, each with its verdicts; empty where single metrics were asked for."""
    variants: tuple[str, ...]
    """Names of those that are shown, in the order of the study."""
    phases: tuple[Phase, ...]
    """Those that are shown whole: none where single metrics were asked for."""
    failures: tuple[str, ...]
    notices: tuple[Notice, ...]
    counts: dict[str, int]
    state: str
    """State of the run: complete, running, killed, interrupted or failed."""
    faults: tuple[Fault, ...]
    """Why the run is invalid, so that no verdict counts; empty where it is valid."""
    spending: TimeBreakdown | None = None
    """What its time went to, where it says so."""

    @property
    def valid(self) -> bool:
        """Whether its verdicts count."""
        return not self.faults

    @property
    def invalid(self) -> str | None:
        """The first few of its faults; None where it is valid."""
        return say_faults(self.faults) or None


def view_of(run: Run, asked: ReportFilter = EVERYTHING) -> RunView:
    """The view of a run. Raises nothing for missing trials: what is not there is said.

    Raises:
        UsageError: a variant, metric or phase was asked for that the run does not know.
    """
    study = read_study(run)
    if is_mixed(run):
        return _view_of_sites(run, study, asked)
    groups = group_trials(run.records)
    validity, names = run_validity(run, study), _names(study, asked)
    tables = _tables(run, study, groups, validity, asked)
    return RunView(
        run=run.manifest.run,
        path=str(run.path),
        title=study.title,
        facts=facts_of(run, study),
        deviations=study.deviations,
        notes=study.notes,
        tables=tuple(_chosen(table, names, asked.sort) for table in tables),
        outcomes=tuple(_chosen(table, names, asked.sort) for table in _outcomes(run, study, groups, validity, asked)),
        variants=tuple(names),
        phases=() if asked.metrics else tuple(table.phase for table in tables),
        failures=validity.failures,
        notices=notices_of(run, study, validity.controls),
        counts=dict(Counter(record.status for record in run.records)),
        state=run.state,
        faults=validity.faults,
        spending=run.manifest.spending,
    )


def _view_of_sites(run: Run, study: Study, asked: ReportFilter) -> RunView:
    """What each site says, side by side, and of all of them what is no number."""
    validity = run_validity(run, study)
    views = {site: view_of(part, asked) for site, part in runs_of_sites(run).items()}
    tables = [
        replace(table, site=site, title=f"{table.title} on {site}") for site in views for table in views[site].tables
    ]
    machines = say_machines(run.records)
    manifest = msgspec.structs.replace(run.manifest, provenance={**run.manifest.provenance, "device_name": machines})
    return RunView(
        run=run.manifest.run,
        path=str(run.path),
        title=study.title,
        facts=facts_of(replace(run, manifest=manifest), study),
        deviations=study.deviations,
        notes=study.notes,
        tables=tuple(tables),
        outcomes=(),
        variants=tuple(_names(study, asked)),
        phases=tuple(dict.fromkeys(phase for view in views.values() for phase in view.phases)),
        failures=(*validity.failures, *unmeasured_sites(run)),
        notices=join_notices(run, {site: view.notices for site, view in views.items()}),
        counts=dict(Counter(record.status for record in run.records)),
        state=run.state,
        faults=validity.faults,
    )


def _tables(run: Run, study: Study, groups: Groups, validity: RunValidity, asked: ReportFilter) -> list[PhaseTable]:
    phases = [phase for phase in validity.controls if not asked.phases or phase in asked.phases]
    if absent := [phase for phase in asked.phases if phase not in validity.controls]:
        raise UsageError(f"phase {absent[0]!r}: run {run.manifest.run} has {', '.join(validity.controls) or 'none'}.")
    if not asked.metrics:
        tables = [
            tabulate_phase(phase, validity.primary[phase], validity, run, study, groups, asked.limits_of)
            for phase in phases
        ]
        return [add_charts(table, _of(study, asked), groups) for table in tables]
    known = _measured(run, groups)
    for pattern in asked.metrics:
        if not fnmatch.filter(known, pattern):
            near = difflib.get_close_matches(pattern, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Measured: {', '.join(known) or 'nothing'}."
            raise UsageError(f"metric {pattern!r}: run {run.manifest.run} has none of that name. {hint}")
    chosen = [(metric, phase_of(metric)) for metric in matching(known, asked.metrics)]
    return [
        tabulate_metric(metric, phase, validity, run, study, groups, asked.limits_of)
        for metric, phase in chosen
        if not asked.phases or phase in phases
    ]


def _outcomes(
    run: Run, study: Study, groups: Groups, validity: RunValidity, asked: ReportFilter
) -> Iterator[PhaseTable]:
    """The peak memory of the first phase, and the last loss that was measured, as tables of one metric."""
    phases = [phase for phase in validity.controls if not asked.phases or phase in asked.phases]
    reference = groups.get((study.reference, "variant"))
    if asked.metrics or not phases or reference is None or is_single_script_run(run, study):
        return
    phase = phases[0]
    kinds = [kind for kind in PEAKS[phase] if any(kind in record.memory for record in reference.ok)]
    losses = [name for name in columns_of(phase, own_workloads=bool(run.manifest.own_workloads))
              if METRICS[name].is_loss and reference.trials(name)]  # fmt: skip
    for metric in (*kinds[:1], *losses[-1:]):
        yield tabulate_metric(metric, phase, validity, run, study, groups, asked.limits_of)


def _measured(run: Run, groups: Groups) -> list[str]:
    """Every metric and kind of memory of the run, in the order of the metrics."""
    metrics = [name for name in METRICS if any(series.measuring(name) for series in groups.values())]
    kinds = dict.fromkeys(kind for record in run.records for kind in record.memory if is_memory(kind))
    return [*metrics, *sorted(kinds)]


def phase_of(metric: str) -> Phase:
    """The phase of a metric or a kind of memory."""
    if metric in METRICS:
        return METRICS[metric].phase
    return next((phase for phase in PHASES if metric in PEAKS[phase] or f"_{phase}_" in metric), "train")


def _of(study: Study, asked: ReportFilter) -> Study:
    """The study with the variants that are shown, which its charts are of."""
    names = _names(study, asked)
    if len(names) == len(study.variants):
        return study
    return replace(study, variants=tuple(one for one in study.variants if one.name in names), claims=(), engine=None)


def _names(study: Study, asked: ReportFilter) -> list[str]:
    """The variants that are shown; the reference always."""
    names = [variant.name for variant in study.variants]
    for pattern in asked.variants:
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"variant {pattern!r}: {unknown(pattern, names)}")
    chosen = matching(names, asked.variants) if asked.variants else names
    return [name for name in names if name in chosen or name == study.reference]


def _chosen(table: PhaseTable, names: Collection[str], sort: Sort) -> PhaseTable:
    """The table with the rows that are shown, in the order asked for; rows without a value come last."""
    rows = [row for row in table.rows if row.name in names]
    keys = {"ratio": RATIO, "value": table.metric, "memory": PEAK}
    if sort == "name":
        rows.sort(key=lambda row: row.name)
    elif sort in keys:
        places = [place for place, column in enumerate(table.columns) if column.key == keys[sort]]
        rows.sort(key=lambda row: _rank(row, places, by_ratio=sort == "ratio"))
    return replace(table, rows=tuple(rows))


def _rank(row: VariantRow, places: Sequence[int], *, by_ratio: bool) -> tuple[bool, float]:
    value = row.cells[places[0]].value if places else None
    if by_ratio and row.reference:
        value = 1.0
    return value is None, value or 0.0


def encode_run(view: RunView) -> dict[str, Any]:
    """The view as JSON data, without its `schema`."""
    return {
        "run": view.run,
        "valid": view.valid,
        "invalid": view.invalid,
        "faults": codec.to_json(view.faults),
        "path": view.path,
        "title": view.title,
        "facts": [f"{fact.label:<10}{fact.text}" for fact in view.facts],
        "deviations": list(view.deviations),
        "notes": list(view.notes),
        "tables": [_encoded(table) for table in view.tables],
        "failures": list(view.failures),
        "notices": codec.to_json(view.notices),
        "counts": view.counts,
        "state": view.state,
        **encode_spending(view.spending),
    }


def encode_spending(spending: TimeBreakdown | None) -> dict[str, Any]:
    """The same for programs, as `time`; nothing of a run that does not say it."""
    if spending is None:
        return {}
    return {
        "time": {
            "limit_s": spending.limit_s,
            "wall_s": spending.wall_s,
            "measured_s": dict(spending.measured_s),
            "measured_share": spending.share,
            "turns": list(spending.turns),
        }
    }


def _encoded(table: PhaseTable) -> dict[str, Any]:
    """A table, each cell as a line of text and, where it is a number, as numbers in base units."""
    return {
        "phase": table.phase,
        "title": table.title,
        "metric": table.metric,
        "heads": list(table.heads),
        "rows": [
            {
                "name": row.name,
                "reference": row.reference,
                "cells": [cell.line for cell in row.cells],
                "ratio": codec.to_json(row.ratio),
                "values": dict(_numbers(table, row)),
            }
            for row in table.rows
        ],
        "control": codec.to_json(table.control),
        "note": table.note,
        **({"alone": True} if table.alone else {}),
        **({"site": table.site} if table.site else {}),
    }


def _numbers(table: PhaseTable, row: VariantRow) -> Iterable[tuple[str, dict[str, float | None]]]:
    """Value and interval of each cell that is a number, under a name that ends in its unit."""
    for column, cell in zip(table.columns, row.cells, strict=True):
        if cell.value is not None and column.key != RATIO:
            key = table.metric.removesuffix("_s") + "_p95_s" if column.key == TAILS else column.key
            yield key, {"value": cell.value, "low": cell.low, "high": cell.high}
