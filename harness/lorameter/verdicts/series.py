"""Turns records into samples, samples into pairs of sides, and pairs into verdicts.

Every comparison is a `Pair`: the samples of one metric on two sides, and how trial i of one side is related to trial i
of the other. The sides may be two runs, the sides of an A/B, a variant and its reference, or a reference and its
control. They differ in the pairing, and one function (`judge`) judges them all.

A variant may have several trials in a replicate: one that took turns with the others, and an isolated one for metrics
that need a separate process. Each metric is measured by only one of these kinds, so a metric's trials are those that
have it, and its pairing follows from their interleaving.

Only the table of metrics defines how samples are derived from a record, so a report, a saved benchmark and a comparison
cannot disagree. A series uses only ok trials: an invalid trial is reported and never ranked.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from lorameter.errors import InvalidRunError, require
from lorameter.measurements.declaration import Samples
from lorameter.measurements.metrics import METRICS, get_samples, is_difference_metric
from lorameter.records.record import Interleaving, Role, Side, TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import choose_scale
from lorameter.stats import (
    Comparison,
    Effect,
    Estimate,
    Gain,
    Pairing,
    TrialsEstimate,
    VerdictRule,
    compare_bytes,
    decide,
    decide_family,
    effective_size,
    estimate_effect,
    estimate_gain,
    estimate_trials,
    percentile,
    select_pairs,
    share_scatter,
)
from lorameter.studies.study import Study

K = TypeVar("K")
Trial = tuple[TrialRecord, Samples]
"""A trial and its samples of one metric."""
Trials = list[Samples]
Key = tuple[str, str]
"""A variant and a metric."""


def is_memory(metric: str) -> bool:
    """Whether the name is a kind of memory; a trial has one value of it, in bytes."""
    return metric.endswith("_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The trials of one variant (or of the control), in order of replicates."""

    name: str
    role: Role
    records: tuple[TrialRecord, ...]
    _known: dict[str, tuple[Trial, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Cache of `measured`, which every table calls several times; records are immutable."""

    @property
    def ok(self) -> tuple[TrialRecord, ...]:
        """Trials whose values count."""
        return tuple(record for record in self.records if record.status == "ok")

    def measured(self, metric: str) -> tuple[Trial, ...]:
        """The ok trials that have the metric or kind of memory. Losses count only after the most common number of
        steps, since other losses belong to a different training."""
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
        """The metrics, followed by the kinds of memory, that at least one of these trials has."""
        ok = self.ok
        measured_names = set[str]().union(*(record.samples for record in ok), *(record.values for record in ok))
        likely = (metric for metric in METRICS.values() if metric.derive is not None or metric.name in measured_names)
        kinds = dict.fromkeys(kind for record in ok for kind in record.memory if is_memory(kind))
        return (*(metric.name for metric in likely if any(get_samples(record, metric.name) for record in ok)), *kinds)

    def measuring(self, metric: str) -> tuple[TrialRecord, ...]:
        """The records of the trials that measured the metric."""
        return tuple(record for record, _ in self.measured(metric))

    def trials(self, metric: str) -> Trials:
        """The samples of the trials that measured the metric."""
        return [samples for _, samples in self.measured(metric)]

    def interleaving(self, metric: str) -> Interleaving | None:
        """How the trials that measured the metric were interleaved with those of other variants; None if there are
        none. Cold starts and memory peaks are always measured in isolation."""
        found = next((record.interleaving for record, _ in self.measured(metric)), None)
        alone = is_memory(metric) or METRICS[metric].phase == "cold"
        return "replicates" if found is not None and alone else found

    def estimate(self, metric: str) -> TrialsEstimate | None:
        """The metric's estimate over replicates; None if nothing was measured.

        If the replicates ran on several sites, the interval is over the sites, which differ by more than the replicates
        of one site.
        """
        trials, sites = self.trials(metric), [record.site for record in self.measuring(metric)]
        with _named(self.name, metric):
            return estimate_trials(trials, blocks=sites) if trials else None

    def untrained(self, metric: str) -> float | None:
        """The value of a loss before training, which is a constant of the base; None if it was not measured."""
        name = METRICS[metric].untrained if metric in METRICS else ""
        return next((record.values[name] for record in self.ok if name in record.values), None)

    def percentile(self, metric: str, q: float) -> Estimate | None:
        """The quantile `q` of a metric's samples; None if their effective number does not suffice."""
        trials = self.trials(metric)
        if not trials:
            return None
        with _named(self.name, metric):
            effective = sum(effective_size(trial) for trial in trials)
            return percentile([sample for trial in trials for sample in trial], q, effective_size=effective)


def _samples(record: TrialRecord, metric: str) -> Samples:
    if metric in METRICS:
        return get_samples(record, metric)
    return (float(record.memory[metric]),) if metric in record.memory else ()


def _steps(record: TrialRecord) -> float:
    return record.values.get("training_steps", 0.0)


@contextlib.contextmanager
def _named(name: str, metric: str) -> Iterator[None]:
    """Convert an error of the statistics into an `InvalidRunError` that names the variant and the metric."""
    try:
        yield
    except ValueError as error:
        raise InvalidRunError(f"{metric} of {name}: its samples give no value: {error}.") from None


Groups = Mapping[tuple[str, Role], Series]
"""Series by variant and role."""


def group_trials(records: Sequence[TrialRecord], side: Side = "") -> dict[tuple[str, Role], Series]:
    """Group records of one side by variant and role, each in order of replicates, groups in order of appearance.

    Raises `UsageError` for records of sites that are different machines. Ratios differ between GPUs: a variant that is
    memory-bound on one GPU is compute-bound on another, and a mean over them would describe no real machine.
    """
    require(
        not any(record.machine for record in records),
        f"the sites are different machines ({describe_machines(records)}), so their trials cannot be combined. Read "
        "each site with `lorameter report RUN`, or measure machines of one kind in a separate run.",
    )
    groups: dict[tuple[str, Role], list[TrialRecord]] = {}
    for record in records:
        if record.side == side:
            groups.setdefault((record.name, record.role), []).append(record)
    return {
        (name, role): Series(name=name, role=role, records=tuple(sorted(group, key=lambda record: record.replicate)))
        for (name, role), group in groups.items()
    }


# --- sites ------------------------------------------------------------------------------------------------------------


def is_mixed(run: Run) -> bool:
    """Whether its sites are different machines, as its records say."""
    return any(record.machine for record in run.records)


def split_sites(run: Run) -> dict[str, Run]:
    """One run per site, with the trials of that site; trials without a site are left out."""
    return {site: _select_site(run, site) for site in sorted({record.site for record in run.records if record.site})}


def _select_site(run: Run, site: str) -> Run:
    records, disturbed = (
        tuple(record.replaced(machine="") for record in attempts if record.site == site)
        for attempts in (run.records, run.disturbed)
    )
    machine = next(record.machine for record in run.records if record.site == site)
    manifest = msgspec.structs.replace(
        run.manifest,
        order=tuple(record.trial for record in records),
        provenance={**run.manifest.provenance, "device_name": machine},
    )
    return dataclasses.replace(run, manifest=manifest, records=records, disturbed=disturbed)


def describe_machines(records: Iterable[TrialRecord]) -> str:
    """Each site with its machine."""
    found = {record.site: record.machine for record in records if record.site}
    return "; ".join(f"{site}: {machine or 'unknown'}" for site, machine in sorted(found.items()))


# --- pairs ------------------------------------------------------------------------------------------------------------

OCCUPANCY_FLOOR = 0.95
"""CPU time over wall time below which a CPU trial was disturbed. On a noisy machine, dropping the trials below it
reduced the spread between processes from 29 % to 7 % (docs/method.md)."""
MIN_UNDISTURBED = 5
"""If fewer undisturbed pairs would remain, all pairs are kept."""


UNKNOWN_GAIN = (
    "the gain is unknown, since the untrained loss was not measured on the same tokens, so nothing shows whether both "
    "learned as much; compare the held-out loss of a new run"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Samples of one metric on two sides, one list per trial; pairs of disturbed trials are left out."""

    metric: str
    base: Trials
    candidate: Trials
    pairing: Pairing = "none"
    """How trial i of the base and trial i of the candidate are related."""
    note: str = ""
    """A note for the reason of the verdict: dropped pairs of disturbed trials, or samples that give only a ratio."""
    untrained: float | None = None
    """Of a loss, its value before training in the base; None if it was not measured."""
    shared: Effect | None = None
    """The effect with the scatter that it shares with others; None if it shares none."""

    @property
    def judged(self) -> Effect | Gain:
        """What is judged: the effect, or the gain of a loss. Raises ValueError as `estimate_effect` does."""
        if self.untrained is None:
            return self.effect
        return estimate_gain(self.untrained, self.base, self.candidate, self.pairing)

    @property
    def effect(self) -> Effect:
        """The effect of the candidate. Raises ValueError as `estimate_effect` does."""
        if self.shared is not None:
            return self.shared
        if is_difference_metric(self.metric):
            return estimate_effect(self.base, self.candidate, self.pairing, "linear")
        base, candidate = (_as_worse_is_higher(trials, self.metric) for trials in (self.base, self.candidate))
        return estimate_effect(base, candidate, self.pairing)

    def with_note(self, comparison: Comparison) -> Comparison:
        """The comparison with the note in its reason. Losses without an untrained loss are never equivalent."""
        of_loss = self.metric in METRICS and METRICS[self.metric].is_loss and self.untrained is None
        if of_loss and comparison.verdict in ("equivalent", "inconclusive"):
            return dataclasses.replace(
                comparison, verdict="inconclusive", reason=UNKNOWN_GAIN, replicates_needed=None, mde80=None
            )
        if not self.note:
            return comparison
        return dataclasses.replace(comparison, reason=f"{comparison.reason}; {self.note}")


def choose_pairing(series: Series, metric: str) -> Pairing:
    """Trials that took turns are paired turn by turn, other trials of one run by replicate; peaks are not paired."""
    if is_memory(metric):
        return "none"
    return "turn" if series.interleaving(metric) in ("shared-base", "lockstep") else "replicate"


def make_pairs(base: Series, candidate: Series, metric: str) -> Pair:
    """Pair two series of one run in one metric; the pair is empty if they share no replicate.

    Turns are paired only with turns of the same attempt, because a run that was interrupted while writing may hold two
    attempts. Losses are paired only after the same training. Pairs of disturbed trials are left out,
    unless one side is disturbed more often than the other.
    """
    pairing = choose_pairing(base, metric)
    if pairing == "none":
        return Pair(metric=metric, base=base.trials(metric), candidate=candidate.trials(metric))
    others = {record.replicate: (record, samples) for record, samples in candidate.measured(metric)}
    found = [(first, others[first[0].replicate]) for first in base.measured(metric) if first[0].replicate in others]
    if pairing == "turn":
        found = [(first, second) for first, second in found if first[0].attempt == second[0].attempt]
    if METRICS[metric].is_loss:
        found = [(first, second) for first, second in found if _trained_alike(first[0], second[0])]
    indexes, dropped = _select_undisturbed([(first, second) for (first, _), (second, _) in found], metric, pairing)
    found = [found[index] for index in indexes]
    return Pair(
        metric=metric,
        base=[samples for (_, samples), _ in found],
        candidate=[samples for _, (_, samples) in found],
        pairing=pairing,
        note=f"disturbed trials: {dropped}" if dropped else "",
        untrained=base.untrained(metric),
    )


def _trained_alike(base: TrialRecord, candidate: TrialRecord) -> bool:
    """Whether both trials completed their plan, or stopped at the same earlier step."""
    cut = any("training_steps_planned" in record.values for record in (base, candidate))
    return not cut or _steps(base) == _steps(candidate)


def _select_undisturbed(
    pairs: Sequence[tuple[TrialRecord, TrialRecord]], metric: str, pairing: Pairing
) -> tuple[Sequence[int], str]:
    """The indexes of the pairs to compare, by a criterion that ignores their times, and which were dropped.

    Nothing is dropped for trials that took turns, which share every disturbance, or on a GPU, where the host may wait.
    """
    every = range(len(pairs)), ""
    if not pairs or pairing == "turn" or METRICS[metric].unit not in ("s", "1/s"):
        return every
    if any(kind.startswith("device_") for kind in pairs[0][0].memory):
        return every
    shares = [[occupancy(record) for record in side] for side in zip(*pairs, strict=True)]
    flags = [[share < OCCUPANCY_FLOOR for share in side if share is not None] for side in shares]
    known = all(len(side) == len(pairs) for side in flags)
    return select_pairs(flags[0], flags[1], least=MIN_UNDISTURBED) if known else every


def occupancy(record: TrialRecord) -> float | None:
    """CPU time over wall time of the timed steps.

    None if either is missing, and for a trial with several threads: threads wait for each other and for serial work, so
    CPUs are idle even if nothing else runs.
    """
    wall, cpu = sum(record.samples.get("step_time_s", ())), record.samples.get("step_cpu_time_s", ())
    return sum(cpu) / wall if wall and cpu and record.values.get("threads", 1.0) == 1 else None


def occupancies(records: Iterable[TrialRecord]) -> tuple[list[float], list[float]]:
    """The occupancies of single-threaded trials, and those below the limit, for which other work took their CPU."""
    shares = [share for record in records if (share := occupancy(record)) is not None]
    return shares, [share for share in shares if share < OCCUPANCY_FLOOR]


def _as_worse_is_higher(trials: Trials, metric: str) -> Trials:
    """Invert the samples of a metric for which higher is better, so that a ratio above 1 is always worse.

    Zero stays zero and is refused later, because it has no ratio. An unknown metric counts as a time.
    """
    if metric not in METRICS or not METRICS[metric].higher_is_better:
        return trials
    return [tuple(1 / sample if sample else 0.0 for sample in trial) for trial in trials]


def pairs_against(base: Series | None, others: Mapping[K, Series], metric: str) -> dict[K, Pair]:
    """Every other series of a run paired with a base, with the scatter that they share; {} without a base. A series
    with another number of replicates keeps its own scatter."""
    if base is None:
        return {}
    pairs = {key: make_pairs(base, series, metric) for key, series in others.items() if series is not base}
    pairs = {key: pair for key, pair in pairs.items() if pair.base and pair.candidate}
    if is_memory(metric) or base.untrained(metric) is not None:
        return pairs
    effects: dict[K, Effect] = {}
    for key, pair in pairs.items():
        with contextlib.suppress(ValueError):  # `judge` reports samples without a ratio
            effects[key] = pair.effect
    replicates = len(base.measured(metric))
    effects |= share_scatter({key: effect for key, effect in effects.items() if effect.replicates == replicates})
    return {key: dataclasses.replace(pair, shared=effects.get(key)) for key, pair in pairs.items()}


# --- verdicts ---------------------------------------------------------------------------------------------------------


LimitsOf = Callable[[str, str], VerdictRule]
"""Tolerance and margin by variant and metric."""


def default_limits(variant: str, metric: str) -> VerdictRule:
    """The limits that the metric declares; computed bytes must be equal."""
    if metric in METRICS:
        found = METRICS[metric]
        rule = VerdictRule(tolerance=found.tolerance, margin=found.margin)
        if not is_difference_metric(metric):
            return rule
        unit = choose_scale(1.0, found.unit)[1]
        return dataclasses.replace(rule, scale="linear", higher_is_better=found.higher_is_better, unit=unit)
    computed = is_memory(metric) and "peak" not in metric and not metric.startswith("host_")
    return VerdictRule(tolerance=0.0) if computed else VerdictRule()


def at_level(alpha: float, limits_of: LimitsOf = default_limits) -> LimitsOf:
    """The same limits with another error rate, as that of one look of a run (`Protocol.alpha`)."""
    return lambda variant, metric: dataclasses.replace(limits_of(variant, metric), alpha=alpha)


def judge(
    pairs: Mapping[Key, Pair], limits_of: LimitsOf = default_limits, *, family: int | None = None
) -> dict[Key, Comparison]:
    """The verdict on each pair. A pair that cannot be compared is invalid, with the reason.

    Args:
        pairs: pairs by variant and metric. Memory is compared by its maximum.
        limits_of: tolerance and margin by variant and metric.
        family: the number of times that share one error rate, each with an interval of one fixed level; None for the
            given times, by Holm's procedure.
    """
    found: dict[Key, Comparison] = {}
    effects: dict[Key, Effect | Gain] = {}
    limits = {key: limits_of(*key) for key in pairs}
    for key, pair in pairs.items():
        try:
            if is_memory(pair.metric):
                base, candidate = ([size for (size,) in trials] for trials in (pair.base, pair.candidate))
                found[key] = compare_bytes(base, candidate, tolerance=limits[key].tolerance)
            else:
                effects[key] = pair.judged
        except ValueError as error:
            found[key] = Comparison(verdict="invalid", reason=f"the samples cannot be compared: {error}")
    if family is None:
        found |= decide_family(effects, limits)
    else:
        rules = {key: dataclasses.replace(limits[key], family=family) for key in effects}
        found |= {key: decide(effect, rules[key]) for key, effect in effects.items()}
    return {key: pair.with_note(found[key]) for key, pair in pairs.items()}


def compare_series(base: Series, candidate: Series, metric: str) -> Comparison | None:
    """The comparison over the common replicates, paired by their interleaving; None if there are none."""
    key, pair = (candidate.name, metric), make_pairs(base, candidate, metric)
    return judge({key: pair}, family=1)[key] if pair.base else None


def compare_control(groups: Groups, name: str, metric: str, *, family: int, alpha: float) -> Comparison | None:
    """The reference compared with its second measurement, at an error rate; None if either has no trial."""
    pair = pairs_against(groups.get((name, "variant")), groups, metric).get((name, "control"))
    return None if pair is None else judge({(name, metric): pair}, at_level(alpha), family=family)[name, metric]


def list_ratios(
    groups: Groups, study: Study, metric: str, control: Comparison | None, limits_of: LimitsOf = default_limits
) -> dict[str, Comparison]:
    """Every other variant compared with the reference, by name, under one common error rate. No time is equivalent
    unless the control is equivalent."""
    pairs = pairs_against(groups.get((study.reference, "variant")), groups, metric)
    names = [variant.name for variant in study.variants if (variant.name, "variant") in pairs]
    limits_of = at_level(study.protocol.alpha, limits_of)
    found = judge({(name, metric): pairs[name, "variant"] for name in names}, limits_of)
    if not is_memory(metric) and (control is None or control.verdict != "equivalent"):
        found = without_equality(found, "but the control is not equivalent to itself, so nothing is called equivalent")
    return {name: found[name, metric] for name in names}


def is_difference(comparison: Comparison) -> bool:
    """Whether the sides differ in either direction; a control that differs means that the run is not reliable."""
    return comparison.verdict in ("improved", "regressed")


def without_equality(found: Mapping[Key, Comparison], reason: str) -> dict[Key, Comparison]:
    """Replace equality verdicts, because the control does not support them or because the sides differ in more than
    their times; the reason is appended to that of each comparison."""
    downgraded = {
        key: dataclasses.replace(
            comparison,
            verdict="inconclusive",
            reason=f"{comparison.reason}; {reason}",
            replicates_needed=None,  # more replicates of this pair do not help: the control must be measured better
        )
        for key, comparison in found.items()
        if comparison.verdict == "equivalent"
    }
    return {**found, **downgraded}
