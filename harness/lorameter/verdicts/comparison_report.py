"""What a comparison of two sides found, whatever the sides were: two runs, two files, or the two arms of an A/B run.

One family, one set of limits and one kind of row, so that `compare`, `gate`, `ab` and the pytest plugin print the same
verdicts and end with the same exit code. Who compares says only how the sides are paired.
What is not a finding of "no worse" is no pass: nothing compared, a missing baseline and an open question included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorameter.errors import (
    EXIT_INCONCLUSIVE,
    EXIT_INVALID,
    EXIT_NOT_COMPARABLE,
    EXIT_PASS,
    EXIT_REGRESSION,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
)
from lorameter.records import codec
from lorameter.records.record import Interleaving, Notice
from lorameter.stats import Comparison, Verdict
from lorameter.verdicts.comparison_input import Difference
from lorameter.verdicts.same_training import LossAgreement, encode_losses

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
class ComparisonRow:
    """One metric of one variant, candidate against base, with the limits it was judged by."""

    variant: str
    metric: str
    comparison: Comparison
    tolerance: float
    margin: float
    interleaving: Interleaving
    site: str = ""
    """On which of several sites that are unlike; empty where nothing hangs on it."""

    @property
    def name(self) -> str:
        """The variant, and the site where there are several."""
        return f"{self.variant} on {self.site}" if self.site else self.variant

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
    comparisons: tuple[ComparisonRow, ...]
    control: Mapping[str, Comparison | None] = dataclasses.field(default_factory=dict)
    """By phase, the candidate's reference against itself; empty where no control is known."""
    differing: tuple[Difference, ...] = ()
    notices: tuple[Notice, ...] = ()
    losses: Mapping[str, LossAgreement] = dataclasses.field(default_factory=dict)
    """Whether the losses of both sides agree, by variant; empty where it was not examined."""


def worst(codes: Iterable[int]) -> int:
    """The exit code that wins; a code that is not of the contract counts as an unexpected error."""
    ranks = [PRECEDENCE.index(code) if code in PRECEDENCE else 0 for code in codes]
    return PRECEDENCE[min(ranks)] if ranks else EXIT_NOT_COMPARABLE


def exit_code(comparisons: Iterable[ComparisonRow], *, inconclusive: int = EXIT_INCONCLUSIVE) -> int:
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
        **({"losses": encode_losses(report.losses)} if report.losses else {}),
    }


def _row(compared: ComparisonRow) -> dict[str, Any]:
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
        **({"site": compared.site} if compared.site else {}),
    }
