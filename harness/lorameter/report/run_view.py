"""The content of a run's report, computed once: a table for each phase or metric, validity and notices.

Every number has its interval. A trial that is not ok is listed with its status and reason, and excluded from all
estimates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lorameter.errors import UsageError
from lorameter.records.metrics import METRICS, PEAKS, PHASE_TITLES, PHASES, RSS_AT_START, Phase, phase_columns
from lorameter.records.record import Interleaving, Notice
from lorameter.records.store import Run
from lorameter.records.units import format_bytes
from lorameter.report.blocks import Cell, ColumnHeader, Row, Table, value_cell, write_ratio
from lorameter.report.phrases import metric_title, verdict_cell
from lorameter.stats import Comparison, Estimate
from lorameter.studies.study import Study
from lorameter.studies.study_file import read_study
from lorameter.verdicts.compare import check_patterns, match_patterns
from lorameter.verdicts.notices import collect_notices
from lorameter.verdicts.same_training import sides_of_run
from lorameter.verdicts.series import (
    Groups,
    LimitsOf,
    Series,
    compare_control,
    default_limits,
    group_trials,
    is_memory,
    list_ratios,
    occupancies,
)
from lorameter.verdicts.sites import is_mixed, join_notices, runs_of_sites
from lorameter.verdicts.validity import RunValidity, is_single_script_run, mark_invalid, run_validity

Sort = Literal["study", "name", "ratio", "value", "memory"]
"""The order of the variants: as in the study, or by name, ratio to the reference, estimate, or peak memory."""
TAIL = 0.95
"""The high percentile of warm requests that is shown if there are enough samples."""
PEAK = "peak_memory_bytes"
CPU_TIME = "step_cpu_time_s"
ALL_ACTIVE = "all active"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFilter:
    """The selection that a report shows; everything by default."""

    metrics: tuple[str, ...] = ()
    """Names or patterns: one table for each matching metric instead of the tables of the phases."""
    variants: tuple[str, ...] = ()
    """Names or patterns of variants, in addition to the reference."""
    phases: tuple[str, ...] = ()
    sort: Sort = "study"
    limits_of: LimitsOf = default_limits
    """Tolerance and margin by variant and metric."""


EVERYTHING = ReportFilter()


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTable:
    """One phase or metric: a row for each variant with its ratio to the reference, and the control."""

    phase: Phase
    metric: str
    """The metric by which variants are compared."""
    table: Table
    ratios: Mapping[str, Comparison]
    """The ratio of each shown variant except the reference, in row order."""
    checks: Mapping[str, str]
    """For each shown variant, whether its required paths were active; empty in the table of a metric."""
    control: Comparison | None
    """The reference compared with its second measurement."""
    interleaving: Interleaving | None
    """Interleaving of the trials that measured the metric."""
    note: str
    """A note on the peaks; may be empty."""
    site: str = ""
    """The site, if sites have different hardware; the title also names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run with all computed content of its report."""

    run: Run
    study: Study
    validity: RunValidity
    notices: tuple[Notice, ...]
    tables: tuple[PhaseTable, ...]
    outcomes: tuple[PhaseTable, ...]
    """Tables of peak memory and loss with their verdicts; empty if single metrics were selected."""
    variants: tuple[str, ...]
    """Names of the shown variants, in the order of the study."""
    phases: tuple[Phase, ...]
    """The phases that are shown completely; empty if single metrics were selected."""

    @property
    def valid(self) -> bool:
        """Whether its verdicts count."""
        return self.validity.valid

    @property
    def alone(self) -> bool:
        """Whether the run contains a single training without a comparison."""
        return is_single_script_run(self.run, self.study)

    @property
    def counts(self) -> dict[str, int]:
        """The number of trials by status."""
        return dict(Counter(record.status for record in self.run.records))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The data of a run's tables."""

    run: Run
    study: Study
    validity: RunValidity
    groups: Groups
    names: tuple[str, ...]
    selection: ReportFilter

    @property
    def shown(self) -> list[Series]:
        return [self.groups[name, "variant"] for name in self.names if (name, "variant") in self.groups]

    @property
    def phases(self) -> list[Phase]:
        return [phase for phase in self.validity.controls if phase in (self.selection.phases or PHASES)]


def make_run_view(run: Run, selection: ReportFilter = EVERYTHING) -> RunView:
    """The view of a run; trials may be missing.

    Raises:
        UsageError: a variant, metric or phase is selected that the run does not have.
    """
    study = read_study(run)
    validity, known = run_validity(run, study), [variant.name for variant in study.variants]
    check_patterns("variant", known, selection.variants)
    chosen = {study.reference, *match_patterns(known, selection.variants or ["*"])}
    names = tuple(name for name in known if name in chosen)
    if is_mixed(run):
        views = {site: make_run_view(part, selection) for site, part in runs_of_sites(run).items()}
        tables = [
            replace(table, site=site, table=replace(table.table, title=f"{table.table.title} on {site}"))
            for site, view in views.items()
            for table in view.tables
        ]
        outcomes: list[PhaseTable] = []
        phases = [phase for phase in PHASES if any(phase in view.phases for view in views.values())]
        notices = join_notices(run, {site: view.notices for site, view in views.items()})
    else:
        groups = group_trials(run.records)
        source = _Source(run=run, study=study, validity=validity, groups=groups, names=names, selection=selection)
        tables, outcomes = list(_tables(source)), list(_outcomes(source))
        phases = [] if selection.metrics else source.phases
        notices = collect_notices(run, study, validity.controls)
    return RunView(
        run=run,
        study=study,
        validity=validity,
        notices=notices,
        tables=tuple(tables),
        outcomes=tuple(outcomes),
        variants=names,
        phases=tuple(phases),
    )


def _tables(source: _Source) -> Iterator[PhaseTable]:
    run, controls, selection = source.run.manifest.run, source.validity.controls, source.selection
    if absent := [phase for phase in selection.phases if phase not in controls]:
        raise UsageError(f"phase {absent[0]!r}: run {run} has {', '.join(controls) or 'none'}.")
    metrics = [name for name in METRICS if any(series.measuring(name) for series in source.groups.values())]
    known = [*metrics, *sorted({kind for one in source.run.records for kind in one.memory if is_memory(kind)})]
    check_patterns("metric", known, selection.metrics)
    for metric in match_patterns(known, selection.metrics):
        if metric_phase(metric) in (selection.phases or PHASES):
            yield _tabulate_metric(source, metric_phase(metric), metric)
    for phase in source.phases if not selection.metrics else ():
        metric = source.validity.primary[phase]
        yield _tabulate(source, phase, metric, controls[phase], whole=True)


def metric_phase(metric: str) -> Phase:
    """The phase of a metric or a kind of memory."""
    if metric in METRICS:
        return METRICS[metric].phase
    return next((phase for phase in PHASES if metric in PEAKS[phase] or f"_{phase}_" in metric), "train")


def _outcomes(source: _Source) -> Iterator[PhaseTable]:
    """Tables for the peak memory of the first phase and for the last measured loss."""
    reference = source.groups.get((source.study.reference, "variant"))
    if (
        source.selection.metrics
        or not source.phases
        or reference is None
        or is_single_script_run(source.run, source.study)
    ):
        return
    phase = source.phases[0]
    kinds = [kind for kind in PEAKS[phase] if _sizes(reference, kind)]
    columns = phase_columns(phase, own_workloads=bool(source.run.manifest.own_workloads))
    losses = [name for name in columns if METRICS[name].is_loss and reference.trials(name)]
    for metric in (*kinds[:1], *losses[-1:]):
        yield _tabulate_metric(source, phase, metric)


def _tabulate_metric(source: _Source, phase: Phase, metric: str) -> PhaseTable:
    """A table of one metric or kind of memory, with its own control."""
    control = compare_control(source.groups, source.study.reference, metric, family=1)
    return _tabulate(source, phase, metric, control, whole=False)


def _tabulate(source: _Source, phase: Phase, metric: str, control: Comparison | None, *, whole: bool) -> PhaseTable:
    """A table of a phase: its primary metric and (with `whole`) all other metrics that are columns of it."""
    reference, shown = source.study.reference, source.shown
    compared = list_ratios(source.groups, source.study, metric, control, source.selection.limits_of)
    ratios = {name: mark_invalid(one, source.validity.invalid) for name, one in compared.items()}
    columns = list(_columns(source, phase, metric, ratios, whole=whole))
    heads = tuple(head for head, _ in columns)
    lines = zip(*(cells for _, cells in columns), strict=True)
    rows = [Row(cells=cells, strong=cells[0].text == reference) for cells in lines]
    rows = _sort(rows, heads, {"value": metric, "memory": PEAK}.get(source.selection.sort, source.selection.sort))
    title = PHASE_TITLES[phase] if whole else f"{PHASE_TITLES[phase]}: {metric_title(metric)}"
    base = source.groups.get((reference, "variant"))
    return PhaseTable(
        phase=phase,
        metric=metric,
        table=Table(title=title, heads=heads, rows=tuple(rows)),
        ratios={name: ratios[name] for name in (row.cells[0].text for row in rows) if name in ratios},
        checks={series.name: _checks(series) for series in shown} if whole else {},
        control=control,
        interleaving=None if base is None or is_memory(metric) else base.interleaving(metric),
        note=_baseline_note(shown, phase) if whole else "",
    )


_Column: TypeAlias = tuple[ColumnHeader, list[Cell]]


def _columns(
    source: _Source, phase: Phase, metric: str, ratios: Mapping[str, Comparison], *, whole: bool
) -> Iterator[_Column]:
    """The columns in order, the most important one on the left."""
    shown, reference = source.shown, source.study.reference
    yield ColumnHeader(text="variant", key="name"), [Cell(text=series.name) for series in shown]
    if not is_single_script_run(source.run, source.study):
        turned = "slow-down " if metric in METRICS and METRICS[metric].higher_is_better else ""
        head = ColumnHeader(text=f"{turned}× {reference}", key="ratio", right=True, ratio=True)
        own = {reference: Cell(text="reference")}
        own |= {name: write_ratio(found) for name, found in ratios.items()}
        yield head, [own.get(series.name, Cell(text="–")) for series in shown]
        words = {
            name: verdict_cell(found, metric, "variants", source.selection.limits_of(name, metric))
            for name, found in ratios.items()
        }
        yield ColumnHeader(text="verdict", joins_left=True), [words.get(series.name, Cell()) for series in shown]
    yield _metric_column(shown, metric, priority=0)
    if not whole:
        return
    others = list(_other_metrics(source, phase))
    if CPU_TIME in others:
        others.remove(CPU_TIME)
        yield _metric_column(shown, CPU_TIME, priority=4)
    if PEAKS[phase]:
        yield _peak_column(shown, phase)
    checks = [Cell(text=_checks(series)) for series in shown]
    yield ColumnHeader(text="required paths", drop_priority=1, collapse_if_constant=True), checks
    for place, name in enumerate(others):
        yield _metric_column(shown, name, priority=3 if name == "tokens_per_s" else 6 + place)
    tails = [series.percentile(metric, TAIL) if phase == "generate" else None for series in shown]
    if any(tails):
        key = f"{metric.removesuffix('_s')}_p{100 * TAIL:g}_s"
        head = ColumnHeader(text=f"p{100 * TAIL:g}", key=key, right=True, drop_priority=20, collapse_if_constant=True)
        yield head, [_estimate_cell(tail, metric, absent="not supported") for tail in tails]


def _other_metrics(source: _Source, phase: Phase) -> Iterator[str]:
    """The metrics of a phase that at least one variant has, except the primary one."""
    names = phase_columns(phase, own_workloads=bool(source.run.manifest.own_workloads))
    sides = sides_of_run(source.run, source.study) if source.study.of_scripts else {}
    if any(side.tokens_differ for side in sides.values()):
        names += ("time_per_real_token_s",)
    on_cpu = phase == "train" and source.run.manifest.provenance.get("device") == "cpu"
    if on_cpu and occupancies(record for series in source.shown for record in series.ok)[1]:
        names = (CPU_TIME, *names)
    yield from (name for name in names if any(series.trials(name) for series in source.shown))


def _metric_column(shown: Sequence[Series], metric: str, *, priority: int) -> _Column:
    head = ColumnHeader(text=metric_title(metric), key=metric, right=True, drop_priority=priority)
    if is_memory(metric):
        return head, [_size_cell(_sizes(series, metric)) for series in shown]
    return head, [_estimate_cell(series.estimate(metric), metric) for series in shown]


def _estimate_cell(found: Estimate | None, metric: str, *, absent: str = "–") -> Cell:
    if found is None:
        return Cell(text=absent)
    return value_cell(found.value, found.low, found.high, METRICS[metric].unit)


def _peak_column(shown: Sequence[Series], phase: Phase) -> _Column:
    """The largest peak of each variant; the header names the kind of memory, or each cell does if the kinds differ."""
    kinds = [_peak_kind(series, phase) for series in shown]
    places = {kind: "GPU" if kind.startswith("device") else "host" for kind in kinds if kind}
    where = set(places.values())
    head = f"peak memory, {min(where)}" if len(where) == 1 else "peak memory"
    cells = [
        _size_cell(_sizes(series, kind), places[kind] if len(where) > 1 else "") if kind else Cell(text="–")
        for series, kind in zip(shown, kinds, strict=True)
    ]
    return ColumnHeader(text=head, key=PEAK, right=True, drop_priority=2), cells


def _peak_kind(series: Series, phase: Phase) -> str:
    """The kind of memory whose peaks a phase shows; empty if none was measured."""
    return next((kind for kind in PEAKS[phase] if _sizes(series, kind)), "")


def _sizes(series: Series, kind: str) -> list[int]:
    return [record.memory[kind] for record in series.ok if kind in record.memory]


def _size_cell(sizes: Sequence[int], where: str = "") -> Cell:
    """The largest size, with the range as its interval."""
    return value_cell(max(sizes), min(sizes), max(sizes), "byte", detail=where) if sizes else Cell(text="–")


def _baseline_note(shown: Sequence[Series], phase: Phase) -> str:
    """Memory of each process at its start, which host peaks include: a forked process maps its parent's imports."""
    on_host = [series for series in shown if _peak_kind(series, phase).startswith("host")]
    baselines = [size for series in on_host for size in _sizes(series, RSS_AT_START)]
    if not baselines:
        return ""
    low, high = format_bytes(min(baselines)), format_bytes(max(baselines))
    return f"host peaks include the process baseline (RSS at start) of {high if low == high else f'{low} to {high}'}"


def _checks(series: Series) -> str:
    """The required paths that were not active, as text, or a statement that all were active."""
    checks = [check for record in series.records for check in record.checks]
    required = [check for check in checks if check["required"] is not None]
    if not required:
        return "nothing required" if checks else "not checked"
    missed = {f"{check['path']} {check['status']}" for check in required if check["status"] != "active"}
    return ", ".join(sorted(missed)) or ALL_ACTIVE


def _sort(rows: list[Row], heads: Sequence[ColumnHeader], key: str) -> list[Row]:
    """Sort the rows by the column with this key; rows without a value come last."""
    place = next((place for place, head in enumerate(heads) if head.key == key), None)
    if place is None:
        return rows

    def rank(row: Row) -> tuple[bool, float, str]:
        cell = row.cells[place]
        value = 1.0 if key == "ratio" and row.strong else cell.value
        return value is None, value or 0.0, cell.text if key == "name" else ""

    return sorted(rows, key=rank)
