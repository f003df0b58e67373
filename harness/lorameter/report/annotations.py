"""Annotations of a GitHub job, as workflow commands, for a gate or a single run.

The worst verdict comes first, since GitHub shows only ten annotations per level and step; each verdict that does not
pass has its reason.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorameter.report.comparison import comparison_title, describe_outcome, write_ratio_or_peak
from lorameter.report.phrases import metric_title
from lorameter.report.run_view import RunView
from lorameter.terminal import escape_control_chars
from lorameter.verdicts.claims import ClaimsReport
from lorameter.verdicts.compare import EXIT_OF, PRECEDENCE, ComparisonReport
from lorameter.verdicts.gate import GateResult

_ESCAPES = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})


def comparison_annotations(report: ComparisonReport, gate: GateResult | None = None) -> Iterator[str]:
    """Annotations of a comparison, or of the gate that judged it: an error for each verdict that does not pass, or a
    warning if the gate's policy accepts it."""
    outcome = f"{describe_outcome(gate)}: " if gate else ""
    message = f"{_invalid(report.why_invalid)}{outcome}{comparison_title(report)}"
    level = "notice" if gate is None or gate.passed else "error"
    yield annotation(level, f"lorameter {'gate' if gate else 'compare'}", message)
    lenient = gate is not None and gate.policy.inconclusive == "pass"
    for row in sorted(report.comparisons, key=lambda row: PRECEDENCE.index(EXIT_OF[row.verdict])):
        if EXIT_OF[row.verdict]:
            ratio = f"{write_ratio_or_peak(row).line}, " if row.ratio is not None else ""
            level = "warning" if row.verdict == "inconclusive" and lenient else "error"
            title = f"lorameter: {row.name}, {metric_title(row.metric)} {row.verdict}"
            yield annotation(level, title, f"{ratio}{row.reason}")
    yield from (annotation("error", "lorameter: policy", line) for line in (gate.unmet if gate else ()))
    yield from (annotation("warning", "lorameter: differing", str(field)) for field in report.differing)


def _invalid(reasons: str | None) -> str:
    return "" if reasons is None else f"INVALID: {reasons}. "


def annotation(level: str, title: str, message: str) -> str:
    """One workflow command; characters that would end its title or line are escaped."""
    escaped = title.translate(_ESCAPES | str.maketrans({":": "%3A", ",": "%2C"}))
    return f"::{level} title={escape_control_chars(escaped)}::{escape_control_chars(message.translate(_ESCAPES))}"


def run_annotations(view: RunView) -> Iterator[str]:
    """Annotations of a run: an error for each trial without a result or for an invalid run, a warning for each
    notice."""
    counted = ", ".join(f"{count} {status}" for status, count in view.counts.items()) or "none yet"
    state = "valid" if view.valid else "invalid"
    message = f"{_invalid(view.validity.invalid)}{view.run.manifest.run} is {state}: {counted}"
    yield annotation("notice" if view.valid else "error", "lorameter run", message)
    for failure in view.validity.failures:
        yield annotation("error", "lorameter: trial without a result", failure)
    for notice in view.notices:
        yield annotation("warning", f"lorameter: {notice.code}", f"{notice.message} {notice.remedy}")


def claims_annotations(report: ClaimsReport) -> Iterator[str]:
    """Annotations of claims: a warning for each refuted claim, else a notice; claims are findings, not failures."""
    yield annotation("notice" if report.valid else "error", "lorameter claims", f"{report.title}: run {report.run}")
    for claim in sorted(report.claims, key=lambda claim: claim.verdict != "refuted"):
        level = "warning" if claim.verdict == "refuted" else "notice"
        reasons = "; ".join(part.reason for part in claim.parts)
        yield annotation(level, f"lorameter: claim {claim.id} {claim.verdict}", f"{claim.says}: {reasons}")
