"""What a comparison of two sides found, whatever the sides were: two runs, two files, or the two arms of an A/B run.

One family, one set of limits and one kind of row, so that `compare`, `gate`, `ab` and the pytest plugin print the same
verdicts and end with the same exit code. Who compares says only how the sides are paired.
What is not a finding of "no worse" is no pass: nothing compared, a missing baseline and an open question included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

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
from lorameter.records.units import first_few
from lorameter.stats import Comparison, Verdict
from lorameter.verdicts.comparison_input import Difference
from lorameter.verdicts.same_training import LossAgreement

MOST_REASONS = 3
"""Reasons of invalid verdicts that are spelt out."""

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
class ComparisonRow(Comparison):
    """One metric of one variant, candidate against base, with the limits it was judged by."""

    variant: str
    metric: str
    tolerance: float
    margin: float
    interleaving: Interleaving
    """shared-base, lockstep, replicates, or separate: two runs of different times."""
    site: str = ""
    """On which of several sites that are unlike; empty where nothing hangs on it."""

    @property
    def name(self) -> str:
        """The variant, and the site where there are several."""
        return f"{self.variant} on {self.site}" if self.site else self.variant


def fields_of(found: Comparison) -> dict[str, Any]:
    """The fields of a comparison, for what has others in addition."""
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(Comparison)}


class ComparisonReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a comparison of two sides says."""

    base: str
    """What the base is called: a run id, a file, a revision."""
    candidate: str
    comparisons: tuple[ComparisonRow, ...]
    control: dict[str, Comparison | None] = {}
    """By phase, the candidate's reference against itself; empty where no control is known."""
    differing: tuple[Difference, ...] = ()
    notices: tuple[Notice, ...] = ()
    losses: dict[str, LossAgreement] = {}
    """Whether the losses of both sides agree, by variant; empty where it was not examined."""

    @property
    def why_invalid(self) -> str | None:
        """Why verdicts do not count: the first few reasons; None where all of them do."""
        reasons = dict.fromkeys(one.reason for one in self.comparisons if one.verdict == "invalid")
        return first_few(list(reasons), MOST_REASONS, "; ") if reasons else None


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
    return {"invalid": report.why_invalid, **codec.to_json(report)}
