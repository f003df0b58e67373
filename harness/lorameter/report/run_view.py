"""The content of a run's report, computed once: a table for each phase or metric, validity and notices.

Every number has its interval. A trial that is not ok is listed with its status and reason, and excluded from all
estimates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lorameter.errors import UsageError
from lorameter.measurements.metrics import (
    METRICS,
    PEAKS,
    PHASE_TITLES,
    PHASES,
    Phase,
    is_difference_metric,
    phase_columns,
)
from lorameter.measurements.peaks import RSS_AT_START
from lorameter.records.record import Notice
from lorameter.records.store import Run
from lorameter.records.units import format_bytes
from lorameter.report.blocks import Cell, ColumnHeader, Row, Table, value_cell, write_number, write_ratio
from lorameter.report.phrases import metric_title, verdict_cell
from lorameter.stats import Comparison, Estimate
from lorameter.studies.study import Study
from lorameter.studies.study_file import read_study
from lorameter.verdicts.compare import check_patterns, match_patterns
from lorameter.verdicts.notices import collect_notices, join_notices
from lorameter.verdicts.same_training import pair_scripts
from lorameter.verdicts.series import (
    Groups,
    LimitsOf,
    Series,
    compare_control,
    default_limits,
    group_trials,
    is_memory,
    is_mixed,
    list_ratios,
    occupancies,
    split_sites,
)
from lorameter.verdicts.validity import RunValidity, is_single_script_run, mark_invalid, run_validity

Sort = Literal["study", "name", "ratio", "value", "memory"]
"""The order of the variants: as in the study, or by name, ratio to the reference, estimate, or peak memory."""
TAIL = 0.95
"""The high percentile of warm requests that is shown if there are enough samples."""
PEAK = "peak_memory_bytes"
CPU_TIME = "step_cpu_time_s"
ALL_ACTIVE = "all active"
GAINED = "held_out_loss"
"""The loss of which the gain is judged."""


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
    series: Mapping[str, Series]
    """The trials of each shown variant, in the order of the study."""
    ratios: Mapping[str, Comparison]
    """The ratio of each shown variant except the reference, in row order."""
    control: Comparison | None
    """The reference compared with its second measurement."""
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
    selection: ReportFilter
    variants: tuple[str, ...]
    """Names of the shown variants, in the order of the study."""
    groups: Groups
    """The trials of all variants and of the control; empty if the sites differ."""
    notices: tuple[Notice, ...]
    phases: tuple[Phase, ...]
    """The phases that are shown completely; empty if single metrics were selected."""
    tables: tuple[PhaseTable, ...] = ()
    outcomes: tuple[PhaseTable, ...] = ()
    """Tables of peak memory and loss with their verdicts; empty if single metrics were selected."""

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

    @property
    def series(self) -> dict[str, Series]:
        """The trials of each shown variant, in the order of the study; empty if the sites differ."""
        return {name: self.groups[name, "variant"] for name in self.variants if (name, "variant") in self.groups}


def make_run_view(run: Run, selection: ReportFilter = EVERYTHING) -> RunView:
    """The view of a run; trials may be missing.

    Raises:
        UsageError: a variant, metric or phase is selected that the run does not have.
    """
    study = read_study(run)
    validity, names = run_validity(run, study), [variant.name for variant in study.variants]
    check_patterns("variant", names, selection.variants)
    selected = {study.reference, *match_patterns(names, selection.variants or ["*"])}
    selected_phases = () if selection.metrics else selection.phases or PHASES
    mixed = is_mixed(run)
    view = RunView(
        run=run,
        study=study,
        validity=validity,
        selection=selection,
        variants=tuple(name for name in names if name in selected),
        groups={} if mixed else group_trials(run.records),
        notices=() if mixed else collect_notices(run, study, validity.controls),
        phases=tuple(phase for phase in validity.controls if phase in selected_phases),
    )
    return _join_sites(view) if mixed else replace(view, tables=tuple(_tables(view)), outcomes=tuple(_outcomes(view)))


def _join_sites(view: RunView) -> RunView:
    """The view of a run whose sites differ: the tables of each site, and no number over all of them."""
    views = {site: make_run_view(part, view.selection) for site, part in split_sites(view.run).items()}
    tables = [
        replace(table, site=site, table=replace(table.table, title=f"{table.table.title} on {site}"))
        for site, one in views.items()
        for table in one.tables
    ]
    return replace(
        view,
        tables=tuple(tables),
        phases=tuple(phase for phase in PHASES if any(phase in one.phases for one in views.values())),
        notices=join_notices(view.run, {site: one.notices for site, one in views.items()}),
    )


def _tables(view: RunView) -> Iterator[PhaseTable]:
    run, controls, selection = view.run.manifest.run, view.validity.controls, view.selection
    if absent := [phase for phase in selection.phases if phase not in controls]:
        raise UsageError(f"phase {absent[0]!r}: run {run} has {', '.join(controls) or 'none'}.")
    metrics = [name for name in METRICS if any(series.measuring(name) for series in view.groups.values())]
    known = [*metrics, *sorted({kind for one in view.run.records for kind in one.memory if is_memory(kind)})]
    check_patterns("metric", known, selection.metrics)
    for metric in match_patterns(known, selection.metrics):
        if _find_phase(metric) in (selection.phases or PHASES):
            yield _tabulate_metric(view, _find_phase(metric), metric)
    for phase in view.phases:
        yield _tabulate(view, phase, view.validity.primary[phase], controls[phase], whole=True)


def _find_phase(metric: str) -> Phase:
    """The phase of a metric or a kind of memory."""
    if metric in METRICS:
        return METRICS[metric].phase
    return next((phase for phase in PHASES if metric in PEAKS[phase] or f"_{phase}_" in metric), "train")


def _outcomes(view: RunView) -> Iterator[PhaseTable]:
    """Tables for the peak memory of the first phase, for the last measured loss, and for each metric that is compared
    by differences."""
    reference = view.series.get(view.study.reference)
    if not view.phases or reference is None or view.alone:
        return
    phase = view.phases[0]
    kinds = [kind for kind in PEAKS[phase] if _sizes(reference, kind)]
    columns = phase_columns(phase, own_workloads=bool(view.run.manifest.own_workloads))
    losses = [name for name in columns if METRICS[name].is_loss and reference.trials(name)]
    differences = [name for name in METRICS if is_difference_metric(name) and reference.trials(name)]
    for metric in (*kinds[:1], *losses[-1:], *differences):
        yield _tabulate_metric(view, METRICS[metric].phase if metric in differences else phase, metric)


def _tabulate_metric(view: RunView, phase: Phase, metric: str) -> PhaseTable:
    """A table of one metric or kind of memory, with its own control."""
    control = compare_control(view.groups, view.study.reference, metric, family=1, alpha=view.study.protocol.alpha)
    return _tabulate(view, phase, metric, control, whole=False)


def _tabulate(view: RunView, phase: Phase, metric: str, control: Comparison | None, *, whole: bool) -> PhaseTable:
    """A table of a phase: its primary metric and (with `whole`) all other metrics that are columns of it."""
    reference, series = view.study.reference, view.series
    compared = list_ratios(view.groups, view.study, metric, control, view.selection.limits_of)
    ratios = {name: mark_invalid(one, view.validity.invalid) for name, one in compared.items()}
    columns = list(_columns(view, phase, metric, ratios, whole=whole))
    heads = tuple(head for head, _ in columns)
    lines = zip(*(cells for _, cells in columns), strict=True)
    rows = [Row(cells=cells, strong=cells[0].text == reference) for cells in lines]
    rows = _sort(rows, heads, {"value": metric, "memory": PEAK}.get(view.selection.sort, view.selection.sort))
    title = PHASE_TITLES[phase] if whole else f"{PHASE_TITLES[phase]}: {metric_title(metric)}"
    return PhaseTable(
        phase=phase,
        metric=metric,
        table=Table(title=title, heads=heads, rows=tuple(rows)),
        series=series,
        ratios={name: ratios[name] for name in (row.cells[0].text for row in rows) if name in ratios},
        control=control,
        note=_baseline_note(series.values(), phase) if whole else "",
    )


_Column: TypeAlias = tuple[ColumnHeader, list[Cell]]


def _columns(
    view: RunView, phase: Phase, metric: str, ratios: Mapping[str, Comparison], *, whole: bool
) -> Iterator[_Column]:
    """The columns in order, the most important one on the left."""
    shown, reference = list(view.series.values()), view.study.reference
    yield ColumnHeader(text="variant", key="name"), [Cell(text=series.name) for series in shown]
    if not view.alone:
        turned = "slow-down " if metric in METRICS and METRICS[metric].higher_is_better else ""
        head = ColumnHeader(text=f"{turned}× {reference}", key="ratio", right=True, ratio=True)
        if is_difference_metric(metric):
            head = ColumnHeader(text=f"minus {reference}, {METRICS[metric].unit}", key="ratio", right=True)
        if any(found.share is not None for found in ratios.values()):
            head = ColumnHeader(text=f"gain, {reference} = 100 %", key="ratio", right=True)
        own = {reference: Cell(text="reference")}
        own |= {name: write_ratio(found) for name, found in ratios.items()}
        yield head, [own.get(series.name, Cell(text="–")) for series in shown]
        words = {
            name: verdict_cell(found, metric, "variants", view.selection.limits_of(name, metric))
            for name, found in ratios.items()
        }
        yield ColumnHeader(text="verdict", joins_left=True), [words.get(series.name, Cell()) for series in shown]
    yield _metric_column(shown, metric, priority=0)
    if not whole:
        if metric in METRICS and METRICS[metric].is_loss and not view.alone:
            yield _untrained_column(shown)
        return
    others = list(_other_metrics(view, phase))
    if CPU_TIME in others:
        others.remove(CPU_TIME)
        yield _metric_column(shown, CPU_TIME, priority=4)
    if PEAKS[phase]:
        yield _peak_column(shown, phase)
    checks = [Cell(text=describe_required_paths(series)) for series in shown]
    yield ColumnHeader(text="required paths", drop_priority=1, collapse_if_constant=True), checks
    for place, name in enumerate(others):
        yield _metric_column(shown, name, priority=3 if name == "tokens_per_s" else 6 + place)
    if not view.alone and any(METRICS[name].is_loss for name in others):
        yield _untrained_column(shown)
    tails = [series.percentile(metric, TAIL) if phase == "generate" else None for series in shown]
    if any(tails):
        key = f"{metric.removesuffix('_s')}_p{100 * TAIL:g}_s"
        head = ColumnHeader(text=f"p{100 * TAIL:g}", key=key, right=True, drop_priority=20, collapse_if_constant=True)
        yield head, [_estimate_cell(tail, metric, absent="not supported") for tail in tails]


def _other_metrics(view: RunView, phase: Phase) -> Iterator[str]:
    """The metrics of a phase that at least one variant has, except the primary one."""
    names = phase_columns(phase, own_workloads=bool(view.run.manifest.own_workloads))
    sides = pair_scripts(view.run, view.study) if view.study.supports("own training") else {}
    if any(side.tokens_differ for side in sides.values()):
        names += ("time_per_real_token_s",)
    on_cpu = phase == "train" and view.run.manifest.provenance.get("device") == "cpu"
    if on_cpu and occupancies(record for series in view.series.values() for record in series.ok)[1]:
        names = (CPU_TIME, *names)
    yield from (name for name in names if any(series.trials(name) for series in view.series.values()))


def _metric_column(shown: Sequence[Series], metric: str, *, priority: int) -> _Column:
    head = ColumnHeader(text=metric_title(metric), key=metric, right=True, drop_priority=priority)
    sizes = is_memory(metric)
    return head, [_size_cell(_sizes(one, metric)) if sizes else _estimate_cell(one.estimate(metric), metric)
                  for one in shown]  # fmt: skip


def _untrained_column(shown: Sequence[Series]) -> _Column:
    """The held-out loss of each variant before training, in a note if it is the same for all."""
    head = ColumnHeader(
        text="untrained loss", key=METRICS[GAINED].untrained, right=True, drop_priority=19, collapse_if_constant=True
    )
    losses = [series.untrained(GAINED) for series in shown]
    return head, [Cell(text="not measured") if loss is None else write_number(loss, ".4f") for loss in losses]


def _estimate_cell(found: Estimate | None, metric: str, *, absent: str = "–") -> Cell:
    unit = METRICS[metric].unit
    return Cell(text=absent) if found is None else value_cell(found.value, found.low, found.high, unit)


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


def _baseline_note(shown: Iterable[Series], phase: Phase) -> str:
    """Memory of each process at its start, which host peaks include: a forked process maps its parent's imports."""
    on_host = [series for series in shown if _peak_kind(series, phase).startswith("host")]
    baselines = [size for series in on_host for size in _sizes(series, RSS_AT_START)]
    if not baselines:
        return ""
    low, high = format_bytes(min(baselines)), format_bytes(max(baselines))
    return f"host peaks include the process baseline (RSS at start) of {high if low == high else f'{low} to {high}'}"


def describe_required_paths(series: Series) -> str:
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
