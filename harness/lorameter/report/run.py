"""The report of a run: validity and verdicts, how it was measured, a table for each phase, failures and notices.

What all variants have in common is said once; the statistics behind the verdicts are below the tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from lorameter.records.metrics import METRICS, PHASE_TITLES
from lorameter.records.record import Interleaving
from lorameter.records.time_breakdown import TimeBreakdown
from lorameter.records.units import first_few, format_duration, format_percent
from lorameter.report.blocks import (
    Block,
    Collapsible,
    Document,
    Line,
    Section,
    Span,
    collapse_constant_columns,
    list_sections,
    say,
    say_each,
    say_invalid,
    tone_of,
)
from lorameter.report.facts import facts_of
from lorameter.report.figures import describe_charts
from lorameter.report.notices import describe_notices
from lorameter.report.phrases import (
    format_effect,
    say_inconclusive,
    say_ratio,
    split_basis,
    title_of,
    title_of_ratio,
)
from lorameter.report.run_view import ALL_ACTIVE, PEAK, PhaseTable, RunView
from lorameter.stats import Comparison
from lorameter.verdicts.compare import MARGIN
from lorameter.verdicts.comparison_input import is_memory
from lorameter.verdicts.series import is_difference

_PAIRED: dict[Interleaving, str] = {
    "shared-base": "the median of paired turns",
    "lockstep": "the median of paired turns",
    "replicates": "of the trials' medians, paired by replicate",
    "separate": "of medians, not paired",
}
_LABELS = {"train": "training", "generate": "generation", "cold": "cold start"}
MOST_NAMED = 5
"""Variants that are named of one kind; the table has them all."""
PARTS_OF_TIME = {
    "steps": "timed steps", "requests": "requests", "open_ended": "requests to their end", "merged": "merged requests",
    "cold": "cold starts",
}  # fmt: skip


def describe_run(view: RunView) -> Document:
    """All of a run's report."""
    return tuple(_blocks(view))


def _blocks(view: RunView) -> Iterator[Block]:
    run, study = view.run, view.study
    yield from say_invalid(view.validity.invalid)
    yield Section(title=study.title, lines=(*_summary(view), *facts_of(run, study)), blank_line_before=False)
    for table in view.tables:
        notes = tuple(_notes(table, alone=view.alone))
        yield collapse_constant_columns(dataclasses.replace(table.table, notes=notes))
        if table.phase in view.phases:
            yield from describe_charts(view, table)
    yield from list_sections({"Differs from the study as written": study.deviations, "Notes": study.notes})
    if view.validity.failures:
        yield Section(title="Trials without a result", lines=say_each(view.validity.failures), tone="bad")
    yield from describe_notices(view.notices)
    yield from _statistics(view)
    yield from _time(run.manifest.spending)
    counted = ", ".join(f"{count} {status}" for status, count in view.counts.items()) or "none yet"
    yield say(f"Trials: {counted}. Run {run.manifest.run} in {run.path}", indented=False, blank_line_before=True)
    if run.state != "complete":
        rest = f" ({run.state}): the report shows the trials that have ended."
        yield say(Span(text="This run is not complete", tone="alarm"), rest, indented=False)


def _summary(view: RunView) -> Iterator[Line]:
    """What a reader with one minute needs: whether the run is valid, the verdicts on time, memory and loss, and whether
    the required paths were active. A terminal repeats it below the report."""
    lines = [line for table in (*view.tables, *view.outcomes) for line in _verdicts(table)]
    if view.valid:
        lines = [_validity(view), *lines, *_paths(view)]
    yield from (dataclasses.replace(line, last=view.valid) for line in lines)


def _validity(view: RunView) -> Line:
    total = sum(view.counts.values())
    trials = ", ".join(f"{count} of {total} trials {status}" for status, count in view.counts.items())
    controls = [f"{_label(table)} {table.control.verdict}" for table in view.tables if table.control is not None]
    return say(f"yes: {trials}{'; A/A control: ' if controls else ''}{', '.join(controls)}", label="valid")


def _verdicts(table: PhaseTable) -> Iterator[Line]:
    """The verdicts of a table in a line: which variants differ and by how much, which are equivalent, and which are
    inconclusive or invalid."""
    differing = [(name, ratio) for name, ratio in table.ratios.items() if is_difference(ratio)]
    if len(differing) > MOST_NAMED:
        differing.sort(key=lambda one: -abs(math.log(one[1].ratio or 1.0)))
    spans: list[Span] = []
    for name, ratio in differing[:MOST_NAMED]:
        effect, interval = format_effect(ratio, table.metric)
        spans += [Span(text=", " if spans else ""), Span(text=name, tone="strong")]
        spans.append(Span(text=f" {effect}", tone=tone_of(ratio.verdict)))
        spans += [Span(text=interval, tone="faint")] if interval else []
    if len(differing) > MOST_NAMED:
        spans.append(Span(text=f" and {len(differing) - MOST_NAMED} more"))
    for verdict in ("equivalent", "inconclusive", "invalid"):
        if names := [name for name, ratio in table.ratios.items() if ratio.verdict == verdict]:
            spans += [Span(text="; " if spans else ""), Span(text=f"{verdict}: ", tone=tone_of(verdict))]
            spans.append(Span(text=first_few(names, MOST_NAMED)))
    if spans:
        yield say(*spans, label=_label(table))


def _paths(view: RunView) -> Iterator[Line]:
    """Whether the required paths were active, of a run that has checks."""
    found = [(name, text) for table in view.tables for name, text in table.checks.items()]
    missed = dict.fromkeys(f"{name}: {text}" for name, text in found if text != ALL_ACTIVE)
    if missed:
        yield say(Span(text=first_few(list(missed), MOST_NAMED, "; "), tone="bad"), label="checks")
    elif found:
        yield say("all required paths active", label="checks")


def _label(table: PhaseTable) -> str:
    """What a table is about, in the summary."""
    if is_memory(table.metric):
        return "memory"
    if METRICS[table.metric].is_loss:
        return "loss"
    whole = table.table.title == PHASE_TITLES[table.phase]
    return table.site or (_LABELS[table.phase] if whole else title_of(table.metric))


def _notes(table: PhaseTable, *, alone: bool) -> Iterator[Line]:
    """The control, and a line of each variant whose required paths are not as those of the others."""
    if not alone:
        said, verdict = say_ratio(table.control, table.metric, 0.01 if is_memory(table.metric) else MARGIN)
        yield say(f"A/A control: {said}", *([Span(text=verdict, tone="strong")] if verdict else []))
    if len(set(table.checks.values())) > 1:
        for name, text in table.checks.items():
            if text != ALL_ACTIVE:
                yield say(f"required paths of {name}: ", Span(text=text, tone="bad"))


def _statistics(view: RunView) -> Iterator[Block]:
    """What an inconclusive verdict needs and how the numbers follow from the trials; folded: what each verdict rests
    on."""
    tables = () if view.alone else (*view.tables, *view.outcomes)
    needs = [line for table in tables for line in _inconclusive(table)]
    lines = [*needs[:MOST_NAMED], *_estimators(tables)]
    folded = [*needs[MOST_NAMED:], *_reasons(tables)]
    if lines:
        yield Section(title="Statistics", lines=tuple(lines))
    if folded:
        yield Collapsible(summary=say(Span(text="what each verdict rests on", tone="faint")), lines=tuple(folded))


def _inconclusive(table: PhaseTable) -> Iterator[Line]:
    """What to do about each inconclusive variant; of an inconclusive control a notice says it."""
    for name, ratio in table.ratios.items():
        if ratio.verdict == "inconclusive":
            about = Span(text=f"{name}, {title_of_ratio(table.metric)}", tone="warning")
            advice = say_inconclusive(ratio, table.metric, table.interleaving or "replicates")
            yield say(about, f": {advice}", label="inconclusive")


def _estimators(tables: Sequence[PhaseTable]) -> Iterator[Line]:
    """Which number is what: a ratio is of pairs, an estimate of one variant alone."""
    pairs: dict[str, list[str]] = {}
    for table in tables:
        if not is_memory(table.metric):
            pairs.setdefault(_PAIRED[table.interleaving or "replicates"], []).append(title_of_ratio(table.metric))
    if pairs:
        first, *others = pairs
        said = [first, *(f"of {', '.join(pairs[one])} {one}" for one in others)]
        yield say(f"{'; '.join(said)}; above 1 is worse; its interval is corrected for all variants", label="ratio")
    keys = {head.key: None for table in tables for head in table.table.heads}
    shown = [METRICS[key] for key in keys if key in METRICS]
    means = [one.title for one in shown if one.phase != "cold" and one.of_trial != "median"]
    if shown:
        of_means = f" ({', '.join(means)}: of its mean)" if means else ""
        estimates = f"geometric mean over trials of each trial's median{of_means}, with 95 % intervals"
        cold = "; cold starts: median of the processes" if any(one.phase == "cold" for one in shown) else ""
        yield say(estimates + cold, label="estimates")
    if PEAK in keys or any(is_memory(key) for key in keys):
        notes = dict.fromkeys(table.note for table in tables if table.note)
        yield say("; ".join(["the largest of the trials, with the least and the largest", *notes]), label="memory")


def _reasons(tables: Sequence[PhaseTable]) -> Iterator[Line]:
    """The reason of each verdict; what is common to those of several metrics is said once, before them."""
    shared: dict[str, list[str]] = {}
    lines = []
    for table in tables:
        about = title_of_ratio(table.metric)
        found: dict[str, Comparison | None] = {"A/A control": table.control, **table.ratios}
        for name, one in found.items():
            if one is not None and one.verdict != "invalid":
                reason, basis = split_basis(one.reason)
                shared.setdefault(basis, []).append(about)
                lines.append(say(f"{about}, {name}: ", Span(text=reason, tone="faint")))
    for basis, abouts in shared.items():
        if basis:
            yield say(f"{', '.join(dict.fromkeys(abouts))}: ", Span(text=basis, tone="faint"))
    yield from lines


def _time(spending: TimeBreakdown | None) -> Iterator[Block]:
    """What the time of a run went to; nothing of a run that has not said it."""
    if spending is None:
        return
    wall = format_duration(spending.wall_s)
    of_limit = "" if spending.limit_s is None else f" of {format_duration(spending.limit_s)}"
    share = format_percent(spending.share)
    parts = [f"{PARTS_OF_TIME[kind]} {format_duration(took)}"
             for kind, took in spending.measured_s.items() if kind in PARTS_OF_TIME]  # fmt: skip
    lines = [f"{share} of {wall}{of_limit} was measurement{': ' if parts else ''}{', '.join(parts)}"]
    if spending.turns:
        lines.append(f"timed turns of each trial, by replicate: {', '.join(map(str, spending.turns))}")
    summary = Span(text=f"{wall}{of_limit}, {share} of it measurement", tone="faint")
    yield Section(title="Time")
    yield Collapsible(summary=say(summary), lines=say_each(lines))
