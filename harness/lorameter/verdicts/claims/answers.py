"""How much of the spread of open-ended requests is nothing but the length of the answers.

A request that the model ends itself takes as long as its answer is long. A setting that makes a model say less looks
faster by that alone; what the number of tokens does not explain is left for speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from lorameter.records.metrics import samples_of
from lorameter.records.record import TrialRecord
from lorameter.stats import ShareEstimate, explained_share
from lorameter.verdicts.series import Groups, Series

TOKENS, TIME = "open_ended_tokens", "open_ended_request_time_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Shares of the variance of request time that the number of tokens explains (R²), over replicates."""

    requests: ShareEstimate | None
    """Between the requests of all variants; None where it was not measured or every answer had one length."""
    variants: ShareEstimate | None
    """Between the means of the variants; None as well with fewer than three of them."""


def answers_of(groups: Groups) -> Answers:
    """The shares of a run, from its variants without the control, which is one of them measured twice."""
    trials = [record for (_, role), series in groups.items() if role == "variant" for record in _measuring(series)]
    replicates = sorted({record.replicate for record in trials})
    blocks = [[_points(record) for record in trials if record.replicate == replicate] for replicate in replicates]
    return Answers(
        requests=explained_share([_joined(block) for block in blocks]),
        variants=explained_share(
            [([fmean(tokens) for tokens, _ in block], [fmean(times) for _, times in block]) for block in blocks]
        ),
    )


def _measuring(series: Series) -> Iterable[TrialRecord]:
    return (record for record in series.measuring(TIME) if samples_of(record, TOKENS))


def _points(record: TrialRecord) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return samples_of(record, TOKENS), samples_of(record, TIME)


def _joined(block: Iterable[tuple[tuple[float, ...], tuple[float, ...]]]) -> tuple[list[float], list[float]]:
    points = [point for tokens, times in block for point in zip(tokens, times, strict=True)]
    return [tokens for tokens, _ in points], [time for _, time in points]
