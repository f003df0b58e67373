"""A profile: where a step's time went, what ran in it, memory, ceilings, and what to try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorameter.profile.accounting import Ceilings, StepAccount, TokenShares
from lorameter.profile.diagnosis import OF_WHAT_RAN, RULES
from lorameter.profile.facts import Profile
from lorameter.profile.finding import Finding
from lorameter.records.memory_account import in_order, title_of
from lorameter.records.units import format_bytes, format_count
from lorameter.report.blocks import (
    Cell,
    Document,
    Section,
    Span,
    Table,
    name_columns,
    say,
    say_each,
    write_bytes,
    write_row,
)
from lorameter.report.findings import say_unfound, tabulate_findings
from lorameter.report.notices import describe_notices
from lorameter.report.step import tabulate_categories, tabulate_phases
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
    one, guess = profile.memory["train"], profile.estimates.get("train", {})
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
