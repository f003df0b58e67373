"""One side of a comparison, read from a run of ours: trials a variant and metric, and what forbids believing them.

A comparison never looks at a run or a file itself. What it needs of a side is here, with the facts that must agree
before any ratio is taken, so that a run directory and a saved benchmark file cannot be judged by different rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.machine import provenance
from harness.records import codec, store
from harness.records.record import Notice, TrialRecord
from harness.records.store import Run
from harness.records.units import METRICS
from harness.report.view import view_of
from harness.stats import Comparison
from harness.studies.study import Study
from harness.studies.variant import Variant
from harness.verdicts.series import Series, Trials, series_of

BYTES_SUFFIX = "_bytes"
"""Ends the name of every kind of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One variant as one side measured it."""

    name: str
    id: str | None = None
    """Content id of the variant; None where the file does not know it."""
    variant: Variant | None = None
    trials: Mapping[str, Trials] = field(default_factory=dict)
    """One list of samples a trial, by metric."""
    peaks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """One value a trial, by kind of memory."""
    broken: str | None = None
    """Why no number of this variant counts."""
    no_interval: str | None = None
    """Why these samples give a ratio and no more."""

    def has(self, metric: str) -> bool:
        """Whether this side measured that metric or kind of memory."""
        return bool(self.peaks.get(metric) if metric.endswith(BYTES_SUFFIX) else self.trials.get(metric))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparand:
    """One side of a comparison."""

    name: str
    sides: Mapping[str, Measured] = field(default_factory=dict)
    facts: Mapping[str, Any] | None = None
    """What must agree with the other side; None where nothing is known."""
    fingerprint: str | None = None
    study: str | None = None
    phases: tuple[str, ...] = ()
    control: Mapping[str, Comparison | None] = field(default_factory=dict)
    """By phase; None: it should have been measured and was not."""
    broken: str | None = None
    """Why no number of this side counts."""
    absent: str | None = None
    """Why there is no such side at all: a baseline that nobody accepted."""
    notices: tuple[Notice, ...] = ()

    def without(self, names: frozenset[str]) -> Comparand:
        """This side with some variants left out on purpose."""
        return dataclasses.replace(self, sides={name: side for name, side in self.sides.items() if name not in names})


def read_comparand(name: str, runs: Path) -> Comparand:
    """A run by id or directory, or a pytest-benchmark file.

    Raises:
        UsageError: none of these, or one that cannot be read.
    """
    if Path(name).is_file():
        from harness.verdicts.benchmark_json import read_benchmark_json

        return read_benchmark_json(Path(name))
    try:
        return comparand_of(store.read_run(name, runs))
    except UsageError as error:
        if (runs / name).is_dir() or Path(name).exists():
            raise
        raise UsageError(f"{error} A pytest-benchmark .json file works too; there is none at {name!r}.") from None


def comparand_of(run: Run) -> Comparand:
    """A run of ours as a side of a comparison. Raises `UsageError` for an A/B run, which has two sides."""
    if run.manifest.sides:
        raise UsageError(
            f"run {run.manifest.run}: an A/B run holds both of its sides and its own comparison. Read it with "
            f"`lorameter report {run.manifest.run}`."
        )
    study = codec.from_json(Study, run.manifest.study, f"run {run.manifest.run}")
    control: dict[str, Comparison | None] = {table.phase: table.control for table in view_of(run).tables}
    groups = series_of(run.records)
    sides = {
        name: measured_of(series, study, run.manifest.run)
        for (name, role), series in groups.items()
        if role == "variant"
    }
    reasons = [*run_faults(run), *control_faults(control)]
    return Comparand(
        name=run.manifest.run,
        sides=sides,
        facts=codec.to_json(provenance.comparable(run.manifest.provenance)),
        fingerprint=run.manifest.fingerprint,
        study=study.name,
        phases=run.manifest.phases,
        control=control,
        broken=f"run {run.manifest.run}: {listed(reasons)}" if reasons else None,
    )


MOST_FAULTS = 3
"""Faults that are spelt out; a crash at the start of every trial has as many as there are trials."""


def listed(faults: Sequence[str]) -> str:
    """The first few faults, and how many there are beside them."""
    more = len(faults) - MOST_FAULTS
    return "; ".join(faults[:MOST_FAULTS]) + (f"; and {more} more" if more > 0 else "")


def control_faults(control: Mapping[str, Comparison | None]) -> Iterator[str]:
    """What the controls of a side say against all of its numbers."""
    for phase, result in control.items():
        if result is None:
            yield f"the control of phase {phase!r} was not measured"
        elif result.verdict in ("improved", "regressed"):
            yield f"its control {result.verdict} in phase {phase!r}: the reference differs from itself"


def run_faults(run: Run) -> Iterator[str]:
    """What makes every number of a run doubtful: it is not complete, lines or trials are missing."""
    if run.manifest.status != "complete":
        yield f"its status is {run.manifest.status!r}, not 'complete'"
    if run.damaged_lines:
        yield f"{run.damaged_lines} lines of trials.jsonl are damaged"
    known = {record.trial for record in run.records}
    missing = [trial for trial in run.manifest.order if trial not in known]
    if missing:
        yield f"{len(missing)} planned trials left no record, {missing[0]} among them"
    for record in run.records:
        if record.role == "control" and record.status != "ok":
            yield f"trial {record.trial} of the control is {record.status}"


def measured_of(series: Series, study: Study, run: str) -> Measured:
    """One variant of a run, with the reason why it does not count, if there is one."""
    faults = [fault for record in series.records for fault in _trial_faults(record, study)]
    variants = {variant.name: variant for variant in study.variants}
    ids = {record.variant for record in series.records}
    if len(ids) > 1:
        faults.append(f"its trials are of {len(ids)} different variants")
    kinds = dict.fromkeys(kind for record in series.ok for kind in record.memory if kind.endswith(BYTES_SUFFIX))
    return Measured(
        name=series.name,
        id=series.records[0].variant,
        variant=variants.get(series.name),
        trials={metric: trials for metric in METRICS if (trials := series.trials(metric))},
        peaks={
            kind: tuple(float(record.memory[kind]) for record in series.ok if kind in record.memory) for kind in kinds
        },
        broken=f"run {run}: {listed(faults)}" if faults else None,
    )


def _trial_faults(record: TrialRecord, study: Study) -> Iterator[str]:
    if record.status != "ok":
        failure = record.failure
        said = f" in {failure.phase}: {failure.message}" if failure else ""
        yield f"trial {record.trial} is {record.status}{said}"
    elif not study.allow_fallback:
        for check in record.checks:
            if check.get("required") is not None and check.get("status") != "active":
                yield f"trial {record.trial}: required path {check.get('path')} is {check.get('status')}, not active"
