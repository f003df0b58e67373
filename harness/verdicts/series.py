"""From records to what the statistics take: one list of samples a trial, for a metric by name.

A variant may have several trials in a replicate: one that took turns with the others, and a solo one for what needs a
process that is alone. Each metric is measured by one kind of them only, so a metric's trials are those that have it,
and its pairing follows from how those alternated.

Derived metrics are computed here and nowhere else, so that a table, a saved benchmark and a comparison cannot
disagree. Only trials that are ok have a series: an invalid trial is shown as such and never ranked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records.metrics import LOSSES, METRICS, samples_of
from harness.records.record import Interleaving, Role, Side, TrialRecord
from harness.stats import (
    Comparison,
    Estimate,
    KeptPairs,
    Pairing,
    QuantileEstimate,
    compare_family,
    compare_trials,
    effective_size,
    estimate_trials,
    kept_pairs,
    median_interval,
    percentile,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The trials of one variant (or of the control), in order of replicates."""

    name: str
    role: Role
    records: tuple[TrialRecord, ...]

    @property
    def ok(self) -> tuple[TrialRecord, ...]:
        """Trials whose numbers count."""
        return tuple(record for record in self.records if record.status == "ok")

    def trials(self, metric: str) -> list[tuple[float, ...]]:
        """One list of samples a trial that has any."""
        return [samples_of(record, metric) for record in self.measuring(metric)]

    def measuring(self, metric: str) -> tuple[TrialRecord, ...]:
        """Trials that are ok and have the metric; of losses those after the most steps, as no others are of the same
        training."""
        having = tuple(record for record in self.ok if samples_of(record, metric))
        if metric not in LOSSES:
            return having
        return tuple(record for record in having if _steps(record) == max(map(_steps, having)))

    def interleaving(self, metric: str) -> Interleaving | None:
        """How the trials that measured the metric alternated with those of other variants; None without any."""
        return next((record.interleaving for record in self.measuring(metric)), None)

    def estimate(self, metric: str) -> Estimate | QuantileEstimate | None:
        """The metric's estimate over replicates; None where nothing was measured.

        A cold start is one value a process, of no known shape: its median, with the interval of its order statistics.
        """
        trials = self.trials(metric)
        if trials and METRICS[metric].phase == "cold":
            return median_interval([sample for trial in trials for sample in trial])
        return estimate_trials(trials) if trials else None

    def percentile(self, metric: str, q: float) -> QuantileEstimate | None:
        """The quantile `q` of a metric's samples, if their effective number supports it; None without samples."""
        trials = self.trials(metric)
        if not trials:
            return None
        effective = sum(effective_size(trial) for trial in trials)
        return percentile([sample for trial in trials for sample in trial], q, effective_size=effective)


def series_of(records: Sequence[TrialRecord], side: Side = "") -> dict[tuple[str, Role], Series]:
    """Records of one side grouped by variant and role, each in order of replicates, groups in order of appearance."""
    records = [record for record in records if record.side == side]
    keys = list(dict.fromkeys((record.name, record.role) for record in records))
    return {
        (name, role): Series(
            name=name,
            role=role,
            records=tuple(
                sorted(
                    (record for record in records if (record.name, record.role) == (name, role)),
                    key=lambda record: record.replicate,
                )
            ),
        )
        for name, role in keys
    }


Trials = list[tuple[float, ...]]
OCCUPANCY_FLOOR = 0.95
"""CPU time over wall time below which a CPU trial was disturbed. On a noisy machine keeping only what lies above cut
the spread between processes from 29 % to 7 % (docs/method.md)."""
LEAST_PAIRS = 5
"""Where fewer undisturbed pairs would remain, all are kept."""


def occupancy(record: TrialRecord) -> float | None:
    """CPU time over wall time of the timed steps.

    None where either is missing, and for a trial of several threads: these wait for each other and for what only one of
    them does, so they leave CPUs idle with nobody else on the machine.
    """
    wall, cpu = sum(record.samples.get("step_time_s", ())), record.samples.get("step_cpu_time_s", ())
    return sum(cpu) / wall if wall and cpu and record.values.get("threads", 1.0) == 1 else None


def undisturbed(base: Series, candidate: Series, metric: str) -> KeptPairs | None:
    """Which pairs of trials to compare, by a flag that does not look at their times; None where none can be dropped.

    Trials that took turns shared every disturbance, and on a GPU the host may rightly wait: nothing is dropped there.
    """
    if pairing_of(base, metric) == "turn" or METRICS[metric].unit not in ("s", "1/s"):
        return None
    pairs = _pairs(base, candidate, metric)
    flags = [[occupancy(record) for record in side] for side in zip(*pairs, strict=True)]
    if not pairs or any(share is None for side in flags for share in side) or _on_device(pairs[0][0]):
        return None
    low = [[share is not None and share < OCCUPANCY_FLOOR for share in side] for side in flags]
    return kept_pairs(low[0], low[1], least=LEAST_PAIRS)


def _on_device(record: TrialRecord) -> bool:
    return any(kind.startswith("device_") for kind in record.memory)


def compare_series(base: Series, candidate: Series, metric: str, *, family: int = 1) -> Comparison | None:
    """The comparison over the replicates that both have, paired as they alternated; None where there is none."""
    pairs = paired_trials(base, candidate, metric)
    if pairs is None:
        return None
    found = compare_trials(*pairs, pairing=pairing_of(base, metric), family=family)
    return with_drops(found, undisturbed(base, candidate, metric))


def with_drops(comparison: Comparison, drops: KeptPairs | None) -> Comparison:
    """The comparison with what was dropped in its reason; the counts belong to the verdict."""
    if drops is None or not (drops.base_flagged or drops.candidate_flagged):
        return comparison
    return dataclasses.replace(comparison, reason=f"{comparison.reason}; disturbed trials: {drops.reason}")


def compare_to_reference(base: Series, candidates: Sequence[Series], metric: str) -> dict[str, Comparison]:
    """Every candidate against the base, by name, with one error rate for all of them (Holm)."""
    pairs = {candidate.name: paired_trials(base, candidate, metric) for candidate in candidates}
    found = {name: pair for name, pair in pairs.items() if pair is not None}
    compared = compare_family(found, pairing=pairing_of(base, metric))
    by_name = {candidate.name: candidate for candidate in candidates}
    return {name: with_drops(one, undisturbed(base, by_name[name], metric)) for name, one in compared.items()}


def pairing_of(series: Series, metric: str) -> Pairing:
    """Trials that took turns are paired turn by turn, others of one run by replicate."""
    return "turn" if series.interleaving(metric) in ("shared-base", "lockstep") else "replicate"


def paired_trials(base: Series, candidate: Series, metric: str) -> tuple[Trials, Trials] | None:
    """Samples of the replicates that both have, in the same order; None where there is none.

    Pairs of disturbed trials are left out (`undisturbed`), unless one side is disturbed more often than the other. A
    metric of which more is better is given by its inverse, so that above 1 is always worse.
    """
    pairs = _pairs(base, candidate, metric)
    drops = undisturbed(base, candidate, metric)
    if drops is not None and drops.balanced:
        pairs = [pairs[index] for index in drops.kept]
    if not pairs:
        return None
    left, right = ([samples_of(record, metric) for record in side] for side in zip(*pairs, strict=True))
    if METRICS[metric].higher_is_better:
        left, right = [_inverse(samples) for samples in left], [_inverse(samples) for samples in right]
    return left, right


def _pairs(base: Series, candidate: Series, metric: str) -> list[tuple[TrialRecord, TrialRecord]]:
    """Trials of the replicates in which both sides measured the metric; of losses those after the same training.

    Turns are paired with turns of the same attempt only: a run that broke off while the second was being written holds
    both.
    """
    others = {record.replicate: record for record in candidate.measuring(metric)}
    pairs = [(record, others[record.replicate]) for record in base.measuring(metric) if record.replicate in others]
    if pairing_of(base, metric) == "turn":
        pairs = [(ours, theirs) for ours, theirs in pairs if ours.attempt == theirs.attempt]
    return [pair for pair in pairs if metric not in LOSSES or _trained_alike(*pair)]


def _steps(record: TrialRecord) -> float:
    return record.values.get("training_steps", 0.0)


def _trained_alike(base: TrialRecord, candidate: TrialRecord) -> bool:
    """Whether both came to the end of their plan, or to the same step before it."""
    cut = any("training_steps_planned" in record.values for record in (base, candidate))
    return not cut or _steps(base) == _steps(candidate)


def without_equivalent(comparison: Comparison, reason: str) -> Comparison:
    """A comparison that must not claim equality, because the control does not bear it out."""
    if comparison.verdict != "equivalent":
        return comparison
    # No number of replicates of this pair leads to "equivalent": it is the control that must be measured better.
    return dataclasses.replace(comparison, verdict="inconclusive", reason=reason, replicates_needed=None)


def _inverse(samples: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(1 / sample for sample in samples)
