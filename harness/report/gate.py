"""What a gate made of a comparison: as a document, as Markdown, and as the annotations of a GitHub job.

Worst verdict first where a format cuts off (GitHub shows ten annotations of a level and step), and the reason of
everything that is not a pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from harness.report.comparison import (
    HEADS,
    describe_comparison,
    list_controls,
    list_differences,
    list_notices,
    metric_of,
    title_of,
    write_compared,
    write_rows,
)
from harness.report.table import Document, Section, Span, say
from harness.verdicts.outcome import EXIT_OF, PRECEDENCE
from kernels_check.visible import make_visible

if TYPE_CHECKING:
    from harness.verdicts.gate import GateResult


def describe_gate(result: GateResult) -> Document:
    """The comparison, what of the policy is unmet, and whether the gate is passed."""
    return (
        *describe_comparison(result.report),
        *(say(Span(text=line, tone="bad")) for line in result.unmet),
        Section(title=_outcome(result), tone="good" if result.passed else "bad"),
    )


def gate_markdown(result: GateResult) -> str:
    """The gate as Markdown, for the summary of a CI job."""
    report = result.report
    lines = [f"### {_outcome(result)}", "", _cell(title_of(report)), ""]
    if rows := write_rows(report):
        lines += [_row(head.text for head in HEADS), _row("---" for _ in HEADS)]
        lines += [_row(_cell(cell.line) for cell in row.cells) for row in rows]
        lines.append("")
    for line in (*result.unmet, *list_controls(report), *list_differences(report), *list_notices(report)):
        lines.append(f"- {_cell(line)}")
    return "\n".join(lines).rstrip() + "\n"


def gate_annotations(result: GateResult) -> str:
    """The gate as GitHub workflow commands: an error for what fails, a warning for what the policy lets pass."""
    report = result.report
    found: list[tuple[int, str]] = []
    for compared in report.comparisons:
        code = EXIT_OF[compared.verdict]
        if code:
            passes = compared.verdict == "inconclusive" and result.policy.inconclusive == "pass"
            ratio = write_compared(compared)
            said = f"{ratio.line}, " if ratio.value is not None else ""
            title = f"lorameter: {compared.variant}, {metric_of(compared)} {compared.verdict}"
            message = f"{said}{compared.comparison.reason}"
            found.append((PRECEDENCE.index(code), annotation("warning" if passes else "error", title, message)))
    lines = [line for _, line in sorted(found, key=lambda item: item[0])]
    lines += [annotation("error", "lorameter: policy", line) for line in result.unmet]
    lines += [annotation("warning", "lorameter: differing", line) for line in list_differences(report)]
    level = "notice" if result.passed else "error"
    whole = annotation(level, "lorameter gate", f"{_outcome(result)}: {title_of(report)}")
    return "\n".join([whole, *lines]) + "\n"


def annotation(level: str, title: str, message: str) -> str:
    """One workflow command; what would end its title or its line early is escaped."""
    for character, escaped in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        title, message = title.replace(character, escaped), message.replace(character, escaped)
    title = title.replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={make_visible(title)}::{make_visible(message)}"


def _outcome(result: GateResult) -> str:
    counts = Counter(compared.verdict for compared in result.report.comparisons)
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing compared"
    return f"Gate {'passed' if result.passed else 'failed'} (exit {result.exit_code}): {counted}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text that ends no cell and starts no markup."""
    for character in ("\\", "|", "*", "_", "`", "<", "["):
        text = text.replace(character, f"\\{character}")
    return make_visible(" ".join(text.split()))
