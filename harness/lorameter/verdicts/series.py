"""From records to what the statistics take: one list of samples a trial, for a metric by name.

A variant may have several trials in a replicate: one that took turns with the others, and an isolated one for what
needs a process of its own. Each metric is measured by one kind of them only, so a metric's trials are those that
have it, and its pairing follows from how those alternated.

How samples follow from a record is said by the table of metrics and nowhere else, so that a report, a saved benchmark
and a comparison cannot disagree. Only trials that are ok have a series: an invalid trial is shown as such and never
ranked.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records.metrics import METRICS, PRIMARY, Phase, Samples, samples_of
from lorameter.records.record import Interleaving, Role, Side, TrialRecord
from lorameter.stats import (
    Comparison,
    Effect,
    Estimate,
    KeptPairs,
    Pairing,
    QuantileEstimate,
    Verdict,
    VerdictRule,
    compare_trials,
    decide,
    decide_family,
    effect_of,
    effective_size,
    estimate_trials,
    kept_pairs,
    percentile,
    share_scatter,
)
from lorameter.studies.study import Study

Trial = tuple[TrialRecord, Samples]
"""A trial and its samples of one metric."""
Trials = list[Samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The trials of one variant (or of the control), in order of replicates."""

    name: str
    role: Role
    records: tuple[TrialRecord, ...]
    _known: dict[str, tuple[Trial, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What `measured` has worked out; every table asks for it several times, and records do not change."""

    @property
    def ok(self) -> tuple[TrialRecord, ...]:
        """Trials whose numbers count."""
        return tuple(record for record in self.records if record.status == "ok")

    def measured(self, metric: str) -> tuple[Trial, ...]:
        """Trials that are ok and have the metric; of losses those after the number of steps that most of them took, as
        no others are of the same training."""
        if metric not in self._known:
            trials = [trial for record in self.ok if (trial := (record, samples_of(record, metric)))[1]]
            if METRICS[metric].is_loss:
                counts = Counter(_steps(record) for record, _ in trials)
                common = max(counts, key=lambda steps: (counts[steps], steps), default=0.0)
                trials = [trial for trial in trials if _steps(trial[0]) == common]
            self._known[metric] = tuple(trials)
        return self._known[metric]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that any of these trials has, without working out the samples of all of them."""
        ok = self.ok
        held = set[str]().union(*(record.samples for record in ok), *(record.values for record in ok))
        asked = (metric for metric in METRICS.values() if metric.derive is not None or metric.name in held)
        return tuple(metric.name for metric in asked if any(map(metric.samples_of, ok)))

    def measuring(self, metric: str) -> tuple[TrialRecord, ...]:
        """The records of these trials."""
        return tuple(record for record, _ in self.measured(metric))

    def trials(self, metric: str) -> Trials:
        """The samples of these trials."""
        return [samples for _, samples in self.measured(metric)]

    def interleaving(self, metric: str) -> Interleaving | None:
        """How the trials that measured the metric alternated with those of other variants; None without any. A cold
        start is alone in its turn, whatever its trial was in."""
        found = next((record.interleaving for record, _ in self.measured(metric)), None)
        return "replicates" if found is not None and METRICS[metric].phase == "cold" else found

    def estimate(self, metric: str) -> Estimate | None:
        """The metric's estimate over replicates; None where nothing was measured.

        Where these were measured on several sites its interval is over the sites, which differ by more than what
        replicates of one scatter by.
        """
        trials, sites = self.trials(metric), [record.site for record in self.measuring(metric)]
        with _named(self.name, metric):
            return estimate_trials(trials, blocks=sites) if trials else None

    def percentile(self, metric: str, q: float) -> QuantileEstimate | None:
        """The quantile `q` of a metric's samples, if their effective number supports it; None without samples."""
        trials = self.trials(metric)
        if not trials:
            return None
        with _named(self.name, metric):
            effective = sum(effective_size(trial) for trial in trials)
            return percentile([sample for trial in trials for sample in trial], q, effective_size=effective)


@contextlib.contextmanager
def _named(name: str, metric: str) -> Iterator[None]:
    """Meanwhile what the statistics refuse is an `InvalidRunError` that says of which numbers."""
    try:
        yield
    except ValueError as error:
        raise InvalidRunError(f"{metric} of {name}: no number can be had from its samples: {error}.") from None


Groups = Mapping[tuple[str, Role], Series]
"""Series by variant and role."""


def group_trials(records: Sequence[TrialRecord], side: Side = "") -> dict[tuple[str, Role], Series]:
    """Records of one side grouped by variant and role, each in order of replicates, groups in order of appearance.

    Raises `UsageError` for records of sites that may be unlike, so that they are not combined by accident
    (`lorameter.verdicts.sites`).
    """
    if any(record.machine for record in records):
        raise UsageError(
            "these trials are of sites that are different machines, and no number holds over all of them. Read each "
            "site by `lorameter report RUN`."
        )
    groups: dict[tuple[str, Role], list[TrialRecord]] = {}
    for record in records:
        if record.side == side:
            groups.setdefault((record.name, record.role), []).append(record)
    return {
        (name, role): Series(name=name, role=role, records=tuple(sorted(group, key=lambda record: record.replicate)))
        for (name, role), group in groups.items()
    }


OCCUPANCY_FLOOR = 0.95
"""CPU time over wall time below which a CPU trial was disturbed. On a noisy machine keeping only what lies above cut
the spread between processes from 29 % to 7 % (docs/method.md)."""
LEAST_UNDISTURBED = 5
"""Where fewer undisturbed pairs would remain, all are kept."""


def occupancy(record: TrialRecord) -> float | None:
    """CPU time over wall time of the timed steps.

    None where either is missing, and for a trial of several threads: these wait for each other and for what only one of
    them does, so they leave CPUs idle even if nothing else runs.
    """
    wall, cpu = sum(record.samples.get("step_time_s", ())), record.samples.get("step_cpu_time_s", ())
    return sum(cpu) / wall if wall and cpu and record.values.get("threads", 1.0) == 1 else None


def occupancies(records: Iterable[TrialRecord]) -> tuple[list[float], list[float]]:
    """The occupancies of trials of one thread, and those of them that say that other work took their CPU."""
    shares = [share for record in records if (share := occupancy(record)) is not None]
    return shares, [share for share in shares if share < OCCUPANCY_FLOOR]


def _on_device(record: TrialRecord) -> bool:
    return any(kind.startswith("device_") for kind in record.memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Samples of two series in the replicates in which both measured a metric, the pairs that were dropped left out."""

    base: Trials
    candidate: Trials
    pairing: Pairing
    drops: KeptPairs | None
    """Which pairs were kept; None where none could be dropped."""


def pairs_of(base: Series, candidate: Series, metric: str) -> Pairs | None:
    """What two series say of each other in one metric, as measured; None where no replicate is in both.

    Pairs of disturbed trials are left out (`_undisturbed`), unless one side is disturbed more often than the other.
    """
    pairing = pairing_of(base, metric)
    found = _common(base, candidate, metric, pairing)
    drops = _undisturbed([(ours, theirs) for (ours, _), (theirs, _) in found], metric, pairing)
    if drops is not None and drops.balanced:
        found = [found[index] for index in drops.kept]
    if not found:
        return None
    return Pairs(
        base=[samples for (_, samples), _ in found],
        candidate=[samples for _, (_, samples) in found],
        pairing=pairing,
        drops=drops,
    )


def compare_series(base: Series, candidate: Series, metric: str, *, family: int = 1) -> Comparison | None:
    """The comparison over the replicates that both have, paired as they alternated; None where there is none."""
    pairs = pairs_of(base, candidate, metric)
    if pairs is None:
        return None
    with _named(candidate.name, metric):
        found = compare_trials(
            as_worse_is_higher(pairs.base, metric),
            as_worse_is_higher(pairs.candidate, metric),
            pairing=pairs.pairing,
            family=family,
        )
    return with_drops(found, pairs.drops)


def with_drops(comparison: Comparison, drops: KeptPairs | None) -> Comparison:
    """The comparison with what was dropped in its reason; the counts belong to the verdict."""
    if drops is None or not (drops.base_flagged or drops.candidate_flagged):
        return comparison
    return dataclasses.replace(comparison, reason=f"{comparison.reason}; disturbed trials: {drops.reason}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceEffect:
    """The effect of one series against the reference of its run."""

    effect: Effect
    drops: KeptPairs | None
    """Which pairs of trials were kept; None where none could be dropped."""

    def compare(self, rule: VerdictRule) -> Comparison:
        """The verdict by a rule."""
        return with_drops(decide(self.effect, rule), self.drops)


def effects_against(groups: Groups, reference: str, metric: str) -> dict[tuple[str, Role], ReferenceEffect]:
    """Every other series of a run against its reference, by variant and role, with the scatter that they share.

    The scatter is shared by the series that have all replicates of the reference; any other keeps its own.
    """
    base = groups[reference, "variant"]
    pairs = {key: pairs_of(base, series, metric) for key, series in groups.items() if key != (reference, "variant")}
    effects: dict[tuple[str, Role], Effect] = {}
    for key, pair in pairs.items():
        if pair is not None:
            with _named(key[0], metric):
                effects[key] = effect_of(
                    as_worse_is_higher(pair.base, metric), as_worse_is_higher(pair.candidate, metric), pair.pairing
                )
    whole = {key: effect for key, effect in effects.items() if effect.replicates == len(base.measured(metric))}
    effects |= share_scatter(whole)
    return {
        key: ReferenceEffect(effect=effect, drops=None if (pair := pairs[key]) is None else pair.drops)
        for key, effect in effects.items()
    }


def compare_to_reference(
    groups: Groups,
    reference: str,
    metric: str,
    *,
    tolerance: float | Mapping[str, float] = 0.01,
    margin: float | Mapping[str, float] = 0.05,
) -> dict[str, Comparison]:
    """Every variant against the reference, by name, with one error rate for all of them; limits are fractions, of all
    or by name."""
    found = {name: one for (name, role), one in effects_against(groups, reference, metric).items() if role == "variant"}
    effects = {name: one.effect for name, one in found.items()}
    compared = decide_family(effects, tolerance=tolerance, margin=margin)
    return {name: with_drops(one, found[name].drops) for name, one in compared.items()}


def compare_base_to_itself(records: Sequence[TrialRecord], phases: Sequence[Phase]) -> dict[Phase, Comparison | None]:
    """The base of an A/B against itself, by phase; None where it was not measured."""
    groups = group_trials(records, "base")
    twin = next((name for name, role in groups if role == "control"), "")
    base, again = groups.get((twin, "variant")), groups.get((twin, "control"))
    if base is None or again is None:
        return dict.fromkeys(phases)
    return {phase: compare_series(base, again, PRIMARY[phase], family=len(phases)) for phase in phases}


def control_of(groups: Groups, name: str, metric: str, *, family: int) -> Comparison | None:
    """The reference, by its name, against its second measurement; None where either has no trial."""
    if (name, "variant") not in groups:
        return None
    found = effects_against(groups, name, metric).get((name, "control"))
    return None if found is None else found.compare(VerdictRule(family=family))


def ratios_of(
    groups: Groups,
    study: Study,
    metric: str,
    control: Comparison | None,
    *,
    tolerance: float | Mapping[str, float] = 0.01,
    margin: float | Mapping[str, float] = 0.05,
) -> dict[str, Comparison]:
    """Every other variant against the reference, by name; none is equivalent where the control is not. Limits are
    fractions, of all or by name."""
    if (study.reference, "variant") not in groups:
        return {}
    found = compare_to_reference(groups, study.reference, metric, tolerance=tolerance, margin=margin)
    ratios = {variant.name: found[variant.name] for variant in study.variants if variant.name in found}
    if control is not None and control.verdict == "equivalent":
        return ratios
    reason = "A/A control inconclusive: equivalence cannot be claimed"
    return {name: downgrade_equivalent(ratio, reason) for name, ratio in ratios.items()}


def pairing_of(series: Series, metric: str) -> Pairing:
    """Trials that took turns are paired turn by turn, others of one run by replicate."""
    return "turn" if series.interleaving(metric) in ("shared-base", "lockstep") else "replicate"


def as_worse_is_higher(trials: Trials, metric: str) -> Trials:
    """Samples of which more is worse: of a metric of which more is better the inverse, so that above 1 is always worse.

    Zero stays zero, which has no ratio and is refused as such. What no metric of ours is, another project's, is a time.
    """
    if metric not in METRICS or not METRICS[metric].higher_is_better:
        return trials
    return [tuple(1 / sample if sample else 0.0 for sample in trial) for trial in trials]


def _common(base: Series, candidate: Series, metric: str, pairing: Pairing) -> list[tuple[Trial, Trial]]:
    """Trials of the replicates in which both sides measured the metric; of losses those after the same training.

    Turns are paired with turns of the same attempt only: an interrupted run while the second was being written holds
    both.
    """
    others = {record.replicate: (record, samples) for record, samples in candidate.measured(metric)}
    pairs = [(ours, others[ours[0].replicate]) for ours in base.measured(metric) if ours[0].replicate in others]
    if pairing == "turn":
        pairs = [(ours, theirs) for ours, theirs in pairs if ours[0].attempt == theirs[0].attempt]
    if METRICS[metric].is_loss:
        pairs = [(ours, theirs) for ours, theirs in pairs if _trained_alike(ours[0], theirs[0])]
    return pairs


def _undisturbed(pairs: Sequence[tuple[TrialRecord, TrialRecord]], metric: str, pairing: Pairing) -> KeptPairs | None:
    """Which pairs of trials to compare, by a flag that does not look at their times; None where none can be dropped.

    Trials that took turns shared every disturbance, and on a GPU the host may rightly wait: nothing is dropped there.
    """
    if not pairs or pairing == "turn" or METRICS[metric].unit not in ("s", "1/s") or _on_device(pairs[0][0]):
        return None
    flags = [[occupancy(record) for record in side] for side in zip(*pairs, strict=True)]
    if any(share is None for side in flags for share in side):
        return None
    low = [[share is not None and share < OCCUPANCY_FLOOR for share in side] for side in flags]
    return kept_pairs(low[0], low[1], least=LEAST_UNDISTURBED)


def _steps(record: TrialRecord) -> float:
    return record.values.get("training_steps", 0.0)


def _trained_alike(base: TrialRecord, candidate: TrialRecord) -> bool:
    """Whether both came to the end of their plan, or to the same step before it."""
    cut = any("training_steps_planned" in record.values for record in (base, candidate))
    return not cut or _steps(base) == _steps(candidate)


def is_difference(comparison: Comparison) -> bool:
    """Whether the sides differ, either way; of a control it says that no number of the run can be believed."""
    return comparison.verdict in ("improved", "regressed")


def verdict_only(verdict: Verdict, reason: str) -> Comparison:
    """A verdict where there was nothing to compute, or where the numbers must not be believed."""
    return Comparison(
        verdict=verdict,
        ratio=None,
        low=None,
        high=None,
        reason=reason,
        replicates=0,
        replicates_needed=None,
        mde80=None,
    )


def downgrade_equivalent(comparison: Comparison, reason: str) -> Comparison:
    """A comparison that must not claim equality, because the control does not bear it out."""
    if comparison.verdict != "equivalent":
        return comparison
    # No number of replicates of this pair leads to "equivalent": it is the control that must be measured better.
    return dataclasses.replace(comparison, verdict="inconclusive", reason=reason, replicates_needed=None)
