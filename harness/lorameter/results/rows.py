"""Makes the rows of a run's four tables, in plain Python, for DataFrames, files and histories.

Estimates and comparisons are computed by the functions of the reports. A row is a mapping from column names to values;
a column without a value is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from lorameter.errors import InvalidRunError
from lorameter.machine.software import MAIN_LIBRARIES, normal_name
from lorameter.records import codec
from lorameter.records.metrics import METRICS, PEAKS, PRIMARY, Phase
from lorameter.records.record import Side, TrialRecord
from lorameter.records.store import Run
from lorameter.results.columns import OF_VARIANT, OF_WORKLOAD, FrameColumn, TableName
from lorameter.stats import Comparison
from lorameter.studies.from_run import read_own_workloads, read_study
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.studies.variant import OF_4BIT, ScriptVariant, Variant
from lorameter.studies.workload import identify
from lorameter.verdicts.ab import report_of
from lorameter.verdicts.compare import row_of
from lorameter.verdicts.series import Series, group_trials, ratios_of
from lorameter.verdicts.software import facts_of
from lorameter.verdicts.validity import Fault, InvalidReason, RunValidity, discounted, run_validity, say_faults

Row: TypeAlias = dict[str, Any]
_UNITS: Mapping[str, str] = {"_per_s": "1/s", "_bytes": "byte", "_s": "s", "_j": "J", "_w": "W"}
"""Units by name suffix, longer suffixes first; other names have no unit."""
_SIDES: tuple[Side, ...] = ("base", "candidate")
OF_STEPS = ("step_time_s", "step_cpu_time_s", "timed_loss")
"""Samples with one value for each timed step."""
MEAN, RANGE = "95 % of the mean", "range"


def table_of(run: Run, table: TableName) -> Iterator[Row]:
    """The rows of one table of a run, as an iterator, since there may be millions of samples."""
    return _MAKERS[table](run, read_study(run))


def about_metric(metric: str) -> Row:
    """Phase, name and unit of a metric, of a single value or of a kind of memory; without a phase if it belongs to
    none, or to several."""
    known = METRICS.get(metric)
    if known is not None:
        return {"phase": known.phase, "metric": metric, "unit": known.unit}
    phase: Phase | None = next((phase for phase, kinds in PEAKS.items() if metric in kinds), None)
    unit = next((unit for ending, unit in _UNITS.items() if metric.endswith(ending)), "1")
    return {"phase": phase, "metric": metric, "unit": unit}


class Settings:
    """Columns common to the rows of trials and estimates: run, variant, validity, settings and software."""

    def __init__(self, run: Run, study: Study) -> None:
        self._run, self._study = run, study
        self._variants = {variant.name: variant for variant in study.variants}
        self._own = {} if study.of_scripts else read_own_workloads(run)
        self._faults: Sequence[Fault]
        try:
            self._faults = run_validity(run, study).faults
        except InvalidRunError as error:  # the samples give no control
            self._faults = (Fault(reason=InvalidReason.CONTROL_NOT_MEASURED, message=str(error)),)

    def of(self, records: Sequence[TrialRecord]) -> Row:
        """The common columns of trials of one variant, role and side."""
        record, manifest = records[0], self._run.manifest
        return {
            "run": manifest.run,
            "study": self._study.name,
            "fingerprint": manifest.fingerprint,
            **_about_variant(record),
            "variant_id": identify(record.variant, self._own.get(record.name)),
            **self._validity(record),
            **self._of_variant(record),
            **self._of_workload(record.name),
            **self._of_software(records),
        }

    def _validity(self, record: TrialRecord) -> Row:
        own = (record.name, record.side) if record.role == "variant" else None
        faults = [fault for fault in self._faults if not fault.variant or own == (fault.variant, fault.side)]
        if not faults:
            return {"valid": True}
        return {"valid": False, "invalid_reason": faults[0].reason.value, "invalid_message": say_faults(faults)}

    def _of_variant(self, record: TrialRecord) -> Row:
        variant = self._variants.get(record.name)
        if variant is None:
            return {}
        if isinstance(variant, ScriptVariant):
            side = self._run.manifest.sides.get(record.side, {})
            command = side.get("spec") if side.get("kind") == SIDE else variant.command
            return {"method": variant.method_name, "command": command}
        settings = {column.name: _plain(getattr(variant, column.name, None), column) for column in OF_VARIANT}
        if isinstance(variant, Variant) and not variant.is_4bit:
            settings |= dict.fromkeys(OF_4BIT)
        peft = getattr(variant, "peft", None)
        return settings | {"method": variant.method_name, "peft_config": codec.dumps(peft) if peft else None}

    def _of_workload(self, name: str) -> Row:
        workload = None if self._study.of_scripts else self._own.get(name, self._study.workload)
        return {
            column.name: _plain(getattr(workload, column.name.removeprefix("workload_"), None), column)
            for column in OF_WORKLOAD
        }

    def _of_software(self, records: Sequence[TrialRecord]) -> Row:
        manifest = self._run.manifest
        provenance: Mapping[str, Any] = manifest.provenance
        if own := manifest.sides.get(records[0].side, {}).get("facts"):  # in an A/B of environments or revisions
            libraries = {package: own["packages"].get(normal_name(package)) for package in MAIN_LIBRARIES}
            provenance = {**provenance, "libraries": libraries, "git": own.get("git", {})}
        facts = facts_of(provenance, records)
        git, libraries = facts.get("git", {}), facts.get("libraries", {})
        versions = {package: libraries.get(package) for package in MAIN_LIBRARIES}
        return {"commit": git.get("commit"), "dirty": git.get("dirty"), **versions}


def _plain(value: Any, column: FrameColumn) -> Any:
    """Convert a setting to a value of its column."""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, dict):
        return codec.dumps(value) if value else None
    return float(value) if column.kind == "number" and value is not None else value


def _about_variant(record: TrialRecord) -> Row:
    return {"variant": record.name, "role": record.role, "side": record.side or None}


def trial_rows(run: Run, study: Study) -> Iterator[Row]:
    """A row for each trial; earlier attempts come before the last one."""
    settings, known = Settings(run, study), dict[tuple[str, str, str], Row]()
    attempts = [*((record, False) for record in run.disturbed), *((record, True) for record in run.records)]
    for record, counts in sorted(attempts, key=lambda one: (one[0].position, one[0].attempt)):
        key, failure = (record.name, record.role, record.side), record.failure
        if key not in known or record.software:  # each process of a script reports its own
            known[key] = settings.of([record])
        yield {
            **known[key],
            "trial": record.trial,
            "replicate": record.replicate,
            "position": record.position,
            "attempt": record.attempt,
            "counts": counts,
            "interleaving": record.interleaving,
            "seed": record.seed,
            "status": record.status,
            "failed_in": failure.phase if failure else None,
            "failure": failure.message if failure else None,
            "started_unix_s": record.started_unix_s,
            "wall_time_s": record.wall_time_s,
            "log": record.log or None,
        }


def sample_rows(run: Run, _: Study) -> Iterator[Row]:
    """A row for each raw value of the trials that count, good or bad: samples in order, single values, memory."""
    for record in run.records:
        head = {"run": run.manifest.run, "trial": record.trial, "replicate": record.replicate, **_about_variant(record)}
        turns = [turn for turn, length in enumerate(record.turn_lengths) for _ in range(length)]
        for metric, values in record.samples.items():
            about = head | about_metric(metric)
            steps = turns if metric in OF_STEPS else ()
            for place, value in enumerate(values):
                yield {**about, "sample": place, "turn": steps[place] if place < len(steps) else None, "value": value}
        for metric, single in (record.values | record.memory).items():
            yield {**head, **about_metric(metric), "sample": 0, "value": float(single)}


def estimate_rows(run: Run, study: Study, metric: str | None = None) -> Iterator[Row]:
    """A row for each metric and kind of memory of a variant, or only for `metric` if given."""
    settings = Settings(run, study)
    for side in _SIDES if run.manifest.sides else ("",):
        for series in group_trials(run.records, side).values():
            about = settings.of(series.records)
            for name in METRICS if metric is None else METRICS.keys() & {metric}:
                yield from (about | row for row in _estimate(series, name))
            for kind in dict.fromkeys(kind for record in series.ok for kind in record.memory if metric in (None, kind)):
                yield about | _peak(series, kind)


def _estimate(series: Series, metric: str) -> Iterator[Row]:
    estimate = series.estimate(metric)
    if estimate is None or estimate.value is None:
        return
    trials = series.trials(metric)
    yield {
        **about_metric(metric),
        "higher_is_better": METRICS[metric].higher_is_better,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "interval": None if estimate.low is None else MEAN,
        "replicates": len(trials),
        "samples": sum(map(len, trials)),
        "interleaving": series.interleaving(metric),
    }


def _peak(series: Series, kind: str) -> Row:
    records = [record for record in series.ok if kind in record.memory]
    values = [float(record.memory[kind]) for record in records]
    return {
        **about_metric(kind),
        "higher_is_better": False,
        "value": max(values),
        "low": min(values),
        "high": max(values),
        "interval": RANGE,
        "replicates": len(values),
        "samples": len(values),
        "interleaving": records[0].interleaving,
    }


def comparison_rows(run: Run, study: Study) -> Iterator[Row]:
    """A row for each verdict: a variant against the reference, the candidate of an A/B against its base, and the
    controls. In an invalid run each verdict is `invalid`, with the reason; in an A/B only those of invalid variants."""
    validity, about = run_validity(run, study), {"run": run.manifest.run}
    if run.manifest.sides:
        yield from (about | row for row in _rows_of_ab(run, validity))
        return
    groups, reference = group_trials(run.records), study.reference
    for phase, control in validity.controls.items():
        metric = validity.primary[phase]
        for variant, ratio in ratios_of(groups, study, metric, control).items():
            sides = {"role": "variant", "base": reference, "candidate": variant}
            comparison = discounted(ratio, validity.invalid)
            yield {**about, **sides, **_compared(variant, metric, comparison, groups.get((variant, "variant")))}
        if control is not None:
            sides = {"role": "control", "base": reference, "candidate": reference}
            comparison = discounted(control, validity.invalid)
            yield {**about, **sides, **_compared(reference, metric, comparison, groups.get((reference, "control")))}


def _rows_of_ab(run: Run, validity: RunValidity) -> Iterator[Row]:
    report, groups = report_of(run), group_trials(run.records, "base")
    for compared in report.comparisons:
        sides = {"role": "variant", "base": report.base, "candidate": report.candidate}
        yield sides | dataclasses.asdict(compared)
    twin = next((name for name, role in groups if role == "control"), "")
    for phase, control in validity.controls.items():
        if control is not None:
            sides = {"role": "control", "base": report.base, "candidate": report.base}
            comparison = discounted(control, validity.broken)
            yield sides | _compared(twin, PRIMARY[phase], comparison, groups.get((twin, "control")))


def _compared(variant: str, metric: str, comparison: Comparison, series: Series | None) -> Row:
    level = (series.interleaving(metric) if series else None) or "replicates"
    return dataclasses.asdict(row_of(variant, metric, comparison, level))


_MAKERS: Mapping[TableName, Callable[[Run, Study], Iterator[Row]]] = {
    "trials": trial_rows,
    "samples": sample_rows,
    "estimates": estimate_rows,
    "comparisons": comparison_rows,
}
