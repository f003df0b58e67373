"""Compares two sides that were measured in several replicates: is the candidate slower?

The unit is the replicate, never the sample: samples of one process share effects of the process (measured: 62 % of the
variance of a step time is between processes), and rules that treat them as independent give 9 to 39 % false alarms on
identical code.

Several comparisons share one false-alarm rate (Holm's step-down, 1979). Twenty gated numbers at 2.5 % each give a false
alarm in 40 % of the runs on identical code. Bonferroni's correction prevents that; Holm's also does and is never
weaker: once k comparisons are decided, the others share the whole rate.

`run_wide_shift` detects a change of the machine between two runs: all benchmarks then change by about the same factor.

Runs at different times are compared unpaired, so every ratio includes changes of the machine in between (another clock,
another driver, other work). Such a change has one direction for all benchmarks, while a change of the code affects only
some. The sign test (Dixon & Mood 1946) tests whether nearly all comparisons are beyond the tolerance on one side; the
median absolute deviation (Hampel 1974) tests whether one factor explains them.

Use it for unpaired comparisons only. A code change that slows down every variant alike looks exactly like a slower
machine: only pairs, which share the machine, can distinguish the two. In a paired run this test would hide the
regression, so do not use it there; after a positive result, measure both sides in one run.

`select_pairs` drops the pairs of disturbed trials, independently of their times.

Dropping slow trials makes any code look fast. A flag that is independent of the outcome (another process on the device,
a throttled clock, less CPU time than wall time) may drop a trial; it then drops the whole pair, to keep the pairing.
The flags can still be an effect of the candidate, which may heat the GPU more, so the exact test of McNemar (1947)
checks whether one side is flagged more often than the other. If too few pairs would remain, nothing is dropped: a
filter must not give an empty result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from lorameter.stats.effect import Effect, Pairing, Spread, estimate_effect, from_log
from lorameter.stats.gain import Gain, decide_gain
from lorameter.stats.intervals import sign_test
from lorameter.stats.samples import checked_samples
from lorameter.stats.verdict import (
    MAX_ADVISED,
    Comparison,
    Verdict,
    VerdictRule,
    detectable_effect,
    replicates_needed,
)

_PAIRING_WORDS = {"none": "not paired", "replicate": "paired by replicate", "turn": "paired turn by turn"}


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
    finite and above zero, and for paired sides of unequal size.
    """
    rule = VerdictRule(tolerance=tolerance, margin=margin, alpha=alpha, family=family)
    return decide(estimate_effect(base, candidate, pairing), rule)


def decide(effect: Effect | Gain, rule: VerdictRule) -> Comparison:
    """The verdict on an effect under a rule."""
    if isinstance(effect, Gain):
        return decide_gain(effect, rule)
    spread, is_ratio = effect.spread, rule.scale == "log"
    ratio, difference = (math.exp(effect.log_ratio), None) if is_ratio else (None, effect.log_ratio)
    if spread is None:
        return Comparison(
            verdict="inconclusive",
            ratio=ratio,
            difference=difference,
            reason="one replicate gives neither an interval nor a scatter: measure 5 on both sides, at least 2",
            replicates=effect.replicates,
        )
    tail = rule.tail(spread)
    judged = rule.judge(effect.log_ratio, spread.half_width(tail), spread.half_width(rule.alpha))
    low, high = map(from_log, effect.interval(tail)) if is_ratio else effect.interval(tail)
    may_be_equivalent = effect.pairing != "none"
    verdict: Verdict = "inconclusive" if judged == "equivalent" and not may_be_equivalent else judged

    detectable = detectable_effect(spread, rule)
    needed = replicates_needed(spread, rule, may_be_equivalent=may_be_equivalent)
    if verdict == "inconclusive" and needed is not None:
        # Power is an average over runs; the inconclusive result of this run is the better evidence.
        needed = max(needed, effect.replicates + 1)
    if verdict != judged:
        needed = None  # no number of unpaired replicates leads to `equivalent`
    factor = from_log(detectable)
    mde80 = detectable if not is_ratio else None if factor is None else factor - 1
    return Comparison(
        verdict=verdict,
        ratio=ratio,
        difference=difference,
        low=low,
        high=high,
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
    interval, narrow = _interval(effect, rule.tail(spread), rule), _interval(effect, rule.alpha, rule)
    tolerance, margin = (_write_limit(limit, rule) for limit in (rule.tolerance, rule.margin))
    sides = ("below minus", "above") if rule.higher_is_better else ("above", "below minus")
    count = f"{effect.replicates} replicates, {_PAIRING_WORDS[effect.pairing]}"
    if spread.shared_by:
        count += f", scatter shared by {spread.shared_by} comparisons, {spread.df:.3g} degrees of freedom"
    if spread.standard_error == 0:
        count += ", no variance between replicates"
    phrases = {
        "regressed": f"the {interval} is entirely {sides[0]} the tolerance of {tolerance}",
        "improved": f"the {interval} is entirely {sides[1]} the tolerance of {tolerance}",
        "equivalent": f"the {narrow} is inside the margin of ±{margin}",
        "inconclusive": f"the {interval} does not clear the tolerance of {tolerance}, nor the {narrow} fit the margin "
        f"of ±{margin}",
    }
    if judged != verdict:
        why = "times that are not paired are never called equivalent: measure both sides in one run"
        phrases["equivalent"] += f", but {why}"
    sentence = f"{phrases[judged]} ({count})"
    if judged != "inconclusive":
        return sentence
    what = "slow-down" if rule.scale == "log" else "difference"
    detectable = "" if mde80 is None else f"; smallest detectable {what}, with 80 % power: {_write_limit(mde80, rule)}"
    remedy = "" if needed is None or needed > MAX_ADVISED else f"; measure {needed} replicates"
    return f"{sentence}{detectable}{remedy}"


def _write_limit(limit: float, rule: VerdictRule) -> str:
    return _percent(limit) if rule.scale == "log" else f"{limit:.3g} {rule.unit}".strip()


def _interval(effect: Effect, tail: float, rule: VerdictRule) -> str:
    level, found = 1 - 2 * tail, effect.interval(tail)
    values = map(from_log, found) if rule.scale == "log" else found
    ends = ["no bound" if end is None else f"{end:.4g}" for end in values]
    percent = f"{100 * max(level, 0.0):.4g}" if level < 0.9999 else "over 99.99"
    return f"{percent} % interval [{', '.join(ends)}]"


def _percent(fraction: float) -> str:
    percent = 100 * fraction
    return f"{percent:.0f} %" if percent >= 999.5 else f"{percent:.3g} %"


K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def decide_family(effects: Mapping[K, Effect | Gain], rules: Mapping[K, VerdictRule]) -> dict[K, Comparison]:
    """The verdicts on named effects, each by the limits of its rule, with the family-wise error rate `alpha` of the
    rules; {} without effects.

    Each interval is at the level at which Holm's procedure decided or stopped for that comparison.
    """

    def judge(name: K, family: int) -> Comparison:
        return decide(effects[name], dataclasses.replace(rules[name], family=family))

    return holm_step_down(effects, judge, is_decided=lambda result: result.verdict in ("regressed", "improved"))


def holm_step_down(names: Iterable[K], judge: Callable[[K, int], R], *, is_decided: Callable[[R], bool]) -> dict[K, R]:
    """Holm's procedure: the result for each name, in order.

    `judge` judges a name as one of a number of names that share the rate; decided names (`is_decided`) leave the
    family, and the others are judged again with the smaller number. Deciding all names that pass at one level before
    raising the level gives the same result as Holm's sorted p-values.
    """
    order = list(names)
    decided: dict[K, R] = {}
    while True:
        open_names = [name for name in order if name not in decided]
        undecided = {name: judge(name, len(open_names)) for name in open_names}
        found = {name: result for name, result in undecided.items() if is_decided(result)}
        if not found:
            results = decided | undecided
            return {name: results[name] for name in order}
        decided |= found


# Converts a median absolute deviation to a standard deviation of normal values.
_MAD_TO_SD = 1.4826
# One factor explains the changes if the remaining scatter is less than half of the factor.
_LARGEST_SCATTER = 0.5


def run_wide_shift(log_ratios: Mapping[str, float], *, tolerance: float = 0.01, alpha: float = 0.05) -> str | None:
    """Why these unpaired comparisons prove nothing about the code: nearly all of them shifted to one side by about the
    same factor. One sentence for users, with the numbers; None if they did not.

    `log_ratios` maps a comparison's name to the log of candidate over base. A shift requires three conditions: the
    number of comparisons beyond the tolerance on one side has a probability of at most `alpha` (sign test, two-sided: 6
    of 6, 8 of 9, 9 of 10), the median is therefore also beyond it, and the scatter of the log ratios is at most half
    the median. A few regressed benchmarks, or many that changed by different amounts, are not a shift. Raises
    ValueError for log ratios that are not finite.
    """
    import numpy as np

    allowed = math.log1p(tolerance)
    if not log_ratios:
        return None
    values = checked_samples("log ratios", list(log_ratios.values()), positive=False)
    median = float(np.median(values))
    scatter = _MAD_TO_SD * float(np.median(np.abs(values - median)))
    beyond = int((math.copysign(1.0, median) * values > allowed).sum())
    count = values.size
    chance = sign_test(beyond, count) if 2 * beyond > count else 1.0
    if chance > alpha or scatter > _LARGEST_SCATTER * abs(median):
        return None
    return (
        f"{beyond} of {count} comparisons lie beyond the tolerance of {100 * tolerance:.3g} % on one side (sign test "
        f"p = {chance:.2g}), median ratio {math.exp(median):.4g}, scatter {100 * scatter:.3g} %: the machine changed, "
        "not the code; measure both sides in one run"
    )


def select_pairs(
    base_flags: Sequence[bool], candidate_flags: Sequence[bool], *, least: int, alpha: float = 0.05
) -> tuple[tuple[int, ...], str]:
    """The indexes of the pairs without a flag on either side, and one sentence for users on the pairs that were
    dropped; it is empty if none is flagged.

    All pairs stay if fewer than `least` would remain, or if the flags are not balanced, so that dropping may favour one
    side.

    Flags must not depend on the compared values. They are balanced by McNemar's exact two-sided test at `alpha` on the
    pairs with one flag; with fewer than 6 such pairs they always are at 5 %. Raises ValueError for sides of unequal
    length.
    """
    pairs = list(zip(base_flags, candidate_flags, strict=True))
    clean = tuple(index for index, pair in enumerate(pairs) if not any(pair))
    only_base, only_candidate = pairs.count((True, False)), pairs.count((False, True))
    dropped, every = len(pairs) - len(clean), tuple(range(len(pairs)))
    if sign_test(only_base, only_base + only_candidate) <= alpha:
        sides = f"{only_base} on the base only, {only_candidate} on the candidate only"
        return every, f"{dropped} of {len(pairs)} pairs are flagged, not balanced ({sides}): kept all"
    if len(clean) < min(least, len(pairs)):
        why = f"would leave {len(clean)}, below {least}: kept all"
        return every, f"dropping the {dropped} flagged of {len(pairs)} pairs {why}"
    flagged = f"base flagged in {sum(base_flags)}, candidate in {sum(candidate_flags)}"
    return clean, f"dropped {dropped} of {len(pairs)} pairs: {flagged}" if dropped else ""


# --- memory peaks -----------------------------------------------------------------------------------------------------
# A peak is a discrete number: an allocator takes one of a few paths, and often always the same one. A t-test on it
# either divides by a variance of zero or treats two modes as noise (executorch observed 4 values in 22 runs, in a band
# of 160 MB). A user needs to know whether the program still fits, which depends on the largest observed peak.


def compare_bytes(base: Sequence[float], candidate: Sequence[float], *, tolerance: float) -> Comparison:
    """The verdict on two lists of peaks in bytes, one per trial: the maxima are equal if they agree within `tolerance`.

    `tolerance` is a fraction; use 0 for computed bytes, which must agree exactly. The interval is the ratio itself;
    there is no power and no number of replicates to plan. Lists may differ in length. Raises ValueError for an empty
    list, and for peaks that are negative or not finite.
    """
    peak_base, peak_candidate = _peak("base", base), _peak("candidate", candidate)
    verdict: Verdict = "equivalent"
    if peak_candidate > peak_base * (1 + tolerance):
        verdict = "regressed"
    elif peak_base > peak_candidate * (1 + tolerance):
        verdict = "improved"
    ratio = peak_candidate / peak_base if peak_base > 0 else (1.0 if peak_candidate == 0 else None)
    beyond = f"more than {100 * tolerance:.3g} % " if tolerance else ""
    where = {
        "regressed": f"{beyond}above",
        "improved": f"{beyond}below",
        "equivalent": "equal to" if peak_base == peak_candidate else f"within {100 * tolerance:.3g} % of",
    }[verdict]
    return Comparison(
        verdict=verdict,
        ratio=ratio,
        low=ratio,
        high=ratio,
        reason=(
            f"the largest peak of {len(candidate)} candidate trials, {peak_candidate:.0f} bytes, is {where} "
            f"the {peak_base:.0f} bytes of {len(base)} base trials"
        ),
        replicates=min(len(base), len(candidate)),
    )


def _peak(side: str, peaks: Sequence[float]) -> float:
    values = checked_samples(side, peaks, positive=False)
    if values.min() < 0:
        index = int(values.argmin())
        raise ValueError(
            f"{side} sample {index} is {values[index]:g} bytes: a peak cannot be negative; measure it again"
        )
    return float(values.max())
