"""What a comparison of two sides found, whatever the sides were: two runs, two files, or the two arms of an A/B run.

One family, one set of limits and one kind of row, so that `compare`, `gate`, `ab` and the pytest plugin print the same
verdicts and end with the same exit code. Who compares says only how the sides are paired.
What is not a finding of "no worse" is no pass: nothing compared, a missing baseline and an open question included.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import (
    EXIT_INCONCLUSIVE,
    EXIT_INVALID,
    EXIT_NOT_COMPARABLE,
    EXIT_PASS,
    EXIT_REGRESSION,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
)
from harness.records import codec
from harness.records.metrics import PEAKS, PHASES, PRIMARY
from harness.records.record import Interleaving, Notice
from harness.stats import Comparison, KeptPairs, Pairing, Verdict, compare_bytes
from harness.stats.comparison import decide_family, effect_of
from harness.stats.effect import Effect
from harness.verdicts.comparand import BYTES_SUFFIX, Difference, Measurements
from harness.verdicts.series import oriented, with_drops

SCHEMA = 1
"""Version of the JSON document of a comparison. 1: first form."""

PRECEDENCE = (
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    EXIT_INVALID,
    EXIT_REGRESSION,
    EXIT_NOT_COMPARABLE,
    EXIT_INCONCLUSIVE,
    EXIT_PASS,
)
"""Where several exit codes apply, the first of these wins."""

EXIT_OF: dict[Verdict, int] = {
    "improved": EXIT_PASS,
    "equivalent": EXIT_PASS,
    "regressed": EXIT_REGRESSION,
    "inconclusive": EXIT_INCONCLUSIVE,
    "invalid": EXIT_INVALID,
    "no_baseline": EXIT_NOT_COMPARABLE,
    "not_comparable": EXIT_NOT_COMPARABLE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One metric of one variant, candidate against base, with the limits it was judged by."""

    variant: str
    metric: str
    comparison: Comparison
    tolerance: float
    margin: float
    interleaving: Interleaving

    @property
    def verdict(self) -> Verdict:
        """The finding, or why there is none."""
        return self.comparison.verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonReport:
    """Everything that a comparison of two sides says."""

    base: str
    """What the base is called: a run id, a file, a revision."""
    candidate: str
    comparisons: tuple[Compared, ...]
    control: Mapping[str, Comparison | None] = dataclasses.field(default_factory=dict)
    """By phase, the candidate's reference against itself; empty where no control is known."""
    differing: tuple[Difference, ...] = ()
    notices: tuple[Notice, ...] = ()


def without_numbers(verdict: Verdict, reason: str) -> Comparison:
    """A verdict where there was nothing to compute, or where the numbers must not be believed."""
    return Comparison(
        verdict=verdict,
        ratio=None,
        low=None,
        high=None,
        reason=reason,
        replicates=0,
        replicates_needed=None,
        mde80=None,
    )


def worst(codes: Iterable[int]) -> int:
    """The exit code that wins; a code that is not of the contract counts as an unexpected error."""
    ranks = [PRECEDENCE.index(code) if code in PRECEDENCE else 0 for code in codes]
    return PRECEDENCE[min(ranks)] if ranks else EXIT_NOT_COMPARABLE


def exit_code(comparisons: Iterable[Compared], *, inconclusive: int = EXIT_INCONCLUSIVE) -> int:
    """The exit code of all verdicts together; nothing compared is "not comparable", never a pass.

    `inconclusive` is what that verdict counts as: a policy may let it pass.
    """
    codes = EXIT_OF | {"inconclusive": inconclusive}
    return worst(codes[compared.verdict] for compared in comparisons)


def document(report: ComparisonReport) -> dict[str, Any]:
    """The report as JSON data of the contract, without its `schema`."""
    return {
        "base": report.base,
        "candidate": report.candidate,
        "comparisons": [_row(compared) for compared in report.comparisons],
        "control": {phase: codec.to_json(control) for phase, control in report.control.items()},
        "differing": [codec.to_json(difference) for difference in report.differing],
        "notices": [codec.to_json(notice) for notice in report.notices],
    }


def _row(compared: Compared) -> dict[str, Any]:
    comparison = compared.comparison
    return {
        "variant": compared.variant,
        "metric": compared.metric,
        "verdict": comparison.verdict,
        "ratio": comparison.ratio,
        "low": comparison.low,
        "high": comparison.high,
        "tolerance": compared.tolerance,
        "margin": compared.margin,
        "reason": comparison.reason,
        "interleaving": compared.interleaving,
        "replicates": comparison.replicates,
        "replicates_needed": comparison.replicates_needed,
        "mde80": comparison.mde80,
    }


TOLERANCE = 0.01
MARGIN = 0.05
ALPHA = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one comparison, as fractions."""

    tolerance: float = TOLERANCE
    """Smallest slow-down, or growth of a peak, worth an alarm."""
    margin: float = MARGIN
    """Within it two things count as equal."""


LimitsOf = Callable[[str, str], Limits]
"""Limits by variant and metric."""


def default_limits(variant: str, metric: str) -> Limits:
    """The same limits for everything, but exactness for computed bytes."""
    computed = metric.endswith(BYTES_SUFFIX) and "peak" not in metric and not metric.startswith("host_")
    return Limits(tolerance=0.0) if computed else Limits()


Key = tuple[str, str]
"""A variant and a metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SidePair:
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
    refusal: Comparison | None = None
    """The verdict where there is nothing to compare, or where the numbers do not count."""

    @property
    def key(self) -> Key:
        """By which its verdict is found."""
        return self.variant, self.metric

    @property
    def of_memory(self) -> bool:
        """Whether these are bytes, which are no time."""
        return self.metric.endswith(BYTES_SUFFIX)


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


def judge_pairs(pairs: Iterable[SidePair], limits_of: LimitsOf) -> dict[Key, Comparison]:
    """The verdict on each pair: memory by its maximum, times as one family that shares the error rate (Holm).

    What cannot be computed is invalid, with the reason.
    """
    found: dict[Key, Comparison] = {}
    effects: dict[Key, Effect] = {}
    for pair in pairs:
        if pair.sides is None or pair.refusal is not None:
            found[pair.key] = pair.refusal or without_numbers("invalid", "not compared")
            continue
        try:
            if pair.of_memory:
                base, candidate = (side.peaks[pair.metric] for side in pair.sides)
                found[pair.key] = compare_bytes(base, candidate, tolerance=limits_of(*pair.key).tolerance)
                continue
            ours, theirs = (oriented(side.trials[pair.metric], pair.metric) for side in pair.sides)
            effect = effect_of(ours, theirs, pair.pairing)
        except ValueError as error:
            found[pair.key] = without_numbers("invalid", f"the samples cannot be compared: {error}")
            continue
        reasons = dict.fromkeys(side.no_interval for side in pair.sides if side.no_interval)
        if reasons:
            found[pair.key] = dataclasses.replace(
                without_numbers("inconclusive", "; ".join(map(str, reasons))),
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


def rows_of(pairs: Iterable[SidePair], verdicts: Mapping[Key, Comparison], limits_of: LimitsOf) -> tuple[Compared, ...]:
    """A row a pair, in their order, with its limits and with what was dropped of it."""
    return tuple(
        Compared(
            variant=pair.variant,
            metric=pair.metric,
            comparison=with_drops(verdicts[pair.key], pair.drops),
            tolerance=limits_of(*pair.key).tolerance,
            margin=limits_of(*pair.key).margin,
            interleaving=pair.interleaving,
        )
        for pair in pairs
    )
