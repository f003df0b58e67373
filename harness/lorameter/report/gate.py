"""What a gate made of a comparison, the outcome first."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lorameter.report.blocks import Document, Section, Span, Tone, say, say_invalid
from lorameter.report.comparison import describe_comparison

if TYPE_CHECKING:
    from lorameter.verdicts.gate import GateResult


def describe_gate(result: GateResult, *, ab: bool = False) -> Document:
    """Whether the gate is passed and why, then the comparison; `ab`: whether both sides were measured in one job."""
    unmet = tuple(say(Span(text=line, tone="bad")) for line in result.unmet)
    tone: Tone = "good" if result.passed else "bad"
    invalid = result.report.why_invalid
    outcome = Section(title=outcome_of(result), tone=tone, lines=unmet, blank_line_before=False, last=invalid is None)
    first = say_invalid(invalid)
    return (*first, outcome, *describe_comparison(result.report, ab=ab)[len(first) :])


def outcome_of(result: GateResult) -> str:
    """Whether the gate is passed, with which exit code, and how many verdicts of each kind there are."""
    counts = Counter(compared.verdict for compared in result.report.comparisons)
    words = [f"{count} {verdict.replace('_', ' ')}" for verdict, count in counts.items()]
    counted = ", ".join(words) or "nothing compared"
    return f"Gate {'passed' if result.passed else 'failed'} (exit {result.exit_code}): {counted}"
