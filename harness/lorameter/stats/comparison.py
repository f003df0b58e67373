"""Compares two sides that were measured in several replicates: is the candidate slower?

The unit is the replicate, never the sample: samples of one process share effects of the process (measured: 62 % of the
variance of a step time is between processes), and rules that treat them as independent give 9 to 39 % false alarms on
identical code.

Several comparisons share one false-alarm rate (Holm's step-down, 1979). Twenty gated numbers at 2.5 % each give a false
alarm in 40 % of the runs on identical code. Bonferroni's correction prevents that; Holm's also does and is never
weaker: once k comparisons are decided, the others share the whole rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from lorameter.stats.effect import Effect, Pairing, Spread, checked_pairing, from_log, measure_effect
from lorameter.stats.power import MOST_ADVISED, detectable_log_effect, replicates_needed
from lorameter.stats.samples import checked_trials
from lorameter.stats.verdict import Comparison, Verdict, VerdictRule

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["Pairing", "compare_family", "compare_trials", "decide", "decide_family", "effect_of", "step_down"]

_HOW = {"none": "not paired", "replicate": "paired by replicate", "turn": "paired turn by turn"}


def compare_trials(
    base: Sequence[Sequence[float]],
    candidate: Sequence[Sequence[float]],
    *,
    pairing: Pairing,
    tolerance: float = 0.01,
    margin: float = 0.05,
    alpha: float = 0.05,
    family: int = 1,
) -> Comparison:
    """The verdict on two lists of trials, each a list of samples in seconds (or any other positive unit).

    `pairing` says how trial i of one side is related to trial i of the other: "turn" (samples alternate: a replicate's
    value is the median of its log ratios, sample by sample), "replicate" (log ratio of medians), "none" (Welch; never
    `equivalent`, because the ratio includes changes between the two measurements). `tolerance` and `margin` are
    fractions, see `lorameter.stats.verdict`. The interval is that of alpha/family.

    Raises ValueError, naming the side, trial and sample, for an empty list or trial, for samples that are not
    finite and above zero, for paired sides of unequal size, and for limits out of range.
    """
    rule = VerdictRule(tolerance=tolerance, margin=margin, alpha=alpha, family=family)
    return decide(effect_of(base, candidate, pairing), rule)


def effect_of(base: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]], pairing: Pairing) -> Effect:
    """The effect of validated input. Raises ValueError as `compare_trials` does."""
    checked_pairing(pairing)
    effect = measure_effect(
        checked_trials("base", base, positive=True), checked_trials("candidate", candidate, positive=True), pairing
    )
    if not (math.isfinite(effect.log_ratio) and from_log(effect.log_ratio)):
        raise ValueError(
            f"the log ratio of candidate to base is {effect.log_ratio:g}, more than a number holds: check the units"
        )
    return effect


def decide(effect: Effect, rule: VerdictRule) -> Comparison:
    """The verdict on an effect under a rule."""
    spread = effect.spread
    if spread is None:
        return Comparison(
            verdict="inconclusive",
            ratio=math.exp(effect.log_ratio),
            low=None,
            high=None,
            reason="one replicate gives no interval and no scatter to plan with: measure 5 on both sides, at least 2",
            replicates=effect.replicates,
            replicates_needed=None,
            mde80=None,
        )
    half_width = spread.half_width(rule.tail(spread))
    equivalence_half_width = spread.half_width(rule.alpha)
    judged = rule.judge(effect.log_ratio, half_width, equivalence_half_width)
    may_be_equivalent = effect.pairing != "none"
    verdict: Verdict = "inconclusive" if judged == "equivalent" and not may_be_equivalent else judged

    detectable = from_log(detectable_log_effect(spread, rule))
    needed = replicates_needed(spread, rule, may_be_equivalent=may_be_equivalent)
    if verdict == "inconclusive" and needed is not None:
        # Power is an average over runs; the inconclusive result of this run is the better evidence.
        needed = max(needed, effect.replicates + 1)
    if verdict != judged:
        needed = None  # no number of unpaired replicates leads to `equivalent`
    mde80 = None if detectable is None else detectable - 1
    return Comparison(
        verdict=verdict,
        ratio=math.exp(effect.log_ratio),
        low=from_log(effect.log_ratio - half_width),
        high=from_log(effect.log_ratio + half_width),
        reason=_reason(verdict, judged, effect, spread, rule, mde80, needed),
        replicates=effect.replicates,
        replicates_needed=needed,
        mde80=mde80,
    )


def _reason(
    verdict: Verdict,
    judged: Verdict,
    effect: Effect,
    spread: Spread,
    rule: VerdictRule,
    mde80: float | None,
    needed: int | None,
) -> str:
    tail = rule.tail(spread)
    interval = _interval(1 - 2 * tail, effect.log_ratio, spread.half_width(tail))
    narrow = _interval(1 - 2 * rule.alpha, effect.log_ratio, spread.half_width(rule.alpha))
    tolerance, margin = _percent(rule.tolerance), _percent(rule.margin)
    count = f"{effect.replicates} replicates, {_HOW[effect.pairing]}"
    if spread.shared_by:
        count += f", scatter shared by {spread.shared_by} comparisons, {spread.df:.3g} degrees of freedom"
    if spread.standard_error == 0:
        count += ", no variance between replicates"
    if verdict == "regressed":
        return f"the {interval} is entirely above the tolerance of {tolerance} ({count})"
    if verdict == "improved":
        return f"the {interval} is entirely below minus the tolerance of {tolerance} ({count})"
    if verdict == "equivalent":
        return f"the {narrow} is inside the margin of ±{margin} ({count})"
    if judged == "equivalent":
        return (
            f"the {narrow} is inside the margin of ±{margin}, but times that are not paired are never called "
            f"equivalent: measure both sides in one run ({count})"
        )
    open_question = (
        f"the {interval} does not clear the tolerance of {tolerance}, nor the {narrow} fit the margin of ±{margin}"
    )
    seen = "" if mde80 is None else f"; smallest detectable slow-down, with 80 % power: {_percent(mde80)}"
    remedy = "" if needed is None or needed > MOST_ADVISED else f"; measure {needed} replicates"
    return f"{open_question} ({count}){seen}{remedy}"


def _interval(level: float, log_ratio: float, half_width: float) -> str:
    low, high = from_log(log_ratio - half_width), from_log(log_ratio + half_width)
    ends = ["no bound" if end is None else f"{end:.4g}" for end in (low, high)]
    percent = f"{100 * max(level, 0.0):.4g}" if level < 0.9999 else "over 99.99"
    return f"{percent} % interval [{', '.join(ends)}]"


def _percent(fraction: float) -> str:
    percent = 100 * fraction
    return f"{percent:.0f} %" if percent >= 999.5 else f"{percent:.3g} %"


T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def compare_family(
    pairs: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]],
    *,
    pairing: Pairing | Mapping[str, Pairing],
    tolerance: float | Mapping[str, float] = 0.01,
    margin: float | Mapping[str, float] = 0.05,
    alpha: float = 0.05,
) -> dict[str, Comparison]:
    """`compare_trials` for every named (base, candidate), with a family-wise error rate of `alpha`; {} without
    comparisons.

    Pairing, tolerance and margin apply to all, or are maps by name. Each interval is at the level at which Holm's
    procedure decided or stopped for that comparison. Raises ValueError as `compare_trials` does, with the name of the
    comparison first.
    """
    effects = {}
    for name, (base, candidate) in pairs.items():
        try:
            effects[name] = effect_of(base, candidate, _value_for(pairing, name))
        except ValueError as error:
            raise ValueError(f"comparison {name!r}: {error}") from error
    return decide_family(effects, tolerance=tolerance, margin=margin, alpha=alpha)


def decide_family(
    effects: Mapping[K, Effect],
    *,
    tolerance: float | Mapping[K, float],
    margin: float | Mapping[K, float],
    alpha: float = 0.05,
) -> dict[K, Comparison]:
    """Like `compare_family`, from already computed effects."""

    def judge(name: K, left: int) -> Comparison:
        rule = VerdictRule(
            tolerance=_value_for(tolerance, name), margin=_value_for(margin, name), alpha=alpha, family=left
        )
        return decide(effects[name], rule)

    return step_down(effects, judge, is_decided=lambda result: result.verdict in ("regressed", "improved"))


def step_down(names: Iterable[K], judge: Callable[[K, int], R], *, is_decided: Callable[[R], bool]) -> dict[K, R]:
    """Holm's procedure: the result for each name, in order.

    `judge` judges a name as one of a number of names that share the rate; decided names (`is_decided`) leave the
    family, and the others are judged again with the smaller number. Deciding all names that pass at one level before
    raising the level gives the same result as Holm's sorted p-values.
    """
    order = list(names)
    decided: dict[K, R] = {}
    while True:
        left = [name for name in order if name not in decided]
        undecided = {name: judge(name, len(left)) for name in left}
        found = {name: result for name, result in undecided.items() if is_decided(result)}
        if not found:
            results = decided | undecided
            return {name: results[name] for name in order}
        decided |= found


def _value_for(value: T | Mapping[K, T], name: K) -> T:
    """The value for a name, from a map or common to all."""
    return value[name] if isinstance(value, Mapping) else value
