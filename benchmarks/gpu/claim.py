"""A claim about GPUs, and how it is decided: confirmed, refuted, or not decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu.evidence import Evidence, MissingEvidenceError

Verdict = Literal["confirmed", "refuted", "not decided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A verdict and its evidence."""

    verdict: Verdict
    evidence: str


Judge = Callable[[Evidence], Decision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A statement about a GPU, and the judge that decides it."""

    name: str
    says: str
    judge: Judge
    steps: tuple[str, ...]
    """The steps whose results the judge reads."""

    def decide(self, evidence: Evidence) -> Decision:
        """Judge by the evidence; missing evidence leaves the claim undecided."""
        try:
            return self.judge(evidence)
        except MissingEvidenceError as error:
            return Decision(verdict="not decided", evidence=str(error))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            # An unreadable document is no evidence, and the other claims are still judged.
            return Decision(verdict="not decided", evidence=f"cannot be read: {type(error).__name__}: {error}")


def make_decision(holds: bool, evidence: str) -> Decision:
    """Return confirmed if the claim holds, else refuted."""
    return Decision(verdict="confirmed" if holds else "refuted", evidence=evidence)


def leave_undecided(reason: str) -> Decision:
    """Return a decision that neither confirms nor refutes the claim."""
    return Decision(verdict="not decided", evidence=reason)


def by_tests(*names: str) -> Judge:
    """Return a judge: refuted by a failed test; confirmed if no test failed and a case of each passed.

    Args:
        names: `FILE::NAME`, with all cases of a parametrised test.
    """

    def judge(evidence: Evidence) -> Decision:
        found = [evidence.tests(name) for name in names]
        cases = [(case, test) for group in found for case, test in group.items()]
        failed = [f"{case}: {test.reason}" for case, test in cases if test.outcome == "failed"]
        if failed:
            return make_decision(False, "; ".join(failed))
        skipped = "; ".join(sorted({test.reason for _, test in cases if test.outcome == "skipped"}))
        if not all(any(test.outcome == "passed" for test in group.values()) for group in found):
            return leave_undecided(f"skipped: {skipped}")
        passed = sum(test.outcome == "passed" for _, test in cases)
        return make_decision(True, f"{passed} tests passed" + (f"; skipped: {skipped}" if skipped else ""))

    return judge
