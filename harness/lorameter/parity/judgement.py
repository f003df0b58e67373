"""Judges whether each way of serving gives the reference's answers, as far as the number of prompts allows.

The reference served twice is the noise floor; a difference within it does not count. The base without the adapter is
the opposite control: if the adapter changes nothing, an unchanged answer proves nothing about a merge.

Answers are independent of each other, so their share has a binomial interval. Tokens of one answer and losses of one
sequence are not independent: their intervals are over answers and over sequences. Maxima and minima are observed values
without intervals.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorameter.parity.facts import Parity
from lorameter.profile.measure import format_failure
from lorameter.records.record import Served
from lorameter.stats import Proportion, clustered_proportion, mean_interval, proportion
from lorameter.studies.request import AGAIN, WITHOUT

Verdict = Literal["same", "noise", "differ"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over answers or sequences with its 95 % interval; a single one has no interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """One way of serving, compared with the reference.

    Attributes:
        way: name of the way.
        answers: share of answers with a differing token, with the interval over prompts.
        first_difference: position of the first differing token, from 1; the median over the answers that differ.
        tokens: share of positions of the reference's answers at which the most likely token differs, with the interval
            over answers.
        kl_mean_nats: divergence from the reference's distribution of the next token.
        kl_max_nats: the largest divergence.
        difference_mean: mean absolute difference of the logits.
        difference_max: the largest difference.
        cosine_mean: mean cosine similarity between rows of logits.
        cosine_min: the smallest similarity.
        held_out_loss: loss of the sequences, in nats.
        loss_difference: difference from the reference's loss, sequence by sequence; above 0 is worse.
        within_floor: whether its distance from the reference is at most that of the reference from itself.
    """

    way: str
    answers: Proportion
    first_difference: float | None
    tokens: Proportion
    kl_mean_nats: Mean
    kl_max_nats: float
    difference_mean: Mean
    difference_max: float
    cosine_mean: Mean
    cosine_min: float
    held_out_loss: Mean
    loss_difference: Mean
    within_floor: bool = False

    @property
    def verdict(self) -> Verdict:
        """same: no answer differs; noise: some differ, but no more than between two servings of the reference; else
        differ."""
        if not self.answers.count:
            return "same"
        return "noise" if self.within_floor else "differ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """All comparisons of one adapter.

    Attributes:
        floor: the reference compared with itself; None if it could not be served again.
        without: the base without the adapter; None if it could not be served.
        likenesses: comparisons of all ways that answered, except the controls.
        failures: why a way did not answer, by way.
        distinct: number of different answers of the reference. If every answer is the same, as with an untrained model,
            many prompts are hardly more informative than one.
        trouble: why the verdicts are not reliable; empty if they are.
    """

    floor: Likeness | None
    without: Likeness | None
    likenesses: tuple[Likeness, ...]
    failures: dict[str, str]
    distinct: int
    trouble: str

    @property
    def whole(self) -> bool:
        """Whether every way answered and the controls allow a verdict."""
        return not self.failures and not self.trouble


def judge_parity(parity: Parity) -> Judgement:
    """Compare every way with the reference."""
    likenesses = {one.way: compare_served(parity.reference, one) for one in parity.served[1:] if one.failure is None}
    floor = next((one for way, one in likenesses.items() if way.endswith(AGAIN)), None)
    if floor is not None:
        likenesses = {
            way: dataclasses.replace(one, within_floor=_is_within(floor, one)) for way, one in likenesses.items()
        }
    without = next((one for way, one in likenesses.items() if way.startswith(WITHOUT)), None)
    controls = {way.name for way in parity.ways if way.is_control}
    return Judgement(
        floor=floor,
        without=without,
        likenesses=tuple(one for way, one in likenesses.items() if way not in controls),
        failures={one.way: format_failure(one.failure) for one in parity.served if one.failure is not None},
        distinct=len(set(parity.reference.answers)),
        trouble=_trouble(floor, without),
    )


def compare_served(reference: Served, other: Served) -> Likeness:
    """Compare one way with the reference. Raises ValueError if their numbers of prompts or sequences differ."""
    pairs = list(zip(reference.answers, other.answers, strict=True))
    places = [place for ours, theirs in pairs if (place := first_difference(ours, theirs)) is not None]
    distances = other.distances
    positions = [one.positions for one in distances]
    losses = [theirs - ours for ours, theirs in zip(reference.losses, other.losses, strict=True)]
    return Likeness(
        way=other.way,
        answers=proportion(len(places), len(pairs)),
        first_difference=statistics.median(places) if places else None,
        tokens=clustered_proportion([one.argmax_differs for one in distances], positions),
        kl_mean_nats=_mean([one.kl_mean_nats for one in distances]),
        kl_max_nats=max(one.kl_max_nats for one in distances),
        difference_mean=_mean([one.difference_mean for one in distances]),
        difference_max=max(one.difference_max for one in distances),
        cosine_mean=_mean([one.cosine_mean for one in distances]),
        cosine_min=min(one.cosine_min for one in distances),
        held_out_loss=_mean(other.losses),
        loss_difference=_mean(losses),
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Position of the first differing token, from 1; if one answer ends earlier, the difference is at its end. None if
    both are equal."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        if one != other:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs)) + 1


def _mean(values: Sequence[float]) -> Mean:
    value, low, high = mean_interval(values)
    return Mean(value=value, low=low, high=high)


def _is_within(floor: Likeness, one: Likeness) -> bool:
    return one.answers.count <= floor.answers.count and one.difference_max <= floor.difference_max


def _trouble(floor: Likeness | None, without: Likeness | None) -> str:
    if floor is None:
        return "the reference could not be run again, so the noise of its answers is unknown"
    if without is None:
        return "the base without the adapter could not be run, so the effect of the adapter is unknown"
    if _is_within(floor, without):
        return (
            "the base without the adapter answers as it does with it, so that a merge that leaves the adapter out "
            "would not be seen. Train for longer (--epochs), or give an adapter that has learnt something (--adapter)"
        )
    return ""
