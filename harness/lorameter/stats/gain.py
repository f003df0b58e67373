"""Judges a loss on the scale of the gain: the share of the reference's gain that a variant has.

A ratio of losses says nothing about learning: an untrained model whose loss is 1 % above that of a trained one is
within every usual margin. The share is (untrained - variant) / (untrained - reference), a ratio of two means over the
same replicates, with the interval of Fieller (1954, J. R. Stat. Soc. B 16): the shares s for which the mean of
(untrained - variant) - s (untrained - reference) does not differ from zero. The untrained loss is computed without
dropout on the same tokens, so it is a constant of the base. The interval is bounded only if the gain of the reference
is not zero; otherwise no share is stated.

The difference of both losses is paired and shares the scatter of the run, with the same family correction, as the log
ratio of times does (`lorameter.stats.effect`). Its correlation with the gain of the reference is that of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorameter.stats.effect import Effect, Pairing, mean_difference, paired_effect
from lorameter.stats.intervals import quantile
from lorameter.stats.samples import checked_trials, trial_medians
from lorameter.stats.verdict import Comparison, Verdict, VerdictRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """The losses of a candidate and its base next to the loss of the untrained model."""

    untrained: float
    gain: Effect
    """The untrained loss minus that of the base."""
    difference: Effect
    """The loss of the candidate minus that of the base; its scatter may be shared."""
    correlation: float
    """Of the two over replicates."""

    @property
    def share(self) -> float:
        """The candidate's part of the base's gain."""
        return 1 - self.difference.log_ratio / self.gain.log_ratio

    def reach(self, tail: float) -> float:
        """Half the interval of the base's gain with error rate `tail` on each side; infinite with one replicate."""
        return self._critical(tail) * self.gain.spread.standard_error if self.gain.spread else math.inf

    def interval(self, tail: float) -> tuple[float, float]:
        """Fieller's interval of the share, for a gain above `reach`."""
        gain, difference = self.gain.log_ratio, self.difference.log_ratio
        assert self.gain.spread is not None
        assert self.difference.spread is not None
        error, other = self.gain.spread.standard_error, self.difference.spread.standard_error
        square, common = self._critical(tail) ** 2, self.correlation * error * other
        # Of 1 - share, the ratio of the difference to the gain.
        squared, linear, constant = (
            gain**2 - square * error**2, gain * difference - square * common, difference**2 - square * other**2
        )  # fmt: skip
        root = math.sqrt(max(linear**2 - squared * constant, 0.0))
        return 1 - (linear + root) / squared, 1 - (linear - root) / squared

    def _critical(self, tail: float) -> float:
        return max(quantile(self.difference.spread.df, tail), 0.0) if self.difference.spread else math.inf


def estimate_gain(
    untrained: float, base: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]], pairing: Pairing
) -> Gain:
    """The gain, from the losses of each trial. Raises ValueError for losses that are not finite."""
    import numpy as np

    ours, theirs = (trial_medians(checked_trials("losses", trials, positive=False)) for trials in (base, candidate))
    gain, difference = paired_effect(untrained - ours, "replicate"), mean_difference(ours, theirs, pairing)
    errors = [one.spread.standard_error if one.spread else 0.0 for one in (gain, difference)]
    if not all(errors):
        correlation = 0.0
    elif pairing == "none":  # only the losses of the base are in both
        correlation = errors[0] / errors[1]
    else:
        correlation = float(np.corrcoef(-ours, theirs - ours)[0, 1])
    return Gain(untrained=untrained, gain=gain, difference=difference, correlation=correlation)


def decide_gain(gain: Gain, rule: VerdictRule) -> Comparison:
    """The verdict on a gain: tolerance and margin are parts of the base's gain."""
    mean, spread, replicates = gain.gain.log_ratio, gain.difference.spread, gain.difference.replicates
    losses = f"untrained {gain.untrained:.4f}, reference {gain.untrained - mean:.4f}"
    if spread is None or gain.gain.spread is None:
        why = f"one replicate gives no interval of the gain ({losses}): measure 5, at least 2"
        return Comparison(verdict="inconclusive", reason=why, replicates=replicates)
    tail = rule.tail(spread)
    reach, level = gain.reach(tail), f"{100 * (1 - 2 * tail):.4g} %"
    if mean <= reach:
        why = (
            f"the reference's gain is not resolved, so no share of it is: {losses}, gain {mean:.4f} with the {level} "
            f"interval [{mean - reach:.4f}, {mean + reach:.4f}]; train for more steps, or measure more replicates"
        )
        return Comparison(verdict="inconclusive", reason=why, replicates=replicates)
    (low, high), narrow = gain.interval(tail), gain.interval(rule.alpha)
    verdict: Verdict = "inconclusive"
    if high < 1 - rule.tolerance:
        verdict = "regressed"
    elif low > 1 + rule.tolerance:
        verdict = "improved"
    elif 1 - rule.margin < narrow[0] and narrow[1] < 1 + rule.margin and gain.difference.pairing != "none":
        verdict = "equivalent"
    words = {
        "regressed": f"which is less by more than {100 * rule.tolerance:.3g} % of it",
        "improved": f"which is more by more than {100 * rule.tolerance:.3g} % of it",
        "equivalent": f"which is all of it ± {100 * rule.margin:.3g} %: {_percent(narrow)} in the narrower interval of "
        f"{100 * (1 - 2 * rule.alpha):.4g} %",
        "inconclusive": "so it is open whether it learned as much; measure more replicates, or train for more steps",
    }
    return Comparison(
        verdict=verdict,
        share=gain.share,
        low=low,
        high=high,
        reason=f"learned {100 * gain.share:.3g} % of the reference's gain, {level} interval {_percent((low, high))}, "
        f"{words[verdict]} ({losses}; {replicates} replicates)",
        replicates=replicates,
    )


def _percent(ends: tuple[float, float]) -> str:
    return f"[{', '.join(f'{100 * end:.3g}' for end in ends)}]"
