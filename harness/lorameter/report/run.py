"""The report of a run: what was measured and how, what people ask of each phase, what failed, what to know of it.

Of each phase first the variant, its ratio to the reference and the verdict on it, then what it takes and its memory,
then everything else, as far as there is room. What is equal for all variants is said once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from lorameter.records.metrics import METRICS, PHASE_TITLES
from lorameter.records.record import Interleaving
from lorameter.records.time_breakdown import TimeBreakdown
from lorameter.records.units import first_few, format_bytes, format_duration, format_percent
from lorameter.report.blocks import (
    Block,
    Cell,
    Collapsible,
    ColumnHeader,
    Document,
    Line,
    Row,
    Section,
    Span,
    Table,
    collapse_constant_columns,
    list_sections,
    say,
    say_each,
    say_invalid,
    tone_of,
    write_ratio,
)
from lorameter.report.notices import describe_notices
from lorameter.report.phase_table import CHECKS, PEAK, RATIO, TAILS, VARIANT, PhaseColumn, PhaseTable, VariantRow
from lorameter.report.phrases import (
    format_effect,
    format_inconclusive,
    split_basis,
    title_of,
    title_of_ratio,
    verdict_cell,
)
from lorameter.report.run_view import RunView
from lorameter.stats import Comparison
from lorameter.verdicts.comparison_input import is_memory
from lorameter.verdicts.series import is_difference

_PAIRED = {
    "shared-base": "the median of paired turns",
    "lockstep": "the median of paired turns",
    "replicates": "of the trials' medians, paired by replicate",
    "separate": "of medians, not paired",
}
_LABELS = {
    PHASE_TITLES["train"]: "training",
    PHASE_TITLES["generate"]: "generation",
    PHASE_TITLES["cold"]: "cold start",
}
AFTER_THROUGHPUT = 6
"""The place of a phase's second further metric: on a narrow terminal the picture of the ratio goes before peak memory
and tokens a second do."""
MOST_NAMED = 5
"""Variants that are named of one kind; the table has them all."""
ALL_ACTIVE = " active"
"""Ends what is said of checks that are all as required."""


def describe_run(view: RunView) -> Document:
    """All of a run's report."""
    return tuple(_blocks(view))


def _blocks(view: RunView) -> Iterator[Block]:
    yield from say_invalid(view.invalid)
    yield Section(title=view.title, lines=(*_summary(view), *view.facts), blank_line_before=False)
    for table in view.tables:
        yield _table(table)
        if table.serving is not None:
            yield table.serving
        yield from table.galleries
    yield from list_sections({"Differs from the study as written": view.deviations, "Notes": view.notes})
    if view.failures:
        yield Section(title="Trials without a result", lines=say_each(view.failures), tone="bad")
    yield from describe_notices(view.notices)
    yield from _statistics(view)
    yield from describe_spending(view.spending)
    counted = ", ".join(f"{count} {status}" for status, count in view.counts.items()) or "none yet"
    yield say(f"Trials: {counted}. Run {view.run} in {view.path}", indented=False, blank_line_before=True)
    if view.state != "complete":
        what = f" ({view.state}): what is shown is what there is."
        yield say(Span(text="This run is not complete", tone="alarm"), what, indented=False)


def _summary(view: RunView) -> Iterator[Line]:
    """What a reader with one minute needs: whether the run is valid, the verdicts on time, memory and loss, and whether
    the required paths were active. A terminal repeats it below the report."""
    lines = [line for table in (*view.tables, *view.outcomes) for line in _verdicts(table)]
    if view.valid:
        lines = [_validity(view), *lines, *_paths(view)]
    yield from (dataclasses.replace(line, last=view.valid) for line in lines)


def _validity(view: RunView) -> Line:
    controls = [f"{_label(table)} {table.control.verdict}" for table in view.tables if table.control is not None]
    trials = ", ".join(
        f"{count} of {sum(view.counts.values())} trials {status}" for status, count in view.counts.items()
    )
    return say(f"yes: {trials}" + (f"; A/A control: {', '.join(controls)}" if controls else ""), label="valid")


def _verdicts(table: PhaseTable) -> Iterator[Line]:
    """The verdicts of a table in a line: which variants differ and by how much, which are equivalent, and which are
    inconclusive or invalid."""
    found = [(row, row.ratio) for row in table.rows if row.ratio is not None]
    differing = [(row.name, ratio) for row, ratio in found if is_difference(ratio)]
    if len(differing) > MOST_NAMED:
        differing.sort(key=lambda one: -abs(math.log(one[1].ratio or 1.0)))
    spans: list[Span] = []
    for name, ratio in differing[:MOST_NAMED]:
        effect, _, interval = format_effect(ratio, table.metric).partition(" [")
        spans += [Span(text=", " if spans else ""), Span(text=name, tone="strong")]
        spans += [Span(text=f" {effect}", tone=tone_of(ratio.verdict))]
        spans += [Span(text=f" [{interval}", tone="faint")] if interval else []
    if len(differing) > MOST_NAMED:
        spans.append(Span(text=f" and {len(differing) - MOST_NAMED} more"))
    for verdict in ("equivalent", "inconclusive", "invalid"):
        if names := [row.name for row, ratio in found if ratio.verdict == verdict]:
            spans += [Span(text="; " if spans else ""), Span(text=f"{verdict}: ", tone=tone_of(verdict))]
            spans.append(Span(text=first_few(names, MOST_NAMED)))
    if spans:
        yield say(*spans, label=_label(table))


def _paths(view: RunView) -> Iterator[Line]:
    """Whether the required paths were active, of a run that requires any."""
    checked = [table for table in view.tables if table.cells(CHECKS)]
    found = [
        (row.name, cell.text) for table in checked for row, cell in zip(table.rows, table.cells(CHECKS), strict=True)
    ]
    missed = dict.fromkeys(f"{name}: {text}" for name, text in found if not text.endswith(ALL_ACTIVE))
    if missed:
        yield say(Span(text=first_few(list(missed), MOST_NAMED, "; "), tone="bad"), label="checks")
    elif found:
        yield say("all required paths active", label="checks")


def _label(table: PhaseTable) -> str:
    if is_memory(table.metric):
        return "memory"
    if METRICS[table.metric].is_loss:
        return "loss"
    return table.site or _LABELS.get(table.title, title_of(table.metric))


def _table(table: PhaseTable) -> Table:
    places = {column.key: place for place, column in enumerate(table.columns)}
    order = [VARIANT, *([] if table.alone else [RATIO]), table.metric, "step_cpu_time_s", PEAK, CHECKS]
    order += [column.key for column in table.columns if column.key not in order]
    heads, columns = [], []
    for rank, key in enumerate(one for one in order if one in places):
        column = table.columns[places[key]]
        heads.append(_head(column, table, rank))
        columns.append([_cell(key, row.cells[places[key]], row, table) for row in table.rows])
        if key == RATIO:
            heads.append(ColumnHeader(text="verdict", joins_left=True))
            columns.append([_finding(row, table) for row in table.rows])
    rows = zip(*columns, strict=True)
    return collapse_constant_columns(
        Table(
            title=table.title,
            heads=tuple(heads),
            rows=tuple(Row(cells=cells, strong=row.reference) for cells, row in zip(rows, table.rows, strict=True)),
            notes=tuple(_notes(table)),
            blank_line_before=True,
        )
    )


def _head(column: PhaseColumn, table: PhaseTable, rank: int) -> ColumnHeader:
    if column.key == VARIANT:
        return ColumnHeader(text=column.head)
    if column.key == RATIO:
        turned = table.metric in METRICS and METRICS[table.metric].higher_is_better
        return ColumnHeader(
            text=f"{'slow-down ' if turned else ''}{column.head}",
            right=True,
            ratio=True,
            picture_priority=AFTER_THROUGHPUT,
        )
    if column.key == CHECKS:
        return ColumnHeader(text=column.head, drop_priority=rank, collapse_if_constant=True, plain="required paths")
    if column.key == PEAK:
        where = {cell.detail for cell in table.cells(PEAK)} - {""}
        text = f"{column.head}, {min(where)}" if len(where) == 1 else column.head
        return ColumnHeader(text=text, right=True, drop_priority=rank)
    return ColumnHeader(
        text=column.head,
        right=True,
        drop_priority=0 if column.key == table.metric else rank,
        collapse_if_constant=column.key == TAILS,
    )


def _cell(key: str, cell: Cell, row: VariantRow, table: PhaseTable) -> Cell:
    """As it is, the verdict of a ratio in a column of its own, and bytes with one unit for all of them."""
    if key == RATIO:
        return dataclasses.replace(cell, verdict="")
    if key == CHECKS and cell.text.endswith(ALL_ACTIVE):
        return dataclasses.replace(cell, text="all active")
    if cell.unit == "byte" and cell.value is not None and cell.low is not None and cell.high is not None:
        low, high = (_bytes(end, cell.value) for end in (cell.low, cell.high))
        one = len({detail.detail for detail in table.cells(PEAK)}) == 1
        interval = "" if low == high else f"[{low}, {high}]"
        return dataclasses.replace(cell, interval=interval, detail="" if one else cell.detail)
    return cell


def _bytes(size: float, largest: float) -> str:
    """A size, without its unit where that is the one of the largest."""
    written, unit = format_bytes(size), format_bytes(largest).partition(" ")[2]
    return written.removesuffix(f" {unit}")


def _finding(row: VariantRow, table: PhaseTable) -> Cell:
    if row.ratio is None:
        return Cell()
    return verdict_cell(row.ratio, table.metric, row.margin, "variants")


def _notes(table: PhaseTable) -> Iterator[Line]:
    """One line on the control and the required paths; what is not as required has lines of its own."""
    checks = table.cells(CHECKS)
    if not table.alone:
        yield _control(table)
    if len(set(checks)) > 1:
        for row, cell in zip(table.rows, checks, strict=True):
            if not cell.text.endswith(ALL_ACTIVE):
                yield say(f"checks of {row.name}: ", Span(text=cell.text, tone="bad"))


def _control(table: PhaseTable) -> Line:
    control = table.control
    if control is None:
        return say("A/A control: not measured")
    if control.ratio is None:
        return say(f"A/A control: not measured: {control.reason}")
    said = verdict_cell(control, table.metric, 0.01 if is_memory(table.metric) else 0.05, "variants")
    return say(f"A/A control: {write_ratio(control).line} ", Span(text=said.said or said.verdict, tone="strong"))


def _inconclusive(table: PhaseTable) -> Iterator[Line]:
    """Of each inconclusive variant what to do; of an inconclusive control a notice says it."""
    for row in table.rows if not table.alone else ():
        if row.ratio is not None and row.ratio.verdict == "inconclusive":
            said = format_inconclusive(row.ratio, table.metric, _level(table)).removeprefix("Inconclusive: ")
            about = Span(text=f"{row.name}, {title_of_ratio(table.metric)}", tone="warning")
            yield say(about, f": {said}", label="inconclusive")


def _level(table: PhaseTable) -> Interleaving:
    return table.interleaving or "replicates"


def _estimators(tables: Sequence[PhaseTable]) -> Iterator[Line]:
    """Which number is what: a ratio is of pairs, an estimate of one variant alone."""
    pairs: dict[str, list[str]] = {}
    for table in tables:
        if not is_memory(table.metric):
            pairs.setdefault(_PAIRED[_level(table)], []).append(title_of_ratio(table.metric))
    if pairs:
        first, *others = pairs
        said = [first, *(f"of {', '.join(pairs[one])} {one}" for one in others)]
        yield say(f"{'; '.join(said)}; above 1 is worse; its interval is corrected for all variants", label="ratio")
    shown = [METRICS[column.key] for table in tables for column in table.columns if column.key in METRICS]
    means = dict.fromkeys(one.title for one in shown if one.phase != "cold" and one.of_trial != "median")
    if shown:
        of_means = f" ({', '.join(means)}: of its mean)" if means else ""
        estimates = f"geometric mean over trials of each trial's median{of_means}, with 95 % intervals"
        cold = "; cold starts: median of the processes" if any(one.phase == "cold" for one in shown) else ""
        yield say(estimates + cold, label="estimates")
    notes = dict.fromkeys(table.note for table in tables if table.note)
    if notes or any(is_memory(table.metric) or table.cells(PEAK) for table in tables):
        yield say("; ".join(["the largest of the trials, with the least and the largest", *notes]), label="memory")


def _statistics(view: RunView) -> Iterator[Block]:
    """What an inconclusive verdict needs and how the numbers follow from the trials; folded: what each verdict rests
    on."""
    tables = [table for table in (*view.tables, *view.outcomes) if not table.alone]
    needs = [line for table in tables for line in _inconclusive(table)]
    lines = [*needs[:MOST_NAMED], *_estimators(tables)]
    folded = [*needs[MOST_NAMED:], *_reasons(tables)]
    if lines:
        yield Section(title="Statistics", lines=tuple(lines))
    if folded:
        summary = say(Span(text="what each verdict rests on", tone="faint"))
        yield Collapsible(summary=summary, lines=tuple(folded))


def _reasons(tables: Sequence[PhaseTable]) -> Iterator[Line]:
    """The reason of each verdict; what is common to those of several metrics is said once, before them."""
    shared: dict[str, list[str]] = {}
    lines = []
    for table in tables:
        found: list[tuple[str, Comparison | None]] = [("A/A control", table.control)]
        found += [(row.name, row.ratio) for row in table.rows]
        about = title_of_ratio(table.metric)
        for name, one in found:
            if one is not None and one.verdict != "invalid":
                reason, basis = split_basis(one.reason)
                if basis:
                    shared.setdefault(basis, []).append(about)
                lines.append(say(f"{about}, {name}: ", Span(text=reason, tone="faint")))
        lines += [say(f"{about}, {row.name}: {row.remark}") for row in table.rows if row.remark]
    for basis, abouts in shared.items():
        yield say(f"{', '.join(dict.fromkeys(abouts))}: ", Span(text=basis, tone="faint"))
    yield from lines


PARTS_OF_TIME = {
    "steps": "timed steps", "requests": "requests", "open_ended": "requests to their end", "merged": "merged requests",
    "cold": "cold starts",
}  # fmt: skip


def describe_spending(spending: TimeBreakdown | None) -> Iterator[Block]:
    """A section on the time of a run that has said what it went to."""
    if spending is None:
        return
    of_limit = "" if spending.limit_s is None else f" of {format_duration(spending.limit_s)}"
    summary = f"{format_duration(spending.wall_s)}{of_limit}, {format_percent(spending.share)} of it measurement"
    yield Section(title="Time")
    yield Collapsible(summary=say(Span(text=summary, tone="faint")), lines=tuple(_spent(spending, of_limit)))


def _spent(spending: TimeBreakdown, of_limit: str) -> Iterator[Line]:
    parts = [
        f"{PARTS_OF_TIME[kind]} {format_duration(took)}"
        for kind, took in spending.measured_s.items()
        if kind in PARTS_OF_TIME
    ]
    measured = f": {', '.join(parts)}" if parts else ""
    wall = format_duration(spending.wall_s)
    yield say(f"{format_percent(spending.share)} of {wall}{of_limit} was measurement{measured}")
    if spending.turns:
        yield say(f"timed turns of each trial, by replicate: {', '.join(map(str, spending.turns))}")
