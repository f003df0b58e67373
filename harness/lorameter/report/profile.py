"""A profile: where a step's or a request's time went, what ran, memory, ceilings, what to try, what that gained."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorameter.profile.accounting import (
    IDLE,
    REMAINDER_LIMIT,
    Ceilings,
    StepAccount,
    TimeSpan,
    TokenShares,
    categories_s,
    plain_s,
)
from lorameter.profile.facts import Profile, TrialProfile
from lorameter.profile.remedy import Tried
from lorameter.profile.rules import OF_WHAT_RAN, RULES, Finding
from lorameter.records.memory_account import in_order, title_of
from lorameter.records.metrics import METRICS
from lorameter.records.units import format_bytes, format_count, format_interval, format_ratio, format_value
from lorameter.report.blocks import (
    Cell,
    ColumnHeader,
    Document,
    Line,
    Section,
    Span,
    Table,
    name_columns,
    say,
    say_each,
    say_invalid,
    value_cell,
    write_bytes,
    write_ratio,
    write_row,
    write_seconds,
    write_share,
)
from lorameter.report.notices import describe_notices
from lorameter.report.phrases import verdict_cell
from lorameter.verdicts.compare import MARGIN
from lorameter.verdicts.series import is_difference
from lorameter.verdicts.validity import disturbance_notices


def describe_profile(
    profile: Profile,
    step: StepAccount,
    tokens: TokenShares,
    found: Ceilings | str,
    findings: Sequence[Finding],
) -> Document:
    """All of it."""
    where = f"{profile.device_name} ({profile.device}, {format_count(profile.threads, 'thread')})"
    said = disturbance_notices([profile.record], on_cpu=profile.device == "cpu")
    return (
        say(Span(text=profile.variant.name, tone="strong"), f" of {profile.study} on {where}", indented=False),
        tabulate_phases(profile, step),
        tabulate_categories(profile, step),
        _memory(profile),
        Section(title="Tokens of a step", lines=say_each([_tokens(tokens)])),
        Section(title="Ceilings", lines=say_each(_ceilings(found, profile))),
        tabulate_findings(findings, _others(profile, findings)),
        *describe_notices((*profile.record.notices, *said)),
    )


def _memory(profile: Profile) -> Table:
    """Kinds of a step, each next to its estimate from the shape alone; what no kind explains is a line of
    its own."""
    one, guess = profile.memory, profile.estimates
    rows = [
        write_row(title_of(kind), _bytes(one.kinds.get(kind)), _guess(guess.get(kind)))
        for kind in in_order(dict.fromkeys((*one.kinds, *guess), 1))
    ]
    rows.append(write_row("unexplained", f"{format_bytes(one.unexplained_bytes)} ({one.share:.1%})", ""))
    expected = _expected(sum(guess.values()), one.peak_bytes)
    rows.append(write_row("peak, as measured", _bytes(one.peak_bytes), expected, strong=True))
    rows += [
        write_row(f"{kind.replace('_', ' ')}, outside of it", _bytes(size), "") for kind, size in one.beside.items()
    ]
    return Table(
        title=f"Memory of the {'device' if profile.device == 'cuda' else 'process'} at its peak",
        heads=name_columns("kind", "a step", "estimated"),
        rows=tuple(rows),
        blank_line_before=True,
    )


def _bytes(size: int | None) -> Cell:
    return Cell(text="–") if size is None else write_bytes(size)


def _guess(size: int | None) -> Cell:
    """As a size, but fainter than measured values."""
    return Cell(detail="–") if size is None else Cell(detail=format_bytes(size), value=size, unit="byte")


def _expected(estimate: int, measured: int) -> Cell:
    """An estimate with its error; nothing where there is none."""
    said = f"{format_bytes(estimate)} ({estimate / measured - 1:+.1%})"
    return Cell(detail=said, value=estimate, unit="byte") if estimate else _guess(None)


def _tokens(tokens: TokenShares) -> str:
    parts = (("real", tokens.real), ("padded", tokens.padded), ("recomputed", tokens.recomputed))
    return ", ".join(f"{count:.0f} {name} ({count / tokens.total:.1%})" for name, count in parts)


def _ceilings(found: Ceilings | str, profile: Profile) -> Iterator[str]:
    if isinstance(found, str):
        yield f"none: {found}"
        return
    yield str(found.train.mfu)
    yield str(found.train.hfu)
    yield f"by the formula for full training, for comparison only: {found.train.six_n}"
    for name, peak in profile.measured_peaks.items():
        if peak != profile.peaks.get(name):
            yield f"what this device reached when it was asked: {peak}"


def _others(profile: Profile, findings: Sequence[Finding]) -> Iterator[str]:
    """What else was looked for, and what could not be."""
    yield from say_unfound(RULES, findings, OF_WHAT_RAN if profile.activity.missing else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Words for what is profiled, and its phases."""

    what: str
    titles: Mapping[str, str]
    aside: str
    """What goes on between two of them."""


OF_STEPS = Words(
    what="step",
    titles={
        "data": "data: taking the batch",
        "forward": "forward",
        "backward": "backward",
        "update": "clipping and optimizer",
    },
    aside="the loss read and the times kept",
)
OF_REQUESTS = Words(
    what="request",
    titles={
        "prepare": "before the first forward pass",
        "prefill": "prefill: the pass over the prompt",
        "decode": "decode: passes over one token",
        "choose": "between passes and after the last",
    },
    aside="its times kept",
)
TOP = 8
"""Operators that are shown by name."""
NAME_WIDTH = 80


def tabulate_phases(profile: TrialProfile, step: StepAccount, words: Words = OF_STEPS, *, suffix: str = "") -> Table:
    """A row a phase, the remainder that no phase explains, and the step; below it what the times rest on. `suffix` is
    added to the title."""
    waits = "device waits" if profile.device == "cuda" else "between operators"
    known = not profile.activity.missing
    calls = "launches" if profile.device == "cuda" else "operators"
    idling = categories_s(profile, step).get(IDLE, {})
    rows = []
    for phase in profile.activity.phases:
        span = step.phases[phase.phase]
        rows.append(
            write_row(
                words.titles[phase.phase],
                _time(span),
                write_share(span.value / step.step.value),
                Cell(text=f"{idling[phase.phase] / span.value:.0%}" if known else "–"),
                _count(phase.calls if known else None),
            )
        )
    rest = step.remainder
    rows.append(write_row("remainder", _time(rest), _shares(rest, step.step.value), "", ""))
    total = _count(profile.activity.calls if known else None)
    rows.append(write_row(words.what, _time(step.step), "100 %", "", total, strong=True))
    return Table(
        title=f"Where a {words.what}'s time goes{suffix}",
        heads=name_columns("phase", "time", f"of the {words.what}", waits, calls),
        rows=tuple(rows),
        notes=say_each(_step_lines(step, words)),
    )


def _time(span: TimeSpan) -> Cell:
    return value_cell(span.value, span.low, span.high, "s")


def _count(calls: float | None) -> Cell:
    return Cell(text="–") if calls is None else Cell(text=f"{calls:.0f}", value=calls, unit="1")


def _shares(span: TimeSpan, whole: float) -> Cell:
    """A part of a whole in percent, with its interval where it has one."""
    share = write_share(span.value / whole)
    if span.low is None or span.high is None:
        return share
    low, high = span.low / whole, span.high / whole
    return dataclasses.replace(share, interval=f"[{low:.1%}, {high:.1%}]", low=low, high=high)


def _step_lines(step: StepAccount, words: Words) -> Iterator[str]:
    borders, between = step.borders, step.between
    quiet = "undisturbed" if step.counted < step.pairs else "all"
    what = words.what
    yield f"{step.pairs} plain {what}s, in turns with as many whose phases were timed; {step.counted} count ({quiet})"
    yield "intervals are those of this process; between processes times differ more"
    yield (
        f"borders between phases cost {format_interval(borders.value, borders.low, borders.high, 's')} a {what}; in "
        f"such a {what} the phases cover {_shares(step.covered, 1.0).line} of it"
    )
    yield f"between {what}s, {words.aside}: {format_interval(between.value, between.low, between.high, 's')}"
    if step.occupancy is not None:
        yield f"occupancy {step.occupancy:.0%}: CPU time over wall time of all these {what}s"
    limit = f"{REMAINDER_LIMIT:.0%} of the {what}"
    if step.explained is None:
        yield f"whether the remainder is at most {limit} is inconclusive: measure again on a quieter machine"
    elif not step.explained:
        yield f"the phases do not explain the {what}: the remainder is more than {limit}"


def tabulate_categories(
    profile: TrialProfile, step: StepAccount, words: Words = OF_STEPS, *, suffix: str = ""
) -> Table:
    """A row for each kind of work, by phase; below it the dearest operators by name."""
    what = "kernels" if profile.device == "cuda" else "operators, each without those that it calls"
    rows = []
    for category, by_phase in categories_s(profile, step).items():
        seconds = sum(by_phase.values())
        times = (write_seconds(by_phase[phase]) if by_phase[phase] else "–" for phase in step.phases)
        rows.append(write_row(category, write_share(seconds / step.step.value), write_seconds(seconds), *times))
    return Table(
        title=f"What ran{suffix}: {what}",
        heads=name_columns("category", f"of the {words.what}", "time", *step.phases),
        rows=tuple(rows),
        notes=say_each(_operators(profile, step, words)),
        blank_line_before=True,
    )


def _operators(profile: TrialProfile, step: StepAccount, words: Words) -> Iterator[str]:
    steps, slow = len(profile.activity.step_times_s), profile.activity.window_s
    slower = step.profiler_slowdown
    seen = (
        f"seen in {format_count(steps, words.what)} under the profiler, each {format_value(slow, 's')} "
        f"(× {format_ratio(slower.value, slower.low, slower.high)})"
    )
    if profile.activity.missing:
        yield f"not available: {profile.activity.missing}"
        return
    if profile.activity.device == "cuda":
        yield f"{seen}, which slows down the host and no kernel"
    else:
        yield f"{seen}; times are shares of a phase there, of the phase above"
    uses = [
        (plain_s(profile, step, phase, use.time_s), use, phase.phase)
        for phase in profile.activity.phases
        for use in phase.operators
    ]
    for seconds, use, phase_name in sorted(uses, key=lambda found: -found[0])[:TOP]:
        name = use.name if len(use.name) <= NAME_WIDTH else f"{use.name[: NAME_WIDTH - 1]}…"
        share = seconds / step.step.value
        yield f"{share:6.1%}  {use.calls:6.0f} calls  {phase_name:8}  {use.category:11}  {name}"


def tabulate_findings(findings: Sequence[Finding], notes: Iterable[str]) -> Table:
    """A row a finding; `notes` stand below."""
    rows = [write_row(one.code, one.message, _cost(one), _what_to_try(one)) for one in findings]
    seen, cost = ColumnHeader(text="seen"), ColumnHeader(text="cost", right=True)
    return Table(
        title="Findings, and what was seen to hang on each",
        heads=(ColumnHeader(text="finding"), seen, cost, ColumnHeader(text="what to try")),
        rows=tuple(rows or [write_row("none", "", "", "")]),
        notes=say_each(notes),
        blank_line_before=True,
    )


def say_unfound(codes: Iterable[str], findings: Sequence[Finding], not_observable: Collection[str]) -> Iterator[str]:
    """What else was looked for, and what could not be: those of `not_observable`."""
    rest = [code for code in codes if code not in {finding.code for finding in findings}]
    unseen = [code for code in rest if code in not_observable]
    yield f"looked for and not found: {', '.join(code for code in rest if code not in unseen)}"
    if unseen:
        yield f"not judged, since it is not known what ran: {', '.join(unseen)}"


def _cost(finding: Finding) -> Cell:
    if finding.cost_s is None or finding.cost_share is None:
        return write_bytes(finding.cost_bytes or 0)
    of = "" if finding.metric == "step_time_s" else f" of {METRICS[finding.metric].title}"
    said = f"{format_value(finding.cost_s, 's')}\n{finding.cost_share:.1%}{of}"
    held = "" if finding.cost_bytes is None else f"\n{format_bytes(finding.cost_bytes)}"
    return Cell(text=said + held, value=finding.cost_s, unit="s")


def _what_to_try(finding: Finding) -> Cell:
    if not finding.suggestion:
        return Cell(text=finding.remedy, detail=f"Cannot be tried here: {finding.obstacle}.")
    return Cell(text=finding.remedy, command=f"--try {finding.code}")


def describe_tried(tried: Tried) -> Document:
    """The verdict on the remedy, what it gained, and what casts doubt on it."""
    changes = ", ".join(f"{key} = {value}" for key, value in tried.finding.suggestion.items())
    section = Section(
        title=f"Tried: {tried.finding.code}",
        subtitle=f" by {changes} ({tried.interleaving})",
        lines=tuple(_tried_lines(tried)),
    )
    return section, *describe_notices(tried.notices)


def _tried_lines(tried: Tried) -> Iterator[Line]:
    finding, comparison, control = tried.finding, tried.comparison, tried.control
    title = METRICS[tried.metric].title
    yield from say_invalid(_invalid(tried))
    if comparison is not None:
        ratio = f"{title} with the remedy over without: {write_ratio(comparison).line} "
        found = verdict_cell(comparison, tried.metric, MARGIN, "variants")
        yield say(ratio, Span(text=found.said or found.verdict if tried.valid else "invalid", tone="strong"))
        yield say(Span(text=comparison.reason, tone="faint"))
    if finding.cost_share is not None and comparison is not None and comparison.ratio is not None:
        of = "a step" if tried.metric == "step_time_s" else f"the {title}"
        part = "a step" if finding.metric == "step_time_s" else f"the {METRICS[finding.metric].title}"
        seen = f"the diagnosis had seen {finding.cost_share:.1%} of {part} hang on it"
        yield say(f"gained {_gain(comparison.ratio, comparison.low, comparison.high)} of {of}; {seen}")
    if control is not None:
        cell = verdict_cell(control, tried.metric, MARGIN, "variants")
        said = f"{write_ratio(control).line} {cell.said or cell.verdict}"
        yield say(f"control (the present variant measured twice): {said}")
    for failure in tried.failures:
        yield say(Span(text=failure, tone="bad"))
    yield say(f"run {tried.run}")


def _invalid(tried: Tried) -> str | None:
    """Why the comparison does not count; None where it does."""
    if tried.valid:
        return None
    if tried.failures:
        return tried.failures[0]
    if tried.control is not None and is_difference(tried.control):
        return "the control differs from itself"
    return f"see `lorameter report {tried.run}`"


def _gain(ratio: float, low: float | None, high: float | None) -> str:
    """What a ratio of times leaves of the time, in per cent; the interval's ends change places."""
    ends = [None if end is None else 100 * (1 - end) for end in (high, low)]
    return f"{format_interval(100 * (1 - ratio), ends[0], ends[1], '1')} %"
