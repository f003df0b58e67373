"""The table of one phase, or of one metric that was asked for: a row a variant, each cell a typed value.

Its columns are in the order in which programs know them; which stand first on a screen, and which are left out where
there is no room, is `lorameter.report.run`'s to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorameter.records.metrics import METRICS, PEAKS, PHASE_TITLES, RSS_AT_START, Phase, columns_of
from lorameter.records.record import Interleaving, TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import format_bytes
from lorameter.report.blocks import Cell, ChartGroup, Table, value_cell, write_ratio
from lorameter.report.phrases import title_of
from lorameter.stats import Comparison, compare_bytes
from lorameter.studies.study import Study
from lorameter.verdicts.compare import LimitsOf
from lorameter.verdicts.comparison_input import is_memory
from lorameter.verdicts.same_training import sides_of_run
from lorameter.verdicts.series import Groups, Series, control_of, occupancies, pairs_of, ratios_of
from lorameter.verdicts.validity import RunValidity, discounted, is_single_script_run

TAIL = 0.95
"""The high percentile of warm requests that is shown where the samples support it."""
VARIANT, RATIO, TAILS, PEAK, CHECKS = "variant", "ratio", "tail", "peak_memory_bytes", "checks"
"""Columns that are no metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseColumn:
    """What is shown below each other."""

    key: str
    """A metric's name, or one of the words above."""
    head: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRow:
    """One variant in one phase."""

    name: str
    reference: bool
    cells: tuple[Cell, ...]
    ratio: Comparison | None
    margin: float
    """Within which it counts as equal to the reference."""
    remark: str = ""
    """Why the estimate next to a ratio disagrees with it; empty where it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTable:
    """One phase: its columns and a row a variant."""

    phase: Phase
    metric: str
    """What variants are compared by in it."""
    title: str
    columns: tuple[PhaseColumn, ...]
    rows: tuple[VariantRow, ...]
    control: Comparison | None
    """The reference against itself measured twice."""
    interleaving: Interleaving | None = None
    """How the trials alternated that measured the metric."""
    note: str = ""
    """What a reader of the peaks must know; empty where there is nothing."""
    alone: bool = False
    """Whether there is nothing that could be compared: one training, which was followed where it took place."""
    site: str = ""
    """Of which site alone, where sites are unlike; its title names it as well."""
    galleries: tuple[ChartGroup, ...] = ()
    """What there is to be seen of it."""
    serving: Table | None = None
    """Throughput against latency, where requests have different numbers of prompts."""

    @property
    def heads(self) -> tuple[str, ...]:
        """What each column holds."""
        return tuple(column.head for column in self.columns)

    def cells(self, key: str) -> tuple[Cell, ...]:
        """The cells of a column, () without one of that key."""
        places = [place for place, column in enumerate(self.columns) if column.key == key]
        return tuple(row.cells[place] for row in self.rows for place in places)


def tabulate_phase(
    phase: Phase, metric: str, validity: RunValidity, run: Run, study: Study, groups: Groups, limits_of: LimitsOf
) -> PhaseTable:
    """A phase by its primary metric, with every other metric that is a column of it."""
    shown = _shown(study, groups)
    asked = columns_of(phase, own_workloads=bool(run.manifest.own_workloads))
    if study.of_scripts and any(sides.tokens_differ for sides in sides_of_run(run, study).values()):
        asked += ("time_per_real_token_s",)
    if phase == "train" and run.manifest.provenance.get("device") == "cpu" and occupancies(_ok(shown))[1]:
        asked = ("step_cpu_time_s", *asked)
    columns = tuple(column for column in asked if any(series.trials(column) for series in shown))
    title = PHASE_TITLES[phase]
    ratios = _ratios(groups, study, metric, validity.controls[phase], limits_of, validity.invalid)
    return _tabulate(
        phase, metric, validity.controls[phase], ratios, run, study, groups, limits_of, others=columns, title=title,
        whole=True,
    )  # fmt: skip


def tabulate_metric(
    metric: str, phase: Phase, validity: RunValidity, run: Run, study: Study, groups: Groups, limits_of: LimitsOf
) -> PhaseTable:
    """One metric or kind of memory that was asked for, with the control of its own."""
    if is_memory(metric):
        twins = [groups.get((study.reference, role)) for role in ("variant", "control")]
        control = _compare_peaks(twins[0], twins[1], metric, 0.01) if all(twins) else None
    else:
        control = control_of(groups, study.reference, metric, family=1)
    title = f"{PHASE_TITLES[phase]}: {title_of(metric)}"
    ratios = _ratios(groups, study, metric, control, limits_of, validity.invalid)
    return _tabulate(phase, metric, control, ratios, run, study, groups, limits_of, others=(), title=title, whole=False)


def _ok(shown: Iterable[Series]) -> Iterator[TrialRecord]:
    return (record for series in shown for record in series.ok)


def _shown(study: Study, groups: Groups) -> list[Series]:
    return [groups[one.name, "variant"] for one in study.variants if (one.name, "variant") in groups]


def _tabulate(
    phase: Phase, metric: str, control: Comparison | None, ratios: Mapping[str, Comparison], run: Run, study: Study,
    groups: Groups, limits_of: LimitsOf, *, others: Sequence[str], title: str, whole: bool,
) -> PhaseTable:  # fmt: skip
    """`whole`: whether it is all that there is of a phase, or one metric of it."""
    shown = _shown(study, groups)
    tails = [_tail(series, metric) for series in shown] if phase == "generate" and whole else []
    tailed = any(tail is not None for tail in tails)
    peaked = bool(PEAKS[phase]) and whole
    alone = is_single_script_run(run, study)
    columns = [PhaseColumn(key=VARIANT, head="variant"), PhaseColumn(key=metric, head=title_of(metric))]
    columns += [] if alone else [PhaseColumn(key=RATIO, head=f"× {study.reference}")]
    columns += [PhaseColumn(key=name, head=METRICS[name].title) for name in others]
    columns += [PhaseColumn(key=TAILS, head=f"p{100 * TAIL:g}")] if tailed else []
    columns += [PhaseColumn(key=PEAK, head="peak memory")] if peaked else []
    columns += [PhaseColumn(key=CHECKS, head="checks")] if whole else []
    reference = groups.get((study.reference, "variant"))
    rows = []
    for index, series in enumerate(shown):
        ratio, is_reference = ratios.get(series.name), series.name == study.reference
        cells = [Cell(text=series.name), _estimate(series, metric)]
        cells += [] if alone else [_ratio(ratio, is_reference=is_reference)]
        cells += [_estimate(series, name) for name in others]
        cells += [tails[index] or Cell(text="not supported")] if tailed else []
        cells += [_peak(series, phase)] if peaked else []
        cells += [Cell(text=_checks(series))] if whole else []
        rows.append(
            VariantRow(
                name=series.name,
                reference=is_reference,
                cells=tuple(cells),
                ratio=ratio,
                margin=_margin(limits_of, series.name, metric),
                remark=_remark(reference, series, metric, ratio),
            )
        )
    return PhaseTable(
        phase=phase,
        metric=metric,
        title=title,
        columns=tuple(columns),
        rows=tuple(rows),
        control=control,
        interleaving=None if reference is None or is_memory(metric) else reference.interleaving(metric),
        note=_at_birth(shown, phase) if peaked else "",
        alone=alone,
    )


def _margin(limits_of: LimitsOf, name: str, metric: str) -> float:
    limits = limits_of(name, metric)
    return limits.tolerance if is_memory(metric) else limits.margin


def _ratios(
    groups: Groups, study: Study, metric: str, control: Comparison | None, limits_of: LimitsOf, invalid: str | None
) -> Mapping[str, Comparison]:
    """Each variant against the reference; in an invalid run without a verdict."""
    names = [variant.name for variant in study.variants]
    limits = {name: limits_of(name, metric) for name in names}
    if not is_memory(metric):
        ratios = ratios_of(
            groups, study, metric, control,
            tolerance={name: one.tolerance for name, one in limits.items()},
            margin={name: one.margin for name, one in limits.items()},
        )  # fmt: skip
        return {name: discounted(one, invalid) for name, one in ratios.items()}
    base = groups.get((study.reference, "variant"))
    found = {
        name: _compare_peaks(base, groups.get((name, "variant")), metric, limits[name].tolerance)
        for name in names
        if name != study.reference
    }
    return {name: discounted(one, invalid) for name, one in found.items() if one is not None}


def _compare_peaks(base: Series | None, other: Series | None, kind: str, tolerance: float) -> Comparison | None:
    peaks = [_sizes(side, kind) if side is not None else [] for side in (base, other)]
    return compare_bytes(peaks[0], peaks[1], tolerance=tolerance) if all(peaks) else None


def _sizes(series: Series, kind: str) -> list[int]:
    return [record.memory[kind] for record in series.ok if kind in record.memory]


def _remark(reference: Series | None, series: Series, metric: str, ratio: Comparison | None) -> str:
    """Where the ratio of the estimates lies outside of the interval of the ratio, which is of pairs: both are there to
    be seen, and they are two things."""
    if reference is None or ratio is None or not ratio.low or ratio.high is None or is_memory(metric):
        return ""
    ours, theirs = series.estimate(metric), reference.estimate(metric)
    if ours is None or theirs is None or not ours.value or not theirs.value or ours.value / theirs.value <= 0:
        return ""
    apart = ours.value / theirs.value
    apart = 1 / apart if METRICS[metric].higher_is_better else apart
    if ratio.low <= apart <= ratio.high or abs(math.log(apart / (ratio.ratio or apart))) < math.log(1.01):
        return ""
    said = f"its estimate over the reference's is ×{apart:.3g}, the ratio of the pairs ×{ratio.ratio:.3g}"
    return f"{said}, which {_why_apart(reference, series, metric)}"


def _why_apart(reference: Series, series: Series, metric: str) -> str:
    pairs = pairs_of(reference, series, metric)
    measured = min(len(one.measuring(metric)) for one in (reference, series))
    drops = pairs.drops if pairs is not None else None
    if drops is not None and drops.balanced and not drops.refused and drops.base_flagged + drops.candidate_flagged:
        return "leaves out pairs of disturbed trials"
    if pairs is not None and len(pairs.base) < measured:
        return "leaves out replicates that one of them lacks"
    return "compares what was measured side by side"


def _tail(series: Series, metric: str) -> Cell | None:
    """A high percentile; None where the samples do not support it."""
    tail = series.percentile(metric, TAIL)
    if tail is None or tail.value is None:
        return None
    return value_cell(tail.value, tail.low, tail.high, METRICS[metric].unit)


def _estimate(series: Series, metric: str) -> Cell:
    if is_memory(metric):
        sizes = _sizes(series, metric)
        return value_cell(max(sizes), min(sizes), max(sizes), "byte") if sizes else Cell(text="–")
    estimate = series.estimate(metric)
    if estimate is None or estimate.value is None:
        return Cell(text="–")
    return value_cell(estimate.value, estimate.low, estimate.high, METRICS[metric].unit)


def _ratio(ratio: Comparison | None, *, is_reference: bool) -> Cell:
    if is_reference:
        return Cell(text="reference")
    if ratio is None:
        return Cell(text="–")
    return write_ratio(ratio, verdict=ratio.verdict)


def _peak(series: Series, phase: Phase) -> Cell:
    """The largest peak, with the smallest and the largest in the place of an interval."""
    kind, peaks = _peaks(series, phase)
    if not peaks:
        return Cell(text="–")
    where = "GPU" if kind.startswith("device") else "host"
    return value_cell(max(peaks), min(peaks), max(peaks), "byte", detail=where)


def _peaks(series: Series, phase: Phase) -> tuple[str, list[int]]:
    """The kind of memory whose peaks stand for a phase, and one of each trial that has them."""
    for kind in PEAKS[phase]:
        if peaks := _sizes(series, kind):
            return kind, peaks
    return "", []


def _at_birth(shown: Iterable[Series], phase: Phase) -> str:
    """How much of the host's peaks each process had before it did anything: a fork maps what its zygote imported."""
    on_host = [series for series in shown if _peaks(series, phase)[0].startswith("host")]
    births = [
        record.memory[RSS_AT_START] for series in on_host for record in series.ok if RSS_AT_START in record.memory
    ]
    if not births:
        return ""
    low, high = format_bytes(min(births)), format_bytes(max(births))
    return f"host peaks include the process baseline (RSS at start) of {high if low == high else f'{low} to {high}'}"


def _checks(series: Series) -> str:
    required = list(_required(series))
    if not required:
        return "nothing required" if any(record.checks for record in series.records) else "not checked"
    failed = sorted({f"{path} {status}" for path, status in required if status != "active"})
    paths = len({path for path, _ in required})
    return ", ".join(failed) if failed else f"{paths} of {paths} active"


def _required(series: Series) -> Iterator[tuple[str, str]]:
    for record in series.records:
        for check in record.checks:
            if check["required"] is not None:
                yield check["path"], check["status"]
