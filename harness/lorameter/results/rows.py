"""The four tables of a run: their columns, and their rows in plain Python, for DataFrames, files and histories.

Estimates and comparisons are computed by the functions of the reports. A row is a mapping from column names to values;
a column without a value is missing.

DataFrames and files have the same columns. Units are base units and part of the name; if a column holds several
metrics, the column `unit` gives the unit of each row (`s`, `byte`, `1/s`, `J`, `1`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_type_hints

from lorameter.machine.provenance import MAIN_LIBRARIES, normal_name
from lorameter.measurements.metrics import METRICS, PEAKS, Phase, is_difference_metric
from lorameter.records import codec
from lorameter.records.record import SIDES, Role, TrialRecord
from lorameter.records.store import Run
from lorameter.stats import Comparison
from lorameter.studies.form import form_keys, own_forms
from lorameter.studies.quantization import FIELDS
from lorameter.studies.study import Study
from lorameter.studies.study_file import read_own_workloads, read_study
from lorameter.studies.variant import Variant
from lorameter.studies.workload import OF_VARIANTS, Workload, workload_variant_id
from lorameter.verdicts.ab import build_report
from lorameter.verdicts.compare import comparison_row
from lorameter.verdicts.same_training import training_facts
from lorameter.verdicts.series import Series, compare_control, group_trials, list_ratios
from lorameter.verdicts.validity import format_faults, mark_invalid, run_validity

Row: TypeAlias = dict[str, Any]
_UNITS: Mapping[str, str] = {"_per_s": "1/s", "_bytes": "byte", "_s": "s", "_j": "J", "_w": "W"}
"""Units by name suffix, longer suffixes first; other names have no unit."""
OF_STEPS = ("step_time_s", "step_cpu_time_s", "timed_loss")
"""Samples with one value for each timed step."""
MEAN, RANGE = "95 % of the mean", "range"


def table_rows(run: Run, table: TableName) -> Iterator[Row]:
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
        self._own_workloads = read_own_workloads(run)
        self._faults = run_validity(run, study).faults

    def describe(self, records: Sequence[TrialRecord]) -> Row:
        """The common columns of trials of one variant, role and side."""
        record, manifest = records[0], self._run.manifest
        has_workload = self._study.supports("workload")
        workload = self._own_workloads.get(record.name, self._study.workload) if has_workload else None
        return {
            "run": manifest.run,
            "study": self._study.name,
            "fingerprint": manifest.fingerprint,
            **_about_variant(record),
            "variant_id": workload_variant_id(record.variant, self._own_workloads.get(record.name)),
            **self._describe_validity(record),
            **self._describe_variant(record),
            **{
                column.name: _plain(getattr(workload, column.name.removeprefix("workload_"), None), column)
                for column in OF_WORKLOAD
            },
            **self._describe_software(records),
        }

    def _describe_validity(self, record: TrialRecord) -> Row:
        key = (record.name, record.side) if record.role == "variant" else None
        faults = [fault for fault in self._faults if not fault.variant or key == (fault.variant, fault.side)]
        if not faults:
            return {"valid": True}
        return {"valid": False, "invalid_reason": faults[0].reason.value, "invalid_message": format_faults(faults)}

    def _describe_variant(self, record: TrialRecord) -> Row:
        variant = self._variants.get(record.name)
        if variant is None:
            return {}
        side = self._run.manifest.sides.get(record.side, {})
        variant = variant.on_side(side.get("kind", ""), side.get("spec", ""))
        settings = {column.name: _plain(getattr(variant, column.name, None), column) for column in OF_VARIANT}
        if isinstance(variant, Variant):
            settings |= {key: variant.effective(key) for key in FIELDS}
        peft = getattr(variant, "peft", None)
        return settings | {"method": variant.method_name, "peft_config": codec.dumps(peft) if peft else None}

    def _describe_software(self, records: Sequence[TrialRecord]) -> Row:
        manifest = self._run.manifest
        provenance: Mapping[str, Any] = manifest.provenance
        if side_facts := manifest.sides.get(records[0].side, {}).get("facts"):  # in an A/B of environments or revisions
            libraries = {package: side_facts["packages"].get(normal_name(package)) for package in MAIN_LIBRARIES}
            provenance = {**provenance, "libraries": libraries, "git": side_facts.get("git", {})}
        facts = training_facts(provenance, records)
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
    for record, counts in sorted(attempts, key=lambda attempt: (attempt[0].position, attempt[0].attempt)):
        key, failure = (record.name, record.role, record.side), record.failure
        if key not in known or record.software:  # each process of a script reports its own
            known[key] = settings.describe([record])
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
    for side in SIDES if run.manifest.sides else ("",):
        for series in group_trials(run.records, side).values():
            about = settings.describe(series.records)
            for name in METRICS if metric is None else METRICS.keys() & {metric}:
                yield from (about | row for row in _estimate(series, name))
            for kind in dict.fromkeys(kind for record in series.ok for kind in record.memory if metric in (None, kind)):
                yield about | _peak(series, kind)


def _estimate(series: Series, metric: str) -> Iterator[Row]:
    estimate = series.estimate(metric)
    if estimate is None:
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
    validity, has_sides = run_validity(run, study), bool(run.manifest.sides)
    groups, about = group_trials(run.records, "base" if has_sides else ""), {"run": run.manifest.run}
    reference = base = study.reference
    if has_sides:
        report = build_report(run)
        reference, base = next((name for name, role in groups if role == "control"), ""), report.base
        for compared in report.comparisons:
            sides = {"role": "variant", "base": base, "candidate": report.candidate}
            yield about | sides | dataclasses.asdict(compared)
    controls = {validity.primary[phase]: control for phase, control in validity.controls.items()}
    known = {metric for series in groups.values() for metric in series.metrics}
    if not has_sides:
        controls |= {
            metric: compare_control(groups, reference, metric, family=1, alpha=study.protocol.alpha)
            for metric in METRICS
            if metric in known and is_difference_metric(metric)
        }
    for metric, control in controls.items():
        ratios = {} if has_sides else list_ratios(groups, study, metric, control)
        found: list[tuple[Role, str, Comparison]] = [("variant", name, ratio) for name, ratio in ratios.items()]
        found += [] if control is None else [("control", reference, control)]
        for role, name, comparison in found:
            series = groups.get((name, role))
            level = (series.interleaving(metric) if series else None) or "replicates"
            counted = mark_invalid(comparison, validity.broken if has_sides else validity.invalid)
            sides = {"role": role, "base": base, "candidate": base if role == "control" else name}
            yield about | sides | dataclasses.asdict(comparison_row(name, metric, counted, level))


_MAKERS: Mapping[TableName, Callable[[Run, Study], Iterator[Row]]] = {
    "trials": trial_rows,
    "samples": sample_rows,
    "estimates": estimate_rows,
    "comparisons": comparison_rows,
}


Kind = Literal["text", "count", "number", "flag"]
TableName = Literal["trials", "samples", "estimates", "comparisons"]
DTYPES: Mapping[Kind, str] = {"text": "string", "count": "Int64", "number": "float64", "flag": "boolean"}
"""The pandas dtype of each kind of column; a missing value is NA, a missing number NaN."""


class FrameColumn(NamedTuple):
    """One column of a table."""

    name: str
    kind: Kind
    description: str


_RUN = FrameColumn("run", "text", "id of the run")
_SIDE = FrameColumn("side", "text", "`base` or `candidate` of an A/B; missing in other runs")
_ROLE = FrameColumn("role", "text", "`variant`, or `control`: the reference, measured a second time")
_VARIANT = FrameColumn("variant", "text", "name of the variant in its study")
_VARIANT_ID = FrameColumn(
    "variant_id", "text", "hash of the variant's configuration, and of its own workload if it has one"
)
_METRIC = FrameColumn("metric", "text", "name of the metric, of a single value or of a kind of memory")
_PHASE = FrameColumn("phase", "text", "`train`, `generate` or `cold`; missing if it belongs to none")
_UNIT = FrameColumn("unit", "text", "unit of the values in this row")
_INTERLEAVING = FrameColumn("interleaving", "text", "interleaving level of the trials that are compared")

_KINDS: Mapping[Any, Kind] = {int: "count", float: "number", bool: "flag"}
"""Kind of a field by its type; all other fields are text."""
_NO_SETTINGS = ("name", "cwd", "env", "python", "method", "peft")
"""Fields of a variant that have no column: its label, the folder of its command, and contents of other columns."""


_HINTS = {key: hint for form in (*own_forms(), Workload) for key, hint in get_type_hints(form).items()}
OF_VARIANT = (
    *(
        FrameColumn(key, _KINDS.get(_HINTS[key], "text"), f"`{key}` of the variant")
        for key in dict.fromkeys(key for form in own_forms() for key in form_keys(form))
        if key not in _NO_SETTINGS
    ),
    FrameColumn("method", "text", "the training method: PEFT's name of it, `full fine-tuning` or `script`"),
    FrameColumn("peft_config", "text", "PEFT's configuration of the variant; missing if it has none"),
)
OF_WORKLOAD = tuple(
    FrameColumn(
        f"workload_{key}", _KINDS.get(_HINTS[key], "text"), f"`{key}` of the workload that the variant is measured on"
    )
    for key in OF_VARIANTS
)
VALIDITY = (
    FrameColumn("valid", "flag", "whether the numbers of its variant count"),
    FrameColumn("invalid_reason", "text", "the first reason why they do not: `trial-failed`, `control-differs`, …"),
    FrameColumn("invalid_message", "text", "all reasons in words"),
)
SETTINGS = (
    *OF_VARIANT,
    *OF_WORKLOAD,
    FrameColumn(
        "commit", "text", "commit of the repository that it was measured in; of an A/B of revisions the side's"
    ),
    FrameColumn("dirty", "flag", "whether the repository had changes that were not committed"),
    *(FrameColumn(name, "text", f"version of {name}; of an A/B the side's") for name in MAIN_LIBRARIES),
)
"""The last columns of `trials` and `estimates`. A setting that has no effect is missing, such as `double_quant` without
a 4-bit base, or all settings of a variant that is a command."""

TABLES: Mapping[TableName, tuple[FrameColumn, ...]] = {
    "trials": (
        _RUN,
        FrameColumn("study", "text", "name of the study"),
        FrameColumn("fingerprint", "text", "hash of what must agree for two runs to be compared"),
        FrameColumn("trial", "text", "id of the trial in its run"),
        _VARIANT,
        _VARIANT_ID,
        _ROLE,
        _SIDE,
        FrameColumn("replicate", "count", "from 0; trials of one replicate are paired"),
        FrameColumn("position", "count", "place in the order of the run, from 0"),
        FrameColumn("attempt", "count", "number of earlier attempts that disturbances of the machine made invalid"),
        FrameColumn("counts", "flag", "whether it is the last attempt, which the estimates use"),
        _INTERLEAVING,
        FrameColumn("seed", "count", "seed of the trial"),
        FrameColumn("status", "text", "how it ended: `ok`, `invalid`, `oom`, `timeout`, `crashed`, …"),
        FrameColumn("failed_in", "text", "phase in which it failed; missing if it succeeded"),
        FrameColumn("failure", "text", "why it failed"),
        FrameColumn("started_unix_s", "number", "when it began, seconds since 1970"),
        FrameColumn("wall_time_s", "number", "how long it took"),
        FrameColumn("log", "text", "path of its log in the run's folder"),
        *VALIDITY,
        *SETTINGS,
    ),
    "samples": (
        _RUN,
        FrameColumn("trial", "text", "id of the trial"),
        _VARIANT,
        _ROLE,
        _SIDE,
        FrameColumn("replicate", "count", "from 0"),
        _PHASE,
        _METRIC,
        _UNIT,
        FrameColumn("sample", "count", "place in the order measured, from 0"),
        FrameColumn("turn", "count", "the turn that a timed step belongs to, from 0; missing elsewhere"),
        FrameColumn("value", "number", "as measured"),
    ),
    "estimates": (
        _RUN,
        FrameColumn("study", "text", "name of the study"),
        FrameColumn("fingerprint", "text", "hash of what must agree for two runs to be compared"),
        _VARIANT,
        _VARIANT_ID,
        _ROLE,
        _SIDE,
        _PHASE,
        _METRIC,
        _UNIT,
        FrameColumn("higher_is_better", "flag", "whether a larger value is better"),
        FrameColumn("value", "number", "the estimate over replicates; for memory the maximum"),
        FrameColumn("low", "number", "lower end of the interval; missing if there is none"),
        FrameColumn("high", "number", "upper end"),
        FrameColumn(
            "interval", "text",
            "what `low` and `high` are: `95 % of the mean` (Student's t over replicates), `95 % of the median` (order "
            "statistics), or `range` (smallest and largest)",
        ),
        FrameColumn("replicates", "count", "trials in the estimate"),
        FrameColumn("samples", "count", "samples of all trials together; they do not narrow the interval"),
        _INTERLEAVING,
        *VALIDITY,
        *SETTINGS,
    ),
    "comparisons": (
        _RUN,
        _VARIANT,
        FrameColumn("role", "text", "`variant`, or `control`: the base of the comparison against itself"),
        FrameColumn("base", "text", "the denominator: the reference, or the base of an A/B"),
        FrameColumn("candidate", "text", "the numerator: the variant, or the candidate of an A/B"),
        _METRIC,
        FrameColumn("ratio", "number", "candidate over base; above 1 is worse, also for rates"),
        FrameColumn("difference", "number", "of some metrics, in place of the ratio: candidate minus base"),
        FrameColumn("share", "number", "of a loss, in place of the ratio: the part of the base's gain"),
        FrameColumn("low", "number", "lower end of its interval; missing if there is none"),
        FrameColumn("high", "number", "upper end"),
        FrameColumn("verdict", "text", "`improved`, `regressed`, `equivalent`, `inconclusive`, `invalid`, …"),
        FrameColumn("reason", "text", "the reason for the verdict"),
        FrameColumn("replicates", "count", "pairs of trials"),
        FrameColumn("replicates_needed", "count", "total replicates expected for a decision; missing if none suffice"),
        FrameColumn("mde80", "number", "smallest slow-down that is detected with 80 % power, as a fraction"),
        FrameColumn("tolerance", "number", "smallest slow-down that is a regression, as a fraction"),
        FrameColumn("margin", "number", "differences within it count as equivalent, as a fraction"),
        _INTERLEAVING,
    ),
}  # fmt: skip
"""The columns of each table, in order."""


def table_columns(table: TableName) -> tuple[str, ...]:
    """The names of a table's columns."""
    return tuple(column.name for column in TABLES[table])
