"""Describes what a machine can run and measure: the doctor's checks, and the rates of a calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from lorameter.machine.doctor import About, DoctorCheck, Grade
from lorameter.report.blocks import (
    Block,
    Cell,
    Document,
    Section,
    Span,
    Table,
    name_columns,
    say,
    say_each,
    write_ratio,
    write_row,
)

if TYPE_CHECKING:
    from lorameter.verdicts.calibrate import Calibration

TITLES: dict[About, str] = {
    "runs": "What this machine can run",
    "measures": "What it can measure",
    "spoils": "What would disturb a measurement here",
}


def describe_checks(checks: Sequence[DoctorCheck], *, fit: bool) -> Document:
    """A table for each of the three questions, and the answer in one line."""
    return tuple(_blocks(checks, fit=fit))


def _blocks(checks: Sequence[DoctorCheck], *, fit: bool) -> Iterator[Block]:
    for about, title in TITLES.items():
        selected = (check for check in checks if check.about == about)
        rows = tuple(
            write_row(check.name, Cell(verdict=check.grade), check.found, Cell(detail=check.remedy))
            for check in selected
        )
        yield Table(title=title, heads=name_columns("", "", "found", "remedy", left=4), rows=rows)
    counts = Counter(check.grade for check in checks)
    grades = ", ".join(f"{counts[grade]} {grade}" for grade in get_args(Grade) if counts[grade])
    if not fit:
        answer, rest = Span(text="unfit", tone="alarm"), ": what it measured would not count"
    elif counts["bad"]:
        answer, rest = Span(text="fit to measure, with less precision", tone="warning"), ": mend what is bad first"
    else:
        answer, rest = Span(text="fit to measure", tone="good"), ""
    yield say("This machine is ", answer, f"{rest}. Checks: {grades}.", indented=False)


def describe_calibration(result: Calibration, rows: int) -> Document:
    """The scatter, both comparisons, the rates of resampled gates, and the replicates needed for smaller effects."""
    from lorameter.verdicts.calibrate import DRAWS, planned_effects

    identical, injected = (
        write_ratio(found, verdict=found.verdict).line for found in (result.identical, result.injected)
    )
    replicates = f"{result.replicates} replicates of"
    rates = Table(
        title=f"Gates drawn from these replicates, {DRAWS} a row, default limits",
        heads=name_columns(
            "replicates", "identical: regressed", "identical: equivalent", "slow-down: regressed", left=0
        ),
        rows=tuple(
            write_row(str(rate.replicates), *map(_share, (rate.false_alarms, rate.equivalent, rate.found)))
            for rate in result.rates
        ),
        notes=say_each([f"All draws are from {replicates} one run: they hold for this run, not for another hour."]),
    )
    return (
        say(
            Span(text="What this machine can see", tone="strong"),
            f": {result.device}, {result.interleaving}",
            indented=False,
        ),
        say(
            f"{replicates} {result.seconds_per_replicate:.1f} s; standard deviation of one replicate's log ratio on "
            f"identical code {100 * result.sd:.2f} % [{100 * result.sd_low:.2f}, {100 * result.sd_high:.2f}]"
        ),
        say(f"identical code   {identical}"),
        say(f"injected slow-down {injected} ({rows} rows in each adapted layer)"),
        rates,
        Section(
            title="To see a slow-down in 80 % of the runs",
            lines=say_each(planned_effects(result)),
        ),
    )


def _share(share: float) -> Cell:
    return Cell(text=f"{100 * share:.1f} %", value=share, unit="1")
