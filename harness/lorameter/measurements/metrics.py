"""The measurements and their metrics, by name; and how to derive the samples of a metric from a record.

A metric is an entry of its measurement. Its samples, its column in a report, its row in a comparison and whether it is
a loss follow from that entry.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

from lorameter.errors import InvalidRunError, UsageError, require, shorten
from lorameter.measurements.answers import ANSWERS
from lorameter.measurements.cold import COLD_STARTS
from lorameter.measurements.declaration import GENERATE, TRAIN, Measurement, Metric, Samples
from lorameter.measurements.merged import MERGED
from lorameter.measurements.peaks import PEAKS as MEMORY_PEAKS
from lorameter.measurements.requests import REQUESTS
from lorameter.measurements.steps import STEPS
from lorameter.records.record import TrialRecord

GROUP = "lorameter.measurements"
"""The group of entry points by which another package registers a measurement under its name."""


def _load_installed() -> Iterator[Measurement]:
    """The measurements of installed packages. Raises `UsageError` for one that cannot be loaded."""
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            found = point.load()
        except Exception as error:  # any code of the package may have run
            raise UsageError(
                f"{GROUP}: the measurement {point.name!r} of {point.value} cannot be loaded: {shorten(str(error))}. "
                "Repair or uninstall its package."
            ) from None
        require(
            isinstance(found, Measurement) and found.name == point.name and found.phase in (TRAIN, GENERATE),
            f"{GROUP}: {point.value} is registered as {point.name!r}, and is no measurement with this name in the "
            f"phase {TRAIN.name} or {GENERATE.name}. Correct its package.",
        )
        yield found


MEASUREMENTS: dict[str, Measurement] = {
    one.name: one for one in (STEPS, REQUESTS, ANSWERS, MEMORY_PEAKS, *_load_installed(), MERGED, COLD_STARTS)
}
"""By name, in the order in which they are measured. A merged adapter has changed the base, so it comes last in a
process."""
FUNCTIONS: dict[str, str] = {
    command.name: f"{one.implementation}:{command.name}"
    for one in reversed(MEASUREMENTS.values())
    for command in one.commands
}
"""The function that executes each command in the process of a trial; a command that two measurements share is that of
the first one."""
METRICS: dict[str, Metric] = {
    metric.name: dataclasses.replace(metric, phase=metric.phase or one.phase.name)
    for one in MEASUREMENTS.values()
    for metric in one.metrics
}
"""By name, in display order."""
MEASURED_BY: dict[str, str] = {metric.name: one.name for one in MEASUREMENTS.values() for metric in one.metrics}
"""The measurement of each metric."""
PHASE_TITLES: dict[Phase, str] = {one.phase.name: one.phase.title for one in MEASUREMENTS.values()}
PHASE_WORDS: dict[Phase, str] = {one.phase.name: one.phase.words for one in MEASUREMENTS.values()}
PHASES: tuple[Phase, ...] = tuple(PHASE_TITLES)
if TYPE_CHECKING:
    Phase: TypeAlias = str
    Measure: TypeAlias = str
else:
    Phase, Measure = Literal[PHASES], Literal[tuple(MEASUREMENTS)]


def phases_of(measures: Iterable[Measure]) -> tuple[Phase, ...]:
    """The phases that have one of these measures; peaks are measured beside others."""
    found = {MEASUREMENTS[measure].phase.name for measure in measures if measure != MEMORY_PEAKS.name}
    return tuple(phase for phase in PHASES if phase in found)


def common_measures(measures: Iterable[Collection[Measure]], *, ranks: int) -> tuple[Measure, ...]:
    """What can be measured of every variant, by what can be measured of each; of several ranks, training alone."""
    found = [name for name, one in MEASUREMENTS.items() if ranks == 1 or one.phase is TRAIN]
    for known in measures:
        found = [name for name in found if name in known]
    return tuple(found)


PEAKS: dict[Phase, tuple[str, ...]] = {
    phase: tuple(kind for one in MEASUREMENTS.values() for kind in one.memory.get(phase, ())) for phase in PHASES
}
"""Kinds of memory whose peaks represent a phase; the first measured kind is shown."""
PRIMARY: dict[Phase, str] = {metric.phase: metric.name for metric in reversed(METRICS.values())}
"""The metric that represents a phase in pytest-benchmark and in the ratio column: the first one of the phase."""


def is_difference_metric(metric: str) -> bool:
    """Whether values of the metric are compared by their difference."""
    return metric in METRICS and METRICS[metric].compare == "difference"


def primary_metric(phase: Phase, *, own_workloads: bool) -> str:
    """The metric by which variants are compared in a phase. Steps of different workloads hold different numbers of
    tokens, so their times cannot be compared; the time per real token can."""
    return "time_per_real_token_s" if phase == "train" and own_workloads else PRIMARY[phase]


def get_samples(record: TrialRecord, metric: str) -> Samples:
    """Samples of one trial; empty if it has none.

    Raises:
        KeyError: the metric is unknown, which must not look like "not measured".
        InvalidRunError: the record is one that no trial writes.
    """
    derive = METRICS[metric].derive
    if derive is None:
        return record.samples.get(metric, (record.values[metric],) if metric in record.values else ())
    try:
        return derive(record)
    except (ArithmeticError, LookupError, ValueError) as error:
        raise InvalidRunError(
            f"trial {record.trial}: {metric} cannot be computed from its record: {error}. Restore trials.jsonl, or "
            "measure again."
        ) from None


def phase_columns(phase: Phase, *, own_workloads: bool) -> tuple[str, ...]:
    """Metrics that are columns of a phase's table; `own_workloads`: whether variants have different workloads."""
    shown = ("always", "own workloads" if own_workloads else "one workload")
    return tuple(metric.name for metric in METRICS.values() if metric.phase == phase and metric.column in shown)
