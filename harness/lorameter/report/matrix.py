"""Several A/B runs in one table: what each change of versions did to each study, a column a change.

Every cell is a verdict of its own run, paired there turn by turn; neighbouring cells were measured at
different times and is compared with nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.records import codec
from lorameter.report.blocks import Cell, ColumnHeader, Document, Line, Span, Table, say, write_row
from lorameter.report.comparison import write_compared, write_verdict
from lorameter.report.phrases import title_of_ratio
from lorameter.verdicts.comparison_report import ComparisonReport, ComparisonRow


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRun:
    """One A/B run: the study that it measured, and what it found."""

    run: str
    study: str
    report: ComparisonReport

    @property
    def name(self) -> str:
        """What changed."""
        return f"{self.report.candidate} against {self.report.base}"


def describe_matrix(changes: Sequence[MatrixRun]) -> Document:
    """A row for each metric of each variant of each study, a column for each change."""
    twice = Counter((change.study, change.name) for change in changes)
    names = [one.name if twice[one.study, one.name] == 1 else f"{one.name}, run {one.run}" for one in changes]
    columns = list(dict.fromkeys(names))
    cells: dict[tuple[str, str, str], dict[str, ComparisonRow]] = {}
    for change, name in zip(changes, names, strict=True):
        for compared in change.report.comparisons:
            cells.setdefault((change.study, compared.name, compared.metric), {})[name] = compared
    heads = [
        ColumnHeader(text="study", collapse_if_constant=True),
        ColumnHeader(text="variant", collapse_if_constant=True),
        ColumnHeader(text="metric", collapse_if_constant=True),
    ]
    heads += [ColumnHeader(text=name, right=True) for name in columns]
    rows = [
        write_row(study, variant, title_of_ratio(metric), *(_cell(found.get(name)) for name in columns))
        for (study, variant, metric), found in cells.items()
    ]
    return (
        say(Span(text="Studies by changes of versions", tone="strong"), indented=False),
        Table(heads=tuple(heads), rows=tuple(rows), notes=(_note(), *map(_run, changes)), blank_line_before=True),
    )


def encode_matrix(changes: Sequence[MatrixRun]) -> list[dict[str, Any]]:
    """A row a comparison, with its run, its study and its sides."""
    return [
        {
            "run": change.run, "study": change.study, "base": change.report.base, "candidate": change.report.candidate,
            **codec.to_json(one),
        }
        for change in changes
        for one in change.report.comparisons
    ]  # fmt: skip


def _cell(compared: ComparisonRow | None) -> Cell:
    if compared is None:
        return Cell(text="–")
    verdict = write_verdict(compared)
    return dataclasses.replace(write_compared(compared), verdict=verdict.verdict, said=verdict.said)


def _note() -> Line:
    return say(Span(text="candidate over base, above 1 is worse; each cell is of its own run", tone="faint"))


def _run(change: MatrixRun) -> Line:
    return say(f"{change.study}, {change.name}: run {change.run}")
