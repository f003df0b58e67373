"""From records to samples, from samples to pairs of sides, and from pairs to verdicts.

Whatever is compared is a `Pair`: the samples of one metric on two sides, with what trial i of either side have in
common. Two runs, two sides of an A/B, a variant and the reference of its run, and a reference and its second
measurement differ in how the sides are paired, and are judged by one function (`judge`).

A variant may have several trials in a replicate: one that took turns with the others, and an isolated one for what
needs a process of its own. Each metric is measured by one kind of them only, so a metric's trials are those that
have it, and its pairing follows from how those alternated.

The table of metrics alone defines how samples follow from a record, so that a report, a saved benchmark and a
comparison cannot disagree. Only trials that are ok have a series: an invalid trial is shown as such and never
ranked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

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
    compare_bytes,
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

K = TypeVar("K")
Trial = tuple[TrialRecord, Samples]
"""A trial and its samples of one metric."""
Trials = list[Samples]
Key = tuple[str, str]
"""A variant and a metric."""
TOLERANCE, MARGIN = 0.01, 0.05


def is_memory(metric: str) -> bool:
    """Whether it is a kind of memory, of which a trial has one value in bytes."""
    return metric.endswith("_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The trials of one variant (or of the control), in order of replicates."""

    name: str
    role: Role
    records: tuple[TrialRecord, ...]
    _known: dict[str, tuple[Trial, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Cache of `measured`, which every table calls several times; records do not change."""

    @property
    def ok(self) -> tuple[TrialRecord, ...]:
        """Trials whose numbers count."""
        return tuple(record for record in self.records if record.status == "ok")

    def measured(self, metric: str) -> tuple[Trial, ...]:
        """Trials that are ok and have the metric, or the kind of memory; of losses only those after the most common
        number of steps, since others are of another training."""
        if metric not in self._known:
            trials = [trial for record in self.ok if (trial := (record, _samples(record, metric)))[1]]
            if metric in METRICS and METRICS[metric].is_loss:
                counts = Counter(_steps(record) for record, _ in trials)
                common = max(counts, key=lambda steps: (counts[steps], steps), default=0.0)
                trials = [trial for trial in trials if _steps(trial[0]) == common]
            self._known[metric] = tuple(trials)
        return self._known[metric]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, and then the kinds of memory, that any of these trials has."""
        ok = self.ok
        held = set[str]().union(*(record.samples for record in ok), *(record.values for record in ok))
        likely = (metric for metric in METRICS.values() if metric.derive is not None or metric.name in held)
        kinds = dict.fromkeys(kind for record in ok for kind in record.memory if is_memory(kind))
        return (*(metric.name for metric in likely if any(map(metric.samples_of, ok))), *kinds)

    def measuring(self, metric: str) -> tuple[TrialRecord, ...]:
        """The records of these trials."""
        return tuple(record for record, _ in self.measured(metric))

    def trials(self, metric: str) -> Trials:
        """The samples of these trials."""
        return [samples for _, samples in self.measured(metric)]

    def interleaving(self, metric: str) -> Interleaving | None:
        """How the trials that measured the metric alternated with those of other variants; None without any. A cold
        start is alone in its turn, whatever its trial was in, and so is what measures peaks of memory."""
        found = next((record.interleaving for record, _ in self.measured(metric)), None)
        alone = is_memory(metric) or METRICS[metric].phase == "cold"
        return "replicates" if found is not None and alone else found

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


def _samples(record: TrialRecord, metric: str) -> Samples:
    if metric in METRICS:
        return samples_of(record, metric)
    return (float(record.memory[metric]),) if metric in record.memory else ()


def _steps(record: TrialRecord) -> float:
    return record.values.get("training_steps", 0.0)


@contextlib.contextmanager
def _named(name: str, metric: str) -> Iterator[None]:
    """Turns a refusal of the statistics into an `InvalidRunError` that names the variant and the metric."""
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


# --- pairs ------------------------------------------------------------------------------------------------------------

OCCUPANCY_FLOOR = 0.95
"""CPU time over wall time below which a CPU trial was disturbed. On a noisy machine keeping only what lies above cut
the spread between processes from 29 % to 7 % (docs/method.md)."""
LEAST_UNDISTURBED = 5
"""Where fewer undisturbed pairs would remain, all are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Samples of one metric on two sides, a list a trial; pairs of disturbed trials are left out."""

    metric: str
    base: Trials
    candidate: Trials
    pairing: Pairing = "none"
    """How trial i of the base and trial i of the candidate are related."""
    drops: KeptPairs | None = None
    """Which pairs were kept; None where none could be dropped."""
    no_interval: str = ""
    """Why these samples give a ratio and no more."""
    shared: Effect | None = None
    """The effect with the scatter that it shares with others; None where it shares none."""

    @property
    def effect(self) -> Effect:
        """The effect of the candidate. Raises ValueError as `stats.effect_of`."""
        if self.shared is not None:
            return self.shared
        base, candidate = (_as_worse_is_higher(trials, self.metric) for trials in (self.base, self.candidate))
        return effect_of(base, candidate, self.pairing)

    def compare(self, rule: VerdictRule) -> Comparison:
        """The verdict by a rule."""
        return self.with_drops(decide(self.effect, rule))

    def with_drops(self, comparison: Comparison) -> Comparison:
        """The comparison with what was dropped in its reason; the counts belong to the verdict."""
        drops = self.drops
        if drops is None or not (drops.base_flagged or drops.candidate_flagged):
            return comparison
        return dataclasses.replace(comparison, reason=f"{comparison.reason}; disturbed trials: {drops.reason}")


def pairing_of(series: Series, metric: str) -> Pairing:
    """Trials that took turns are paired turn by turn, others of one run by replicate; peaks are not paired."""
    if is_memory(metric):
        return "none"
    return "turn" if series.interleaving(metric) in ("shared-base", "lockstep") else "replicate"


def pairs_of(base: Series, candidate: Series, metric: str) -> Pair:
    """Two series of one run as a pair in one metric; empty where they share no replicate.

    Turns are paired with turns of the same attempt only: an interrupted run while the second was being written holds
    both. Of losses only those after the same training are paired. Pairs of disturbed trials are left out
    (`_undisturbed`), unless one side is disturbed more often than the other.
    """
    pairing = pairing_of(base, metric)
    if pairing == "none":
        return Pair(metric=metric, base=base.trials(metric), candidate=candidate.trials(metric))
    others = {record.replicate: (record, samples) for record, samples in candidate.measured(metric)}
    found = [(ours, others[ours[0].replicate]) for ours in base.measured(metric) if ours[0].replicate in others]
    if pairing == "turn":
        found = [(ours, theirs) for ours, theirs in found if ours[0].attempt == theirs[0].attempt]
    if METRICS[metric].is_loss:
        found = [(ours, theirs) for ours, theirs in found if _trained_alike(ours[0], theirs[0])]
    drops = _undisturbed([(ours, theirs) for (ours, _), (theirs, _) in found], metric, pairing)
    if drops is not None and drops.balanced:
        found = [found[index] for index in drops.kept]
    return Pair(
        metric=metric,
        base=[samples for (_, samples), _ in found],
        candidate=[samples for _, (_, samples) in found],
        pairing=pairing,
        drops=drops,
    )


def _trained_alike(base: TrialRecord, candidate: TrialRecord) -> bool:
    """Whether both came to the end of their plan, or to the same step before it."""
    cut = any("training_steps_planned" in record.values for record in (base, candidate))
    return not cut or _steps(base) == _steps(candidate)


def _undisturbed(pairs: Sequence[tuple[TrialRecord, TrialRecord]], metric: str, pairing: Pairing) -> KeptPairs | None:
    """Which pairs of trials to compare, by a flag that does not look at their times; None where none can be dropped.

    Trials that took turns shared every disturbance, and on a GPU the host may rightly wait: nothing is dropped there.
    """
    if not pairs or pairing == "turn" or METRICS[metric].unit not in ("s", "1/s"):
        return None
    if any(kind.startswith("device_") for kind in pairs[0][0].memory):
        return None
    shares = [[occupancy(record) for record in side] for side in zip(*pairs, strict=True)]
    flags = [[share < OCCUPANCY_FLOOR for share in side if share is not None] for side in shares]
    known = all(len(side) == len(pairs) for side in flags)
    return kept_pairs(flags[0], flags[1], least=LEAST_UNDISTURBED) if known else None


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


def _as_worse_is_higher(trials: Trials, metric: str) -> Trials:
    """Samples of which more is worse: of a metric of which more is better the inverse, so that above 1 is always worse.

    Zero stays zero, which has no ratio and is refused as such. A metric of another project is a time.
    """
    if metric not in METRICS or not METRICS[metric].higher_is_better:
        return trials
    return [tuple(1 / sample if sample else 0.0 for sample in trial) for trial in trials]


def share_effects(pairs: Mapping[K, Pair], replicates: int) -> dict[K, Pair]:
    """Pairs with one base, with the scatter that they share; those of another number of replicates keep their own."""
    effects = {key: pair.effect for key, pair in pairs.items()}
    effects |= share_scatter({key: effect for key, effect in effects.items() if effect.replicates == replicates})
    return {key: dataclasses.replace(pair, shared=effects[key]) for key, pair in pairs.items()}


def pairs_against(groups: Groups, reference: str, metric: str) -> dict[tuple[str, Role], Pair]:
    """Every other series of a run against its reference, by variant and role, with the scatter that they share."""
    base = groups[reference, "variant"]
    pairs = {key: pairs_of(base, series, metric) for key, series in groups.items() if series is not base}
    pairs = {key: pair for key, pair in pairs.items() if pair.base and pair.candidate}
    if is_memory(metric):
        return pairs
    for (name, _), pair in pairs.items():
        with _named(name, metric):
            pair.effect  # noqa: B018 - samples that have no effect are named
    return share_effects(pairs, len(base.measured(metric)))


# --- verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonLimits:
    """The limits of one comparison, as fractions."""

    tolerance: float = TOLERANCE
    """Smallest slow-down, or growth of a peak, worth an alarm."""
    margin: float = MARGIN
    """Within it two things count as equal."""


LimitsOf = Callable[[str, str], ComparisonLimits]
"""Limits by variant and metric."""


def default_limits(variant: str, metric: str) -> ComparisonLimits:
    """The same limits for all metrics, except that computed bytes must be equal."""
    computed = is_memory(metric) and "peak" not in metric and not metric.startswith("host_")
    return ComparisonLimits(tolerance=0.0) if computed else ComparisonLimits()


def judge(pairs: Mapping[Key, Pair], limits_of: LimitsOf = default_limits) -> dict[Key, Comparison]:
    """The verdict on each pair: memory by its maximum, times as one family that shares the error rate (Holm).

    What cannot be computed is invalid, with the reason.
    """
    found: dict[Key, Comparison] = {}
    effects: dict[Key, Effect] = {}
    limits = {key: limits_of(*key) for key in pairs}
    for key, pair in pairs.items():
        try:
            if is_memory(pair.metric):
                base, candidate = ([size for (size,) in trials] for trials in (pair.base, pair.candidate))
                found[key] = compare_bytes(base, candidate, tolerance=limits[key].tolerance)
            elif pair.no_interval:
                ratio, replicates = math.exp(pair.effect.log_ratio), pair.effect.replicates
                found[key] = verdict_only("inconclusive", pair.no_interval, ratio=ratio, replicates=replicates)
            else:
                effects[key] = pair.effect
        except ValueError as error:
            found[key] = verdict_only("invalid", f"the samples cannot be compared: {error}")
    found |= decide_family(
        effects,
        tolerance={key: limits[key].tolerance for key in effects},
        margin={key: limits[key].margin for key in effects},
    )
    return {key: pair.with_drops(found[key]) for key, pair in pairs.items()}


def compare_series(base: Series, candidate: Series, metric: str, *, family: int = 1) -> Comparison | None:
    """The comparison over the replicates that both have, paired as they alternated; None where there is none."""
    pair = pairs_of(base, candidate, metric)
    with _named(candidate.name, metric):
        return pair.compare(VerdictRule(family=family)) if pair.base else None


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
    pairs = pairs_against(groups, name, metric) if (name, "variant") in groups else {}
    pair = pairs.get((name, "control"))
    if pair is None or is_memory(metric):
        return None if pair is None else judge({(name, metric): pair})[name, metric]
    return pair.compare(VerdictRule(family=family))


def ratios_of(
    groups: Groups, study: Study, metric: str, control: Comparison | None, limits_of: LimitsOf = default_limits
) -> dict[str, Comparison]:
    """Every other variant against the reference, by name, with one error rate for all of them; no time is equivalent
    where the control is not."""
    pairs = pairs_against(groups, study.reference, metric) if (study.reference, "variant") in groups else {}
    names = [variant.name for variant in study.variants if (variant.name, "variant") in pairs]
    found = judge({(name, metric): pairs[name, "variant"] for name in names}, limits_of)
    if not is_memory(metric) and (control is None or control.verdict != "equivalent"):
        found = without_equality(found, "A/A control inconclusive: equivalence cannot be claimed")
    return {name: found[name, metric] for name in names}


def is_difference(comparison: Comparison) -> bool:
    """Whether the sides differ, either way; of a control it says that no number of the run can be believed."""
    return comparison.verdict in ("improved", "regressed")


def verdict_only(verdict: Verdict, reason: str, *, ratio: float | None = None, replicates: int = 0) -> Comparison:
    """A verdict where there is no interval, or where the numbers must not be believed."""
    return Comparison(
        verdict=verdict,
        ratio=ratio,
        low=None,
        high=None,
        reason=reason,
        replicates=replicates,
        replicates_needed=None,
        mde80=None,
    )


def without_equality(found: Mapping[Key, Comparison], reason: str, *, appended: bool = False) -> dict[Key, Comparison]:
    """Comparisons of which none may claim equality, because a control does not support it, or the sides differ in more
    than the times; the reason replaces that of each, or is `appended` to it."""

    def downgrade(one: Comparison) -> Comparison:
        combined = f"{one.reason}; {reason}" if appended else reason
        # No number of replicates of this pair leads to "equivalent": it is the control that must be measured better.
        return dataclasses.replace(one, verdict="inconclusive", reason=combined, replicates_needed=None)

    return {key: downgrade(one) if one.verdict == "equivalent" else one for key, one in found.items()}
