"""A profile of requests: where their time went, unmerged and merged, what ran, memory, a cold start, what to try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorameter.profile.accounting import PassAccount, RequestAccount
from lorameter.profile.facts import COLD_PARTS, RequestProfile
from lorameter.profile.request_rules import OF_WHAT_RAN, REQUEST_RULES
from lorameter.profile.rules import Finding
from lorameter.records.memory_account import in_order, title_of
from lorameter.records.units import format_bytes, format_count
from lorameter.report.blocks import (
    Cell,
    Document,
    Row,
    Span,
    Table,
    name_columns,
    say,
    say_each,
    value_cell,
    write_bytes,
    write_row,
    write_seconds,
    write_share,
)
from lorameter.report.notices import describe_notices
from lorameter.report.profile import OF_REQUESTS, say_unfound, tabulate_categories, tabulate_findings, tabulate_phases
from lorameter.verdicts.validity import disturbance_notices

_MERGED = ", with the adapter merged"


def describe_requests(
    profile: RequestProfile,
    served: RequestAccount,
    merged: RequestAccount | None,
    findings: Sequence[Finding],
) -> Document:
    """All of it; `merged` is the account with the adapter merged, where that is another."""
    threads = format_count(profile.threads, "thread")
    where = f"{profile.device_name} ({profile.device}, {threads})"
    workload = profile.workload
    prompts = f"{workload.request_batch} prompts of " if workload.request_batch > 1 else ""
    each = " each" if prompts else ""
    asked = f"; requests of {prompts}{workload.prompt_tokens} tokens{each}, answered by {workload.new_tokens}{each}"
    said = disturbance_notices([profile.record], on_cpu=profile.device == "cpu")
    sides: list[tuple[RequestProfile, RequestAccount, str]] = [(profile, served, "")]
    if merged is not None and profile.merged is not None:
        sides.append((profile.merged, merged, _MERGED))
    return (
        say(
            Span(text=profile.variant.name, tone="strong"),
            f" of {profile.study} on {where}{asked}",
            indented=False,
        ),
        *(tabulate_phases(side, account.whole, OF_REQUESTS, suffix=suffix) for side, account, suffix in sides),
        _passes(profile, [(account, suffix) for _, account, suffix in sides]),
        *(tabulate_categories(side, account.whole, OF_REQUESTS, suffix=suffix) for side, account, suffix in sides),
        _memory(profile),
        *([_cold(profile)] if profile.cold_parts_s else []),
        tabulate_findings(
            findings, say_unfound(REQUEST_RULES, findings, OF_WHAT_RAN if profile.activity.missing else ())
        ),
        *describe_notices((*profile.record.notices, *said)),
    )


def _passes(profile: RequestProfile, accounts: Sequence[tuple[RequestAccount, str]]) -> Table:
    rows: list[Row] = []
    for account, suffix in accounts:
        rows.append(_pass(f"prefill{suffix}", account.prefill))
        rows.append(_pass(f"a token of decode{suffix}", account.decode))
    calls = "launches" if profile.device == "cuda" else "operators"
    return Table(
        title="Forward passes, and how near they came to the peak",
        heads=name_columns("pass", "time", calls, "FLOPs", "MFU", "bytes", "MBU"),
        rows=tuple(rows),
        notes=say_each(_pass_lines(profile, accounts)),
        blank_line_before=True,
    )


def _pass(title: str, one: PassAccount) -> Row:
    return write_row(
        title,
        value_cell(one.time.value, one.time.low, one.time.high, "s"),
        "–" if one.calls is None else Cell(text=f"{one.calls:.0f}", value=one.calls, unit="1"),
        Cell(text=f"{one.flops:.4g}", value=float(one.flops), unit="1"),
        "–" if one.mfu is None else write_share(one.mfu.value),
        write_bytes(one.bytes),
        "–" if one.mbu is None else write_share(one.mbu.value),
    )


def _pass_lines(profile: RequestProfile, accounts: Sequence[tuple[RequestAccount, str]]) -> Iterator[str]:
    for account, suffix in accounts:
        first, later = account.first_token, account.token
        yield (
            f"time to first token {value_cell(first.value, first.low, first.high, 's').line}, per later token "
            f"{value_cell(later.value, later.low, later.high, 's').line}{suffix}"
        )
    served = accounts[0][0]
    for one in (served.prefill.mfu, served.decode.mbu):
        if one is not None:
            yield str(one)
    lacking = [name for name in ("product", "memory") if name not in profile.peaks]
    if lacking:
        yield f"what this device does at best is neither stated nor measured: {', '.join(lacking)}"


def _memory(profile: RequestProfile) -> Table:
    account, memory, facts = profile.memory, profile.record.memory, profile.facts
    rows = [write_row(title_of(kind), write_bytes(size)) for kind, size in in_order(account.kinds).items()]
    rest = account.unexplained_bytes
    rows.append(
        write_row("unexplained", Cell(text=f"{format_bytes(rest)} ({account.share:.1%})", value=rest, unit="byte"))
    )
    rows.append(write_row("peak, as measured", write_bytes(account.peak_bytes), strong=True))
    rows += [
        write_row(f"{kind.replace('_', ' ')}, outside of it", write_bytes(size))
        for kind, size in account.beside.items()
    ]
    first = memory.get("device_peak_allocated_first_token_bytes", memory.get("host_peak_first_token_bytes"))
    lines = [] if first is None else [f"up to the first token, in a request of its own: {format_bytes(first)}"]
    if facts.cache:
        moved = f"is made anew at {facts.cache_moved:.0%} of the tokens" if facts.cache_moved else "stays where it is"
        lines.append(f"cache: {facts.cache}, {format_bytes(facts.cache_bytes)} at the end of a request; it {moved}")
    else:
        lines.append("cache: none")
    return Table(
        title=f"Memory of the {'device' if profile.device == 'cuda' else 'process'} at the peak of a request",
        heads=name_columns("kind", "bytes"),
        rows=tuple(rows),
        notes=say_each(lines),
        blank_line_before=True,
    )


def _cold(profile: RequestProfile) -> Table:
    parts, total = profile.cold_parts_s, profile.record.values["cold_start_time_s"]
    rows: list[Row] = []
    until = 0.0
    for name, seconds in parts.items():
        until += seconds
        rows.append(
            write_row(COLD_PARTS[name], write_seconds(seconds), write_share(seconds / total), write_seconds(until))
        )
    rows.append(write_row("cold start", write_seconds(total), "100 %", "", strong=True))
    return Table(
        title="A cold start, one after the other",
        heads=name_columns("part", "time", "of it", "until its end"),
        rows=tuple(rows),
        notes=say_each(
            [
                "one start, with its parts timed; nothing is compiled for a request. Its interval is what "
                "`lorameter run --phase cold` measures"
            ]
        ),
        blank_line_before=True,
    )
