"""What a machine can see, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.records.units import format_ratio

if TYPE_CHECKING:
    from rich.console import Console

    from harness.verdicts.calibrate import Calibration


def print_calibration(result: Calibration, rows: int, console: Console) -> None:
    """False alarms, power and prices, each with what it rests on."""
    from rich.markup import escape
    from rich.table import Table

    from harness.verdicts.calibrate import DRAWS, planned_effects

    identical, planted = result.identical, result.planted
    console.print(f"[bold]What this machine can see[/bold]: {escape(result.device)}, {result.interleaving}")
    console.print(
        f"  {result.replicates} replicates of {result.seconds_per_replicate:.1f} s; standard deviation of one "
        f"replicate's log ratio on identical code {100 * result.sd:.2f} % "
        f"[{100 * result.sd_low:.2f}, {100 * result.sd_high:.2f}]"
    )
    console.print(
        f"  identical code   {format_ratio(identical.ratio, identical.low, identical.high)} {identical.verdict}"
    )
    console.print(
        f"  planted slow-down {format_ratio(planted.ratio, planted.low, planted.high)} {planted.verdict} "
        f"({rows} rows in each adapted layer)"
    )
    table = Table(title=f"Gates drawn from these replicates, {DRAWS} a row, default limits", title_justify="left")
    for head in ("replicates", "identical: regressed", "identical: equivalent", "slow-down: regressed"):
        table.add_column(head, justify="right")
    for rate in result.rates:
        shares = (rate.false_alarms, rate.equivalent, rate.found)
        table.add_row(str(rate.replicates), *(f"{100 * share:.1f} %" for share in shares))
    console.print(table)
    console.print(
        f"  All draws are from {result.replicates} replicates of one run: they say what it could have said, not what "
        "another hour would."
    )
    console.print("[bold]To see a slow-down in 80 % of the runs[/bold]")
    for line in planned_effects(result):
        console.print(f"  {line}")
