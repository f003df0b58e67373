"""Judges whether each way gives the reference's answers, as far as the number of prompts allows.

The reference served twice is the noise floor; a difference within it does not count. The base without the adapter is
the other end: where the adapter changes nothing, that a merge changes nothing says nothing of the merge.

Answers are independent of each other, so their share has a binomial interval. Tokens of one answer are not, and neither
are the losses of one sequence: their intervals are over answers and over sequences. A largest or a least is what was
seen, and has none.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorameter.parity.facts import Parity
from lorameter.profile.measure import format_failure
from lorameter.records.parity import Served
from lorameter.stats import Proportion, clustered_proportion, mean_interval, proportion
from lorameter.studies.request import AGAIN, WITHOUT

Verdict = Literal["same", "noise", "differ"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over answers, or over sequences, with its 95 % interval; no interval of a single one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """One way of serving, compared with the reference.

    Attributes:
        way: its name.
        answers: those of which a token differs, with the interval over prompts.
        first_difference: place of the first token that differs, from 1; the median of the answers that differ.
        tokens: positions of the reference's answers at which the likeliest token differs, with the interval over
            answers.
        kl_mean_nats: divergence from the reference's distribution of the next token.
        kl_max_nats: the largest.
        difference_mean: of the logits, absolute.
        difference_max: the largest.
        cosine_mean: between rows of logits.
        cosine_min: the least.
        held_out_loss: of the sequences, in nats.
        loss_difference: from the reference's, sequence by sequence; above 0 is worse.
        within_floor: whether it is no further from the reference than the reference from itself.
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
        """same: no answer differs; noise: some do, and no more than the reference's from its own; else differ."""
        if not self.answers.count:
            return "same"
        return "noise" if self.within_floor else "differ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """All comparisons of one adapter.

    Attributes:
        floor: the reference against itself; None where it could not be served again.
        without: the base without the adapter; None where it could not be served.
        likenesses: of the ways that are no controls and that answered.
        failures: by way, why it did not answer.
        distinct: different answers of the reference. Where it says the same to every prompt, as an untrained model
            does, so many prompts are hardly more than one.
        trouble: why no verdict can be relied on; empty where one can.
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
    """One way against the reference. Raises ValueError where their prompts or sequences are not as many."""
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
    """Place of the first token that differs, from 1; one that ends where the other goes on differs there. None of two
    that are equal."""
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
