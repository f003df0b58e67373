"""The one judge of pairs of sides: the metrics that are wanted, the limits, and one family that shares its error rate.

Who compares says how the sides are paired and what their controls allow; what becomes of a pair is decided here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorameter.records.metrics import PEAKS, PHASES, PRIMARY
from lorameter.records.record import Interleaving
from lorameter.stats import (
    Comparison,
    Effect,
    KeptPairs,
    Pairing,
    compare_bytes,
    decide_family,
    effect_of,
    share_scatter,
)
from lorameter.verdicts.comparison_input import Measurements, is_memory
from lorameter.verdicts.comparison_report import ComparisonRow, fields_of
from lorameter.verdicts.series import Trials, as_worse_is_higher, verdict_only, with_drops

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
