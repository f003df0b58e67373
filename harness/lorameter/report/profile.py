"""Describes a profile of steps or requests: time, operators, memory, ceilings, findings and a tried remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from lorameter.measurements.metrics import METRICS
from lorameter.profile.accounting import (
    IDLE,
    REMAINDER_LIMIT,
    SERVED,
    STEPS,
    Ceilings,
    RequestAccount,
    SampleNames,
    StepAccount,
    TokenShares,
    categories_s,
    plain_s,
)
from lorameter.profile.facts import COLD_PARTS, Profile, RequestProfile, TrialProfile
from lorameter.profile.remedy import RemedyResult
from lorameter.profile.rules import OPERATOR_RULES, REQUEST_RULES, RULES, Finding
from lorameter.records.record import memory_kind_title, order_memory_kinds
from lorameter.records.units import format_bytes, format_count, format_interval, format_ratio, format_value
from lorameter.report.blocks import (
    Cell,
    ColumnHeader,
    Document,
    Line,
    Section,
    Span,
    Table,
    collapse_constant_columns,
    make_invalid_lines,
    name_columns,
    to_line,
    to_lines,
    value_cell,
    write_number,
    write_row,
    write_value,
)
from lorameter.report.phrases import describe_notices, format_verdict
from lorameter.stats import Estimate
from lorameter.verdicts.validity import disturbance_notices

TOP = 8
"""Number of operators that are shown by name."""
NAME_WIDTH = 80


def describe_profile(
    profile: Profile,
    step: StepAccount,
    tokens: TokenShares,
    ceilings: Ceilings | str,
    findings: Sequence[Finding],
) -> Document:
    """The report of a profile of steps."""
    positions = {"real": tokens.real, "padded": tokens.padded, "recomputed": tokens.recomputed}
    shares = (f"{count:.0f} {name} ({count / tokens.total:.1%})" for name, count in positions.items())
    return (
        _heading(profile),
        _tabulate_phases(profile, step),
        _tabulate_categories(profile, step),
        _tabulate_memory(profile, "its peak", profile.estimates),
        Section(title="Tokens of a step", lines=(to_line(", ".join(shares)),)),
        Section(title="Ceilings", lines=to_lines(_ceilings(ceilings, profile))),
        _tabulate_findings(profile, findings, RULES),
        *_notices(profile),
    )


def _heading(profile: TrialProfile, more: str = "") -> Line:
    """The variant, study and device of a profile."""
    where = f"{profile.device_name} ({profile.device}, {format_count(profile.threads, 'thread')})"
    return to_line(
        Span(text=profile.variant.name, tone="strong"), f" of {profile.study} on {where}{more}", indented=False
    )


def _notices(profile: TrialProfile) -> Document:
    """Notices of the trial, and its disturbances."""
    disturbances = disturbance_notices([profile.record], on_cpu=profile.device == "cpu")
    return describe_notices((*profile.record.notices, *disturbances))


def _tabulate_memory(
    profile: Profile | RequestProfile, at: str, estimates: Mapping[str, int], notes: tuple[Line, ...] = ()
) -> Table:
    """Kinds of memory, the unexplained remainder, the peak, and memory outside of it; with the estimates from the
    shape, if there are any."""
    account, total, missing = profile.memory, sum(estimates.values()), "–" if estimates else ""
    sizes = {kind: max(account.kinds.get(kind, 0), estimates.get(kind, 0)) for kind in (*account.kinds, *estimates)}
    rest = f"{format_bytes(account.unexplained_bytes)} ({account.share:.1%})"
    error = f" ({total / account.peak_bytes - 1:+.1%})"
    rows = (
        *(
            write_row(
                memory_kind_title(kind),
                write_value(account.kinds[kind], "byte") if kind in account.kinds else "–",
                _write_estimate(estimates[kind]) if kind in estimates else missing,
            )
            for kind in order_memory_kinds(sizes)
        ),
        write_row("unexplained", Cell(text=rest, value=account.unexplained_bytes), ""),
        write_row(
            "peak, as measured",
            write_value(account.peak_bytes, "byte"),
            _write_estimate(total, error) if total else missing,
            strong=True,
        ),
        *(
            write_row(f"{kind.replace('_', ' ')}, outside of it", write_value(size, "byte"), "")
            for kind, size in account.outside_allocator.items()
        ),
    )
    table = Table(
        title=f"Memory of the {'device' if profile.device == 'cuda' else 'process'} at {at}",
        heads=(*name_columns("kind", "bytes"), ColumnHeader(text="estimated", right=True, collapse_if_constant=True)),
        rows=rows,
        notes=notes,
    )
    return collapse_constant_columns(table)


def _write_estimate(size: int, error: str = "") -> Cell:
    """An estimated size, in a fainter tone than measured ones."""
    return Cell(detail=f"{format_bytes(size)}{error}", value=size)


def _ceilings(ceilings: Ceilings | str, profile: Profile) -> Iterator[str]:
    if isinstance(ceilings, str):
        yield f"none: {ceilings}"
        return
    yield str(ceilings.train.mfu)
    yield str(ceilings.train.hfu)
    yield f"by the formula for full training, for comparison only: {ceilings.train.six_n}"
    for name, peak in profile.measured_peaks.items():
        if peak != profile.peaks.get(name):
            yield f"measured on this device: {peak}"


def _tabulate_phases(
    profile: TrialProfile, step: StepAccount, names: SampleNames = STEPS, *, suffix: str = ""
) -> Table:
    """A row for each phase, the unexplained remainder, and the step; notes about the pairs are below it. `suffix` is
    added to the title."""
    waits = "device waits" if profile.device == "cuda" else "between operators"
    known = not profile.activity.missing
    calls = "launches" if profile.device == "cuda" else "operators"
    idling = categories_s(profile, step).get(IDLE, {})
    rows = (
        write_row(
            names.phases[phase.phase],
            _time(span),
            write_number(span.value / step.step.value, ".1%"),
            write_number(idling[phase.phase] / span.value if known else None, ".0%"),
            write_number(phase.calls if known else None, ".0f"),
        )
        for phase, span in ((phase, step.phases[phase.phase]) for phase in profile.activity.phases)
    )
    remainder = write_row("remainder", _time(step.remainder), _shares(step.remainder, step.step.value), "", "")
    total = write_number(profile.activity.calls if known else None, ".0f")
    return Table(
        title=f"Where a {names.unit}'s time goes{suffix}",
        heads=name_columns("phase", "time", f"of the {names.unit}", waits, calls),
        rows=(*rows, remainder, write_row(names.unit, _time(step.step), "100 %", "", total, strong=True)),
        notes=to_lines(_step_lines(step, names)),
    )


def _time(span: Estimate) -> Cell:
    return value_cell(span.value, span.low, span.high, "s")


def _shares(span: Estimate, whole: float) -> Cell:
    """A part of a whole in percent, with its interval if it has one."""
    share = write_number(span.value / whole, ".1%")
    if span.low is None or span.high is None:
        return share
    low, high = span.low / whole, span.high / whole
    return dataclasses.replace(share, interval=f"[{low:.1%}, {high:.1%}]", low=low, high=high)


def _step_lines(step: StepAccount, names: SampleNames) -> Iterator[str]:
    borders, between = step.borders, step.between
    quiet = "undisturbed" if step.counted < step.pairs else "all"
    what = names.unit
    yield f"{step.pairs} pairs of a plain {what} and one whose phases were timed; {step.counted} count ({quiet})"
    yield "intervals are those of this process; between processes times differ more"
    yield (
        f"borders between phases cost {format_interval(borders.value, borders.low, borders.high, 's')} a {what}; in "
        f"such a {what} the phases cover {_shares(step.covered, 1.0).line} of it"
    )
    yield f"between {what}s, {names.between}: {format_interval(between.value, between.low, between.high, 's')}"
    if step.occupancy is not None:
        yield f"occupancy {step.occupancy:.0%}: CPU time over wall time of all these {what}s"
    limit = f"{REMAINDER_LIMIT:.0%} of the {what}"
    if step.explained is None:
        yield f"whether the remainder is at most {limit} is inconclusive: measure again on a quieter machine"
    elif not step.explained:
        yield f"the phases do not explain the {what}: the remainder is more than {limit}"


def _tabulate_categories(
    profile: TrialProfile, step: StepAccount, names: SampleNames = STEPS, *, suffix: str = ""
) -> Table:
    """A row for each kind of work, by phase; the most expensive operators are below it."""
    what = "kernels" if profile.device == "cuda" else "operators, each without those that it calls"
    rows = (
        write_row(
            category,
            write_number(sum(by_phase.values()) / step.step.value, ".1%"),
            write_value(sum(by_phase.values()), "s"),
            *(write_value(by_phase[phase], "s") if by_phase[phase] else "–" for phase in step.phases),
        )
        for category, by_phase in categories_s(profile, step).items()
    )
    return Table(
        title=f"What ran{suffix}: {what}",
        heads=name_columns("category", f"of the {names.unit}", "time", *step.phases),
        rows=tuple(rows),
        notes=to_lines(_operators(profile, step, names)),
    )


def _operators(profile: TrialProfile, step: StepAccount, names: SampleNames) -> Iterator[str]:
    steps, slow = len(profile.activity.step_times_s), profile.activity.window_s
    slower = step.profiler_slowdown
    source = (
        f"seen in {format_count(steps, names.unit)} under the profiler, each {format_value(slow, 's')} "
        f"(× {format_ratio(slower.value, slower.low, slower.high)})"
    )
    if profile.activity.missing:
        yield f"not available: {profile.activity.missing}"
        return
    if profile.activity.device == "cuda":
        yield f"{source}, which slows down the host and no kernel"
    else:
        yield f"{source}; times are scaled to the unprofiled phases above"
    uses = [
        (plain_s(profile, step, phase, use.time_s), use, phase.phase)
        for phase in profile.activity.phases
        for use in phase.operators
    ]
    for seconds, use, phase_name in sorted(uses, key=lambda found: -found[0])[:TOP]:
        name = use.name if len(use.name) <= NAME_WIDTH else f"{use.name[: NAME_WIDTH - 1]}…"
        share = seconds / step.step.value
        yield f"{share:6.1%}  {use.calls:6.0f} calls  {phase_name:8}  {use.category:11}  {name}"


def _tabulate_findings(profile: TrialProfile, findings: Sequence[Finding], codes: Iterable[str]) -> Table:
    """A row for each finding; below it the codes without findings, and those that could not be judged."""
    rows = [write_row(one.code, one.message, _cost(one), _remedy_cell(one)) for one in findings]
    unknown = OPERATOR_RULES if profile.activity.missing else frozenset()
    absent = [code for code in codes if code not in {finding.code for finding in findings}]
    unjudged = ", ".join(code for code in absent if code in unknown)
    notes = [f"looked for and not found: {', '.join(code for code in absent if code not in unknown)}"]
    notes += [f"not judged, since the operators are unknown: {unjudged}"] if unjudged else []
    return Table(
        title="Findings, and what each costs",
        heads=(*name_columns("finding", "seen", "cost", left=2), ColumnHeader(text="what to try")),
        rows=tuple(rows or [write_row("none", "", "", "")]),
        notes=to_lines(notes),
    )


def _cost(finding: Finding) -> Cell:
    if finding.cost_s is None or finding.cost_share is None:
        return write_value(finding.cost_bytes or 0, "byte")
    of = "" if finding.metric == "step_time_s" else f" of {METRICS[finding.metric].title}"
    cost = f"{format_value(finding.cost_s, 's')}\n{finding.cost_share:.1%}{of}"
    memory = "" if finding.cost_bytes is None else f"\n{format_bytes(finding.cost_bytes)}"
    return Cell(text=cost + memory, value=finding.cost_s)


def _remedy_cell(finding: Finding) -> Cell:
    detail = "" if finding.suggestion else f"Cannot be tried here: {finding.obstacle}."
    return Cell(text=finding.remedy, detail=detail, command=f"--try {finding.code}" if finding.suggestion else "")


def describe_remedy(tried: RemedyResult) -> Document:
    """The verdict on a remedy, its gain, the control and the notices."""
    changes = ", ".join(f"{key} = {value}" for key, value in tried.finding.suggestion.items())
    section = Section(
        title=f"Tried: {tried.finding.code} by {changes} ({tried.interleaving})",
        lines=tuple(_remedy_lines(tried)),
    )
    return section, *describe_notices(tried.notices)


def _remedy_lines(tried: RemedyResult) -> Iterator[Line]:
    finding, comparison, title = tried.finding, tried.comparison, METRICS[tried.metric].title
    if not tried.valid:
        yield from make_invalid_lines(f"the comparison does not count, see `lorameter report {tried.run}`")
    if comparison is not None:
        counted = comparison if tried.valid else dataclasses.replace(comparison, verdict="invalid")
        yield to_line(f"{title} with the remedy over without: {format_verdict(counted, tried.metric)}")
        yield to_line(Span(text=comparison.reason, tone="faint"))
    if finding.cost_share is not None and comparison is not None and comparison.ratio is not None:
        of, part = ("a step" if name == "step_time_s" else f"the {METRICS[name].title}"
                    for name in (tried.metric, finding.metric))  # fmt: skip
        attributed = f"the profile attributed {finding.cost_share:.1%} of {part} to it"
        low, high = (None if end is None else 100 * (1 - end) for end in (comparison.high, comparison.low))
        gained = format_interval(100 * (1 - comparison.ratio), low, high, "1")
        yield to_line(f"gained {gained} % of {of}; {attributed}")
    if tried.control is not None:
        yield to_line(f"control (the present variant measured twice): {format_verdict(tried.control, tried.metric)}")
    yield from (to_line(Span(text=failure, tone="bad")) for failure in tried.failures)
    yield to_line(f"run {tried.run}")


def describe_requests(
    profile: RequestProfile,
    served: RequestAccount,
    merged: RequestAccount | None,
    findings: Sequence[Finding],
) -> Document:
    """The report of a profile of requests; `merged` is the account with the adapter merged, if it was measured."""
    workload = profile.workload
    prompts = f"{workload.request_batch} prompts of " if workload.request_batch > 1 else ""
    each = " each" if prompts else ""
    requests = f"; requests of {prompts}{workload.prompt_tokens} tokens{each}, answered by {workload.new_tokens}{each}"
    sides = [
        (side, account, suffix)
        for side, account, suffix in ((profile, served, ""), (profile.merged, merged, ", with the adapter merged"))
        if side is not None and account is not None
    ]
    return (
        _heading(profile, requests),
        *(_tabulate_phases(side, account.whole, SERVED, suffix=suffix) for side, account, suffix in sides),
        _passes(profile, [(account, suffix) for _, account, suffix in sides]),
        *(_tabulate_categories(side, account.whole, SERVED, suffix=suffix) for side, account, suffix in sides),
        _request_memory(profile),
        *([_cold(profile)] if profile.cold_parts_s else []),
        _tabulate_findings(profile, findings, REQUEST_RULES),
        *_notices(profile),
    )


def _passes(profile: RequestProfile, accounts: Sequence[tuple[RequestAccount, str]]) -> Table:
    rows = (
        write_row(
            f"{title}{suffix}",
            _time(one.time),
            write_number(one.calls, ".0f"),
            write_number(float(one.flops), ".4g"),
            write_number(None if one.mfu is None else one.mfu.value, ".1%"),
            write_value(one.bytes, "byte"),
            write_number(None if one.mbu is None else one.mbu.value, ".1%"),
        )
        for account, suffix in accounts
        for title, one in (("prefill", account.prefill), ("a token of decode", account.decode))
    )
    calls = "launches" if profile.device == "cuda" else "operators"
    return Table(
        title="Forward passes and their share of the peak",
        heads=name_columns("pass", "time", calls, "FLOPs", "MFU", "bytes", "MBU"),
        rows=tuple(rows),
        notes=to_lines(_pass_lines(profile, accounts)),
    )


def _pass_lines(profile: RequestProfile, accounts: Sequence[tuple[RequestAccount, str]]) -> Iterator[str]:
    for account, suffix in accounts:
        first, later = _time(account.first_token).line, _time(account.token).line
        yield f"time to first token {first}, per later token {later}{suffix}"
    served = accounts[0][0]
    for one in (served.prefill.mfu, served.decode.mbu):
        if one is not None:
            yield str(one)
    for name, shares in (("product", (served.prefill.mfu, served.decode.mfu)),
                         ("memory", (served.prefill.mbu, served.decode.mbu))):  # fmt: skip
        if name not in profile.peaks:
            yield f"no peak of this device is stated or measured for: {name}"
        elif None in shares:
            yield f"a pass is faster than the peak {profile.peaks[name]}, so that is no peak, and it has no share of it"


def _request_memory(profile: RequestProfile) -> Table:
    memory, facts = profile.record.memory, profile.facts
    first = memory.get("device_peak_allocated_first_token_bytes", memory.get("host_peak_first_token_bytes"))
    lines = [] if first is None else [f"up to the first token, in a separate request: {format_bytes(first)}"]
    moved = f"is reallocated at {facts.cache_moved:.0%} of the tokens" if facts.cache_moved else "is never reallocated"
    size = format_bytes(facts.cache_bytes)
    lines.append(f"cache: {facts.cache}, {size} at the end of a request; it {moved}" if facts.cache else "cache: none")
    return _tabulate_memory(profile, "the peak of a request", {}, to_lines(lines))


def _cold(profile: RequestProfile) -> Table:
    parts, total = profile.cold_parts_s, profile.record.values["cold_start_time_s"]
    rows = (
        write_row(
            COLD_PARTS[name], write_value(seconds, "s"), write_number(seconds / total, ".1%"), write_value(until, "s")
        )
        for (name, seconds), until in zip(parts.items(), accumulate(parts.values()), strict=True)
    )
    return Table(
        title="A cold start, part by part",
        heads=name_columns("part", "time", "of it", "until its end"),
        rows=(*rows, write_row("cold start", write_value(total, "s"), "100 %", "", strong=True)),
        notes=to_lines(
            [
                "one start, with its parts timed; nothing is compiled for a request. Its interval is what "
                "`lorameter run --phase cold` measures"
            ]
        ),
    )
