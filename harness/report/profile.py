"""A profile as tables: where a step's time went, what ran in it, memory, ceilings, and what to try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.profile.accounting import (
    IDLE,
    REMAINDER_LIMIT,
    Ceilings,
    Span,
    StepAccount,
    TokenShares,
    categories_s,
    plain_s,
)
from harness.profile.diagnosis import OF_WHAT_RAN, RULES, Finding
from harness.profile.facts import Profile
from harness.profile.remedy import Tried
from harness.records.activity import STEP_PHASES
from harness.records.memory_account import in_order, title_of
from harness.records.metrics import METRICS
from harness.records.units import format_bytes, format_interval, format_ratio, format_value
from harness.report.terminal import print_notices
from harness.verdicts.disturbance import disturbances

PHASE_TITLES = {
    "data": "data: taking the batch",
    "forward": "forward",
    "backward": "backward",
    "update": "clipping and optimizer",
}
TOP = 8
"""Operators that are shown by name."""
NAME_WIDTH = 80


def print_profile(
    profile: Profile,
    step: StepAccount,
    tokens: TokenShares,
    found: Ceilings | str,
    findings: Sequence[Finding],
    console: Console,
) -> None:
    """All of it."""
    where = f"{profile.device_name} ({profile.device}, {profile.threads} thread{'s' if profile.threads != 1 else ''})"
    console.print(f"[bold]{escape(profile.variant.name)}[/bold] of {escape(profile.study)} on {escape(where)}")
    console.print(_phases(profile, step))
    for line in _step_lines(step):
        console.print(f"  {escape(line)}")
    console.print()
    console.print(_categories(profile, step))
    for line in _operators(profile, step):
        console.print(f"  {escape(line)}")
    console.print()
    console.print(_memory(profile))
    console.print(f"\n[bold]Tokens of a step[/bold]\n  {escape(_tokens(tokens))}")
    console.print("\n[bold]Ceilings[/bold]")
    for line in _ceilings(found, profile):
        console.print(f"  {escape(line)}")
    console.print()
    console.print(_findings(findings, step))
    rest = [code for code in RULES if code not in {finding.code for finding in findings}]
    blind = [code for code in rest if profile.activity.missing and code in OF_WHAT_RAN]
    console.print(f"  looked for and not found: {', '.join(code for code in rest if code not in blind)}")
    if blind:
        console.print(f"  not judged, since it is not known what ran: {', '.join(blind)}")
    said = disturbances([profile.record], on_cpu=profile.device == "cpu")
    print_notices((*profile.record.notices, *said), console)


def print_tried(tried: Tried, console: Console) -> None:
    """What a remedy gained, beside what was seen to hang on the finding."""
    finding, comparison, control = tried.finding, tried.comparison, tried.control
    changes = ", ".join(f"{key} = {value}" for key, value in finding.suggestion.items())
    title = METRICS[tried.metric].title
    console.print(f"\n[bold]Tried: {escape(finding.code)}[/bold] by {escape(changes)} ({escape(tried.interleaving)})")
    if comparison is not None:
        said = format_ratio(comparison.ratio, comparison.low, comparison.high)
        console.print(f"  {title} with the remedy over without: {escape(said)} [bold]{comparison.verdict}[/bold]")
        console.print(f"  [dim]{escape(comparison.reason)}[/dim]")
    if finding.cost_share is not None and comparison is not None and comparison.ratio is not None:
        of = "a step" if tried.metric == "step_time_s" else f"the {title}"
        seen = f"the diagnosis had seen {finding.cost_share:.1%} of a step hang on it"
        console.print(f"  gained {escape(_gain(comparison.ratio, comparison.low, comparison.high))} of {of}; {seen}")
    if control is not None:
        said = format_ratio(control.ratio, control.low, control.high)
        console.print(f"  control (the present variant measured twice): {escape(said)} {control.verdict}")
    for failure in tried.failures:
        console.print(f"  [red]{escape(failure)}[/red]")
    if not tried.valid:
        console.print("  [bold red]This comparison is invalid.[/bold red]")
    console.print(f"  run {tried.run}")
    print_notices(tried.notices, console)


def _gain(ratio: float, low: float | None, high: float | None) -> str:
    """What a ratio of times leaves of the time, in per cent; the interval's ends change places."""
    ends = [None if end is None else 100 * (1 - end) for end in (high, low)]
    return f"{format_interval(100 * (1 - ratio), ends[0], ends[1], '1')} %"


def _phases(profile: Profile, step: StepAccount) -> Table:
    table = Table(title="Where a step's time goes", title_justify="left", title_style="bold")
    waits = "device waits" if profile.device == "cuda" else "between operators"
    known = not profile.activity.missing
    calls = "launches" if profile.device == "cuda" else "operators"
    for index, head in enumerate(("phase", "time", "of the step", waits, calls)):
        table.add_column(head, justify="right" if index else "left")
    idling = categories_s(profile, step).get(IDLE, {})
    for phase in profile.activity.phases:
        span = step.phases[phase.phase]
        table.add_row(
            PHASE_TITLES[phase.phase],
            escape(format_interval(span.value, span.low, span.high, "s")),
            f"{span.value / step.step.value:.1%}",
            f"{idling[phase.phase] / span.value:.0%}" if known else "–",
            f"{phase.calls:.0f}" if known else "–",
        )
    rest = step.remainder
    share = _shares(rest, step.step.value)
    table.add_row("remainder", escape(format_interval(rest.value, rest.low, rest.high, "s")), escape(share), "", "")
    total = format_interval(step.step.value, step.step.low, step.step.high, "s")
    calls = f"{profile.activity.calls:.0f}" if known else "–"
    table.add_row("step", escape(total), "100 %", "", calls, style="bold")
    return table


def _shares(span: Span, whole: float) -> str:
    """A part of a whole in percent, with its interval where it has one."""
    if span.low is None or span.high is None:
        return f"{span.value / whole:.1%}"
    return f"{span.value / whole:.1%} [{span.low / whole:.1%}, {span.high / whole:.1%}]"


def _step_lines(step: StepAccount) -> Iterator[str]:
    borders, between = step.borders, step.between
    quiet = "undisturbed" if step.counted < step.pairs else "all"
    yield f"{step.pairs} plain steps, in turns with as many whose phases were timed; {step.counted} count ({quiet})"
    yield "intervals are those of this process; between processes times differ more"
    yield (
        f"borders between phases cost {format_interval(borders.value, borders.low, borders.high, 's')} a step; in such "
        f"a step the phases cover {_shares(step.covered, 1.0)} of it"
    )
    yield (
        f"between steps, the loss read and the times kept: "
        f"{format_interval(between.value, between.low, between.high, 's')}"
    )
    if step.occupancy is not None:
        yield f"occupancy {step.occupancy:.0%}: CPU time over wall time of all these steps"
    limit = f"{REMAINDER_LIMIT:.0%} of the step"
    if step.explained is None:
        yield f"whether the remainder is at most {limit} cannot be told: measure again on a quieter machine"
    elif not step.explained:
        yield f"the phases do not explain the step: the remainder is more than {limit}"


def _categories(profile: Profile, step: StepAccount) -> Table:
    what = "kernels" if profile.device == "cuda" else "operators, each without those that it calls"
    table = Table(title=f"What ran: {what}", title_justify="left", title_style="bold")
    for index, head in enumerate(("category", "of the step", "time", *STEP_PHASES)):
        table.add_column(head, justify="right" if index else "left")
    for category, by_phase in categories_s(profile, step).items():
        seconds = sum(by_phase.values())
        times = (format_value(by_phase[phase], "s") if by_phase[phase] else "–" for phase in STEP_PHASES)
        table.add_row(category, f"{seconds / step.step.value:.1%}", format_value(seconds, "s"), *times)
    return table


def _operators(profile: Profile, step: StepAccount) -> Iterator[str]:
    steps, slow = len(profile.activity.step_times_s), profile.activity.window_s
    slower = step.profiler_slowdown
    seen = (
        f"seen in {steps} steps under the profiler, each {format_value(slow, 's')} "
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


def _memory(profile: Profile) -> Table:
    """Kinds side by side for a step and a request, each beside what was expected of it from the shape alone; what no
    kind explains is a line of its own."""
    accounts = tuple(profile.memory[phase] for phase in _MEMORY_HEADS)
    where = "device" if profile.device == "cuda" else "process"
    table = Table(title=f"Memory of the {where} at its peak", title_justify="left", title_style="bold")
    table.add_column("kind")
    expected = [profile.estimates.get(one.phase, {}) for one in accounts]
    for one in accounts:
        table.add_column(_MEMORY_HEADS[one.phase], justify="right")
        table.add_column("estimated", justify="right", style="dim")
    columns = [column for one, guess in zip(accounts, expected, strict=True) for column in (one.kinds, guess)]
    for kind in in_order(dict.fromkeys((kind for column in columns for kind in column), 1)):
        table.add_row(title_of(kind), *(_bytes(column.get(kind)) for column in columns))
    rest = (f"{format_bytes(one.unexplained_bytes)} ({one.share:.1%})" for one in accounts)
    table.add_row("unexplained", *(cell for share in rest for cell in (share, "")))
    peaks = [
        cell
        for one, guess in zip(accounts, expected, strict=True)
        for cell in (format_bytes(one.peak_bytes), _expected(sum(guess.values()), one.peak_bytes))
    ]
    table.add_row("peak, as measured", *peaks, style="bold")
    for kind in dict.fromkeys(kind for one in accounts for kind in one.beside):
        sizes = [cell for one in accounts for cell in (_bytes(one.beside.get(kind)), "")]
        table.add_row(f"{kind.replace('_', ' ')}, beside it", *sizes)
    return table


def _bytes(size: int | None) -> str:
    return "–" if size is None else format_bytes(size)


def _expected(estimate: int, measured: int) -> str:
    """An estimate with its error; nothing where there is none."""
    return f"{format_bytes(estimate)} ({estimate / measured - 1:+.1%})" if estimate else "–"


_MEMORY_HEADS = {"train": "a step", "generate": "a request"}


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
    decode = found.decode
    token = format_interval(decode.token.value, decode.token.low, decode.token.high, "s")
    yield f"decoding: {token} a token, {format_bytes(decode.bytes)} read for each, {decode.context} tokens of context"
    yield str(decode.use)
    for name, peak in profile.measured_peaks.items():
        if peak != profile.peaks.get(name):
            yield f"what this device reached when it was asked: {peak}"


def _findings(findings: Sequence[Finding], step: StepAccount) -> Table:
    table = Table(title="Findings, and what was seen to hang on each", title_justify="left", title_style="bold")
    for head in ("finding", "seen", "cost", "what to try"):
        table.add_column(head, overflow="fold", justify="right" if head == "cost" else "left")
    for finding in findings:
        cost = format_bytes(finding.cost_bytes or 0)
        if finding.cost_s is not None:
            cost = f"{format_value(finding.cost_s, 's')}\n{finding.cost_s / step.step.value:.1%}"
        tries = f" [cyan]--try {finding.code}[/cyan]"
        if not finding.suggestion:
            tries = f" [dim]Cannot be tried here: {escape(finding.obstacle)}.[/dim]"
        table.add_row(finding.code, escape(finding.message), cost, escape(finding.remedy) + tries)
    if not findings:
        table.add_row("none", "", "", "")
    return table
