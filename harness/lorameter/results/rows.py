"""The rows of the four tables of a run, in plain Python, for DataFrames, files and histories.

Estimates and comparisons are computed by the functions of the reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from lorameter.records.metrics import METRICS, PEAKS, PRIMARY, Phase
from lorameter.records.record import Role, Side, TrialRecord
from lorameter.records.store import Run
from lorameter.results.columns import TableName, Values
from lorameter.results.settings import Settings, Validity
from lorameter.stats import Comparison
from lorameter.studies.from_run import read_study
from lorameter.studies.study import Study
from lorameter.verdicts.ab import report_of
from lorameter.verdicts.compare import ComparisonRow, row_of
from lorameter.verdicts.series import Series, group_trials, ratios_of
from lorameter.verdicts.validity import discounted, run_validity

_ENDINGS: tuple[tuple[str, str], ...] = (("_per_s", "1/s"), ("_bytes", "byte"), ("_s", "s"), ("_j", "J"), ("_w", "W"))
"""Units by the end of a name, the longer one first; what ends otherwise is a number without a unit."""
_SIDES: tuple[Side, ...] = ("base", "candidate")
MEAN, RANGE = "95 % of the mean", "range"


def rows_of(run: Run) -> dict[TableName, list[Values]]:
    """All four tables of a run, each in the order of its columns."""
    return {table: list(table_of(run, table)) for table in _MAKERS}


def table_of(run: Run, table: TableName) -> Iterator[Values]:
    """One table of a run, row by row, since there may be millions of samples."""
    return _MAKERS[table](run, read_study(run))


def unit_of(metric: str) -> str:
    """The unit of a metric, of a single value or of a kind of memory, by its name."""
    if metric in METRICS:
        return METRICS[metric].unit
    return next((unit for ending, unit in _ENDINGS if metric.endswith(ending)), "1")


def phase_of(metric: str) -> Phase | None:
    """The phase that it belongs to; None where it belongs to none, or to several."""
    if metric in METRICS:
        return METRICS[metric].phase
    return next((phase for phase, kinds in PEAKS.items() if metric in kinds), None)


def trial_rows(run: Run, study: Study) -> Iterator[Values]:
    """A row a trial; earlier attempts of one that was measured again before it."""
    about, settings = (run.manifest.run, study.name, run.manifest.fingerprint), Settings(run, study)
    validity = Validity(run, study)
    attempts = [*((record, False) for record in run.disturbed), *((record, True) for record in run.records)]
    for record, counts in sorted(attempts, key=lambda one: (one[0].position, one[0].attempt)):
        failure = record.failure
        yield (
            *about, record.trial, record.name, settings.id_of(record), record.role, record.side or None,
            record.replicate, record.position, record.attempt, counts, record.interleaving, record.seed, record.status,
            failure.phase if failure else None, failure.message if failure else None,
            record.started_unix_s, record.wall_time_s, record.log or None,
            *validity.of(record), *settings.of([record]),
        )  # fmt: skip


def sample_rows(run: Run, _: Study) -> Iterator[Values]:
    """A row a raw value of the trials that count, good or bad: samples in their order, single values, memory."""
    for record in run.records:
        head = (run.manifest.run, record.trial, record.name, record.role, record.side or None, record.replicate)
        turns = _turns(record)
        for metric, values in record.samples.items():
            about = (*head, phase_of(metric), metric, unit_of(metric))
            steps = turns if metric in ("step_time_s", "step_cpu_time_s", "timed_loss") else ()
            for place, value in enumerate(values):
                yield (*about, place, steps[place] if place < len(steps) else None, value)
        for metric, single in (record.values | record.memory).items():
            yield (*head, phase_of(metric), metric, unit_of(metric), 0, None, float(single))


def _turns(record: TrialRecord) -> tuple[int, ...]:
    """The turn of each timed step."""
    return tuple(turn for turn, length in enumerate(record.turn_lengths) for _ in range(length))


def estimate_rows(run: Run, study: Study, metric: str | None = None) -> Iterator[Values]:
    """A row for each metric and kind of memory that a variant has; only for `metric` where that is given."""
    about, settings = (run.manifest.run, study.name, run.manifest.fingerprint), Settings(run, study)
    validity = Validity(run, study)
    for side in _SIDES if run.manifest.sides else ("",):
        for (variant, role), series in group_trials(run.records, side).items():
            head = (*about, variant, settings.id_of(series.records[0]), role, side or None)
            tail = (*validity.of(series.records[0]), *settings.of(series.records))
            for name in METRICS if metric is None else METRICS.keys() & {metric}:
                yield from ((*row, *tail) for row in _estimate(head, series, name))
            yield from ((*row, *tail) for row in _memory(head, series, metric))


def _estimate(head: Values, series: Series, metric: str) -> Iterator[Values]:
    estimate = series.estimate(metric)
    if estimate is None or estimate.value is None:
        return
    item, trials = METRICS[metric], series.trials(metric)
    yield (
        *head, item.phase, metric, item.unit, item.higher_is_better, estimate.value, estimate.low, estimate.high,
        None if estimate.low is None else MEAN,
        len(trials), sum(map(len, trials)), series.interleaving(metric),
    )  # fmt: skip


def _memory(head: Values, series: Series, metric: str | None) -> Iterator[Values]:
    for kind in dict.fromkeys(kind for record in series.ok for kind in record.memory if metric in (None, kind)):
        values = [float(record.memory[kind]) for record in series.ok if kind in record.memory]
        level = next(record.interleaving for record in series.ok if kind in record.memory)
        yield (
            *head, phase_of(kind), kind, "byte", False, max(values), min(values), max(values), RANGE,
            len(values), len(values), level,
        )  # fmt: skip


def comparison_rows(run: Run, study: Study) -> Iterator[Values]:
    """A row a verdict: a variant against the reference, the candidate of an A/B against its base; the controls, too. In
    an invalid run each verdict is `invalid`, with the reason; in an A/B those of the variants that are."""
    name, stands = run.manifest.run, run_validity(run, study)
    if run.manifest.sides:
        report = report_of(run)
        for compared in report.comparisons:
            yield _judged(name, compared.variant, "variant", (report.base, report.candidate), compared)
        twin = next((one for one, role in group_trials(run.records, "base") if role == "control"), "")
        for phase, control in stands.controls.items():
            if control is not None:
                both, found = (report.base, report.base), discounted(control, stands.broken)
                yield _compared(name, twin, "control", both, PRIMARY[phase], found, run, side="base")
        return
    groups = group_trials(run.records)
    for phase, metric in stands.primary.items():
        control = stands.controls[phase]
        for variant, ratio in ratios_of(groups, study, metric, control).items():
            found = discounted(ratio, stands.invalid)
            yield _compared(name, variant, "variant", (study.reference, variant), metric, found, run)
        if control is not None:
            both = (study.reference, study.reference)
            found = discounted(control, stands.invalid)
            yield _compared(name, study.reference, "control", both, metric, found, run)


def _compared(
    name: str,
    variant: str,
    role: Role,
    sides: tuple[str, str],
    metric: str,
    found: Comparison,
    run: Run,
    *,
    side: Side = "",
) -> Values:
    series = group_trials(run.records, side).get((variant, role))
    level = (series.interleaving(metric) if series else None) or "replicates"
    return _judged(name, variant, role, sides, row_of(variant, metric, found, level))


def _judged(name: str, variant: str, role: Role, sides: tuple[str, str], compared: ComparisonRow) -> Values:
    return (
        name, variant, role, *sides, compared.metric, compared.ratio, compared.low, compared.high, compared.verdict,
        compared.reason, compared.replicates, compared.replicates_needed, compared.mde80, compared.tolerance,
        compared.margin, compared.interleaving,
    )  # fmt: skip


_MAKERS: Mapping[TableName, Callable[[Run, Study], Iterator[Values]]] = {
    "trials": trial_rows,
    "samples": sample_rows,
    "estimates": estimate_rows,
    "comparisons": comparison_rows,
}
