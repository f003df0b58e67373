"""Pairs of sides judged: the metrics, the limits, one family that shares its error rate; and two runs compared.

Whatever compares says how the sides are paired and what their controls allow; what becomes of a pair is decided by
`judge_pairs`. Two runs that were not measured together share nothing but the machine, so their trials are not paired
(Welch on the logs of medians), and times are never called equivalent: what the machine did between the two
measurements is in the ratio. The standard deviation of the log ratio of two identical builds was 37 % that way and 2 %
with turns in one run (docs/method.md). Where anything that must agree does not, there is no ratio at all; `force` shows
one all the same and takes nothing it says for equality.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorameter.errors import InvalidRunError, UsageError
from lorameter.records.metrics import METRICS, PEAKS, PHASES, PRIMARY
from lorameter.records.record import Interleaving, Notice
from lorameter.stats import (
    Comparison,
    Effect,
    KeptPairs,
    Pairing,
    compare_bytes,
    decide_family,
    effect_of,
    run_wide_shift,
    share_scatter,
)
from lorameter.verdicts.comparison_input import (
    BYTES_SUFFIX,
    ComparisonInput,
    Difference,
    Measurements,
    disagreement,
    is_memory,
    machine_differences,
    unknown_power_limit,
    variant_differences,
)
from lorameter.verdicts.comparison_report import ComparisonReport, ComparisonRow, fields_of
from lorameter.verdicts.series import Trials, as_worse_is_higher, downgrade_equivalent, verdict_only, with_drops

TOLERANCE = 0.01
MARGIN = 0.05
ALPHA = 0.05


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
    """The same limits for everything, but exactness for computed bytes."""
    computed = is_memory(metric) and "peak" not in metric and not metric.startswith("host_")
    return ComparisonLimits(tolerance=0.0) if computed else ComparisonLimits()


Key = tuple[str, str]
"""A variant and a metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricPair:
    """One metric of one variant on both sides, as the sides were paired."""

    variant: str
    metric: str
    interleaving: Interleaving
    sides: tuple[Measurements, Measurements] | None = None
    """Base and candidate; None where there is nothing to compare."""
    pairing: Pairing = "none"
    """What trial i of either side have in common."""
    drops: KeptPairs | None = None
    """Which pairs of trials are left; None where none could be dropped."""
    control: tuple[Trials, Trials] | None = None
    """The base and its second measurement in the same replicates, whose scatter the pair shares; None without one."""
    refusal: Comparison | None = None
    """The verdict where there is nothing to compare, or where the numbers do not count."""

    @property
    def key(self) -> Key:
        """By which its verdict is found."""
        return self.variant, self.metric

    @property
    def of_memory(self) -> bool:
        """Whether these are bytes, which are no time."""
        return is_memory(self.metric)


def default_metrics(phases: Collection[str], known: Collection[str]) -> list[str]:
    """What is judged unless something else is asked for: of each phase its primary metric and its peak, if known."""
    wanted: list[str] = []
    for phase in PHASES:
        if phase in phases:
            wanted += [PRIMARY[phase], *[kind for kind in PEAKS[phase] if kind in known][:1]]
    return wanted


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that one of the patterns matches, in their order."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def judge_pairs(pairs: Iterable[MetricPair], limits_of: LimitsOf) -> dict[Key, Comparison]:
    """The verdict on each pair: memory by its maximum, times as one family that shares the error rate (Holm).

    What cannot be computed is invalid, with the reason.
    """
    found: dict[Key, Comparison] = {}
    effects: dict[Key, Effect] = {}
    for pair in pairs:
        if pair.sides is None or pair.refusal is not None:
            found[pair.key] = pair.refusal or verdict_only("invalid", "not compared")
            continue
        try:
            if pair.of_memory:
                base, candidate = (side.peaks[pair.metric] for side in pair.sides)
                found[pair.key] = compare_bytes(base, candidate, tolerance=limits_of(*pair.key).tolerance)
                continue
            ours, theirs = (as_worse_is_higher(side.trials[pair.metric], pair.metric) for side in pair.sides)
            effect = _effect(pair, ours, theirs)
        except ValueError as error:
            found[pair.key] = verdict_only("invalid", f"the samples cannot be compared: {error}")
            continue
        reasons = dict.fromkeys(side.no_interval for side in pair.sides if side.no_interval)
        if reasons:
            found[pair.key] = dataclasses.replace(
                verdict_only("inconclusive", "; ".join(map(str, reasons))),
                ratio=math.exp(effect.log_ratio),
                replicates=effect.replicates,
            )
        else:
            effects[pair.key] = effect
    return found | decide_family(
        effects,
        tolerance={key: limits_of(*key).tolerance for key in effects},
        margin={key: limits_of(*key).margin for key in effects},
        alpha=ALPHA,
    )


def _effect(pair: MetricPair, base: Trials, candidate: Trials) -> Effect:
    """The effect of the candidate. With a control of the same replicates it has the scatter that both share."""
    effect = effect_of(base, candidate, pair.pairing)
    if pair.control is None:
        return effect
    ours, again = (as_worse_is_higher(trials, pair.metric) for trials in pair.control)
    control = effect_of(ours, again, pair.pairing)
    alike = control.replicates == effect.replicates
    return share_scatter({"candidate": effect, "control": control})["candidate"] if alike else effect


def rows_of(
    pairs: Iterable[MetricPair], verdicts: Mapping[Key, Comparison], limits_of: LimitsOf
) -> tuple[ComparisonRow, ...]:
    """A row a pair, in their order, with its limits and with what was dropped of it."""
    return tuple(
        ComparisonRow(
            variant=pair.variant,
            metric=pair.metric,
            **fields_of(with_drops(verdicts[pair.key], pair.drops)),
            tolerance=limits_of(*pair.key).tolerance,
            margin=limits_of(*pair.key).margin,
            interleaving=pair.interleaving,
        )
        for pair in pairs
    )


INTERLEAVING: Interleaving = "separate"
FEWEST_FOR_SHIFT = 6
"""Fewer than 6 of 6 on one side can be chance at 5 % (two-sided sign test)."""


def compare(
    base: ComparisonInput,
    candidate: ComparisonInput,
    *,
    metrics: Sequence[str] = (),
    all_metrics: bool = False,
    limits_of: LimitsOf = default_limits,
    force: bool = False,
) -> ComparisonReport:
    """Every metric of every variant, candidate against base.

    Args:
        base: the side that is trusted.
        candidate: the side that is judged.
        metrics: names or glob patterns of metrics and kinds of memory; empty for the primary metric of each phase that
            both sides have, and the peaks of memory.
        all_metrics: everything that either side measured, instead.
        limits_of: tolerance and margin by variant and metric.
        force: compare what is not comparable; then nothing is called equivalent.

    Raises:
        UsageError: a metric that neither exists nor was measured.
        InvalidRunError: no variant on either side, because a run was interrupted.
    """
    broken = base.broken or candidate.broken
    if broken and not base.sides and not candidate.sides:
        raise InvalidRunError(f"{broken}. Nothing was measured; measure again.")
    wanted = _wanted(base, candidate, metrics, all_metrics=all_metrics)
    machine = machine_differences(base, candidate)
    names = dict.fromkeys((*base.sides, *candidate.sides))
    changed = {name: variant_differences(name, base, candidate) for name in names}
    pairs = [
        _pair_of(name, metric, base, candidate, () if force else (*machine, *changed[name]))
        for name in names
        for metric in _metrics_of(wanted, base, candidate, name)
    ]
    verdicts = judge_pairs(pairs, limits_of)
    if not machine:  # with --force across machines a shift is what one asked to see
        verdicts |= _shifted({pair.key: verdicts[pair.key] for pair in pairs if pair.refusal is None})
    differing = (*machine, *(difference for name in names for difference in changed[name]))
    if force and differing:
        verdicts = {
            key: downgrade_equivalent(comparison, f"{comparison.reason}; but the sides are not comparable")
            for key, comparison in verdicts.items()
        }
    return ComparisonReport(
        base=base.name,
        candidate=candidate.name,
        comparisons=rows_of(pairs, verdicts, limits_of),
        control=dict(candidate.control),
        differing=differing,
        notices=(*base.notices, *candidate.notices, *_compare_notices(base, candidate, wanted, verdicts)),
    )


def _wanted(
    base: ComparisonInput, candidate: ComparisonInput, patterns: Sequence[str], *, all_metrics: bool
) -> tuple[str, ...]:
    """Names of metrics and kinds of memory, in the order of the phases."""
    measured = [
        metric for side in (*base.sides.values(), *candidate.sides.values()) for metric in (*side.trials, *side.peaks)
    ]
    known = tuple(dict.fromkeys([*(name for name in METRICS if name in measured), *measured]))
    if all_metrics:
        return known
    if patterns:
        for pattern in patterns:
            if not fnmatch.filter([*known, *METRICS], pattern):
                near = difflib.get_close_matches(pattern, [*known, *METRICS], n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Measured: {', '.join(known) or 'nothing'}."
                raise UsageError(f"metric {pattern!r}: neither known nor measured on either side. {hint}")
        return tuple(matching(known, patterns))
    phases = [phase for phase in candidate.phases if base.absent is not None or phase in base.phases]
    # What another project's file measured has no phase.
    foreign = [metric for metric in known if metric not in METRICS and not is_memory(metric)]
    return (*default_metrics(phases, known), *foreign)


def _metrics_of(wanted: Sequence[str], base: ComparisonInput, candidate: ComparisonInput, name: str) -> list[str]:
    """Those that either side of a variant measured; all times where a failure left nothing."""
    sides = [side for side in (base.sides.get(name), candidate.sides.get(name)) if side is not None]
    found = [metric for metric in wanted if any(side.has(metric) for side in sides)]
    if found or not any(side.broken or not (side.trials or side.peaks) for side in sides):
        return found
    return [metric for metric in wanted if not is_memory(metric)] or list(wanted)[:1] or [PRIMARY["train"]]


def _pair_of(
    name: str, metric: str, base: ComparisonInput, candidate: ComparisonInput, differing: Sequence[Difference]
) -> MetricPair:
    """One metric of one variant, unpaired; `differing` forbids a ratio."""
    ours, theirs = base.sides.get(name), candidate.sides.get(name)
    refusal = _forbidden(base, candidate, name, metric)
    if refusal is None and differing:
        refusal = verdict_only("not_comparable", disagreement(differing))
    sides = None if refusal is not None or ours is None or theirs is None else (ours, theirs)
    return MetricPair(variant=name, metric=metric, interleaving=INTERLEAVING, sides=sides, refusal=refusal)


def _forbidden(base: ComparisonInput, candidate: ComparisonInput, name: str, metric: str) -> Comparison | None:
    """The verdict where the numbers do not count or are not there."""
    ours, theirs = base.sides.get(name), candidate.sides.get(name)
    faults = [base.broken, candidate.broken, *(side.broken for side in (ours, theirs) if side is not None)]
    if said := [fault for fault in faults if fault]:
        return verdict_only("invalid", "; ".join(said))
    if base.absent is not None:
        return verdict_only("no_baseline", base.absent)
    if theirs is None:
        return verdict_only("not_comparable", f"variant {name!r}: it is in the base and not in the candidate")
    if ours is None:
        return verdict_only("no_baseline", f"variant {name!r}: it is in the candidate and not in the base")
    if not theirs.has(metric):
        return verdict_only("not_comparable", f"the candidate has no {metric} of variant {name!r}")
    if not ours.has(metric):
        return verdict_only("no_baseline", f"the base has no {metric} of variant {name!r}")
    return None


def _shifted(found: Mapping[Key, Comparison]) -> dict[Key, Comparison]:
    """Every time as invalid, if nearly all moved alike: then it was the machine. {} if it was not.

    One ratio a variant and phase is asked, since metrics that follow from each other would count one movement twice.
    """
    times = {key: comparison for key, comparison in found.items() if not key[1].endswith(BYTES_SUFFIX)}
    log_ratios = {
        f"{name}, {metric}": math.log(comparison.ratio)
        for (name, metric), comparison in times.items()
        if metric in PRIMARY.values() and comparison.ratio is not None
    }
    if len(log_ratios) < FEWEST_FOR_SHIFT:
        return {}
    shift = run_wide_shift(log_ratios, tolerance=TOLERANCE)
    if not shift.shifted:
        return {}
    return {
        key: dataclasses.replace(comparison, verdict="invalid", reason=shift.reason)
        for key, comparison in times.items()
        if comparison.verdict != "invalid"
    }


def _compare_notices(
    base: ComparisonInput, candidate: ComparisonInput, wanted: Sequence[str], verdicts: Mapping[Key, Comparison]
) -> list[Notice]:
    limit = unknown_power_limit(base, candidate)
    notices = [] if limit is None else [limit]
    for one, other in ((base, candidate), (candidate, base)):
        missing = [phase for phase in one.phases if phase not in other.phases]
        if missing and base.absent is None:
            notices.append(
                Notice(
                    code="phase-only-on-one-side",
                    message=f"only {one.name} measured {', '.join(missing)}; that is not compared.",
                    remedy="Measure the same phases on both sides.",
                )
            )
    unmeasured = [metric for metric in wanted if metric not in {key[1] for key in verdicts}]
    if unmeasured or not verdicts:
        notices.append(
            Notice(
                code="nothing-compared",
                message=f"neither side measured {', '.join(unmeasured) or 'anything that was asked for'}.",
                remedy="Look at what there is with --all-metrics.",
            )
        )
    return notices
