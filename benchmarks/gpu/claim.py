"""A claim about GPUs, and how it is decided: confirmed, refuted, or not decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu.evidence import Evidence, NotSeenError

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
    """The steps that it needs to be decided."""

    def decide(self, evidence: Evidence) -> Decision:
        """Judge by the evidence; missing evidence leaves the claim undecided."""
        try:
            return self.judge(evidence)
        except NotSeenError as error:
            return Decision(verdict="not decided", evidence=str(error))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            # A document of another form than expected is no evidence, and the other claims are judged all the same.
            return Decision(verdict="not decided", evidence=f"cannot be read: {type(error).__name__}: {error}")


def decided(holds: bool, evidence: str) -> Decision:
    """Return confirmed if the claim holds, else refuted."""
    return Decision(verdict="confirmed" if holds else "refuted", evidence=evidence)


def undecided(why: str) -> Decision:
    """Return a decision that is neither."""
    return Decision(verdict="not decided", evidence=why)


def by_tests(*names: str) -> Judge:
    """Return a judge: refuted by a failed test; confirmed if no test failed and a case of each passed.

    Args:
        names: `FILE::NAME`, with all cases of a parametrised test.
    """

    def judge(evidence: Evidence) -> Decision:
        found = [evidence.tests(name) for name in names]
        cases = [(case, test) for group in found for case, test in group.items()]
        failed = [f"{case}: {test.why}" for case, test in cases if test.outcome == "failed"]
        if failed:
            return decided(False, "; ".join(failed))
        skipped = "; ".join(sorted({test.why for _, test in cases if test.outcome == "skipped"}))
        if not all(any(test.outcome == "passed" for test in group.values()) for group in found):
            return undecided(f"skipped: {skipped}")
        passed = sum(test.outcome == "passed" for _, test in cases)
        return decided(True, f"{passed} tests passed" + (f"; skipped: {skipped}" if skipped else ""))

    return judge
