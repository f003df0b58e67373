"""Prints the judgement of a recording: tables for a reader, one JSON document for a program."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping

from kernels_check.check import format_count
from kernels_check.terminal import escape_control_chars, print_stderr
from kernels_check.trace.file import TraceError
from kernels_check.trace.read import read_trace
from kernels_check.trace.summary import BackendUse, KernelSummary, Use

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
_NAMES_SHOWN = 10
"""Unclassified names in the table; the JSON document has all."""


def run(arguments: argparse.Namespace) -> int:
    """``trace FILE [--json]``."""
    try:
        summary = read_trace(arguments.file)
    except TraceError as error:
        print_stderr(f"kernels_check: {error}")
        return EXIT_BAD_INPUT
    if arguments.json:
        print(json.dumps(summary.to_json(), allow_nan=False))
    else:
        _print(summary)
    for notice in summary.notices:
        print_stderr(f"notice: {notice}")
    return EXIT_DONE


def _print(summary: KernelSummary) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    what = "kernel launches" if summary.device == "gpu" else "operator calls"
    where = "GPU time" if summary.device == "gpu" else "time in operators of the host (no GPU kernel recorded)"
    console.print(f"{summary.calls:,} {what}, {summary.time_ms:,.3f} ms of {where}")
    if summary.busy_share is not None:
        console.print(f"busy share {summary.busy_share:.1%} of the time from the first start to the last end")
    if (steps := summary.kernels_per_step) is not None:
        over = format_count(steps.steps, "step")
        console.print(f"kernels a step: median {steps.median:,g}, {steps.lowest:,} to {steps.highest:,} over {over}")

    def table(title: str, rows: Mapping[str, Use], note: str = "") -> None:
        if not rows:
            return
        printed = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
        printed.add_column("", overflow="fold")
        for heading in ("calls", "time ms", "share"):
            printed.add_column(heading, justify="right")
        proven = any(isinstance(use, BackendUse) for use in rows.values())
        if proven:
            printed.add_column("by name", overflow="fold")
        for name, use in rows.items():
            cells: list[Text | str] = [
                Text(escape_control_chars(name)),
                f"{use.calls:,}",
                f"{use.time_ms:,.3f}",
                f"{use.time_share:.1%}",
            ]
            cells += [", ".join(_evidence(use))] if proven else []
            printed.add_row(*cells)
        console.print(printed)

    table("Attention", summary.attention.backends, "calls are launches")
    formats = ", ".join(f"{calls:,} in {dtype}" for dtype, calls in summary.fourbit.dtypes.items())
    table("4-bit paths", summary.fourbit.paths, f"compute dtype: {formats}" if formats else "")
    table("4-bit formats", summary.fourbit.quant_types)
    table("Matrix products by number format", summary.matmul_dtypes)
    categories = Table(title="Categories", title_justify="left")
    categories.add_column("")
    categories.add_column("time ms", justify="right")
    categories.add_column("share", justify="right")
    for name, share in summary.categories.items():
        categories.add_row(name, f"{summary.category_time_ms[name]:,.3f}", f"{share:.1%}")
    console.print(categories)
    unknown = summary.unclassified.kernels
    table(
        f"Names that no rule knows: {len(unknown)} ({summary.unclassified.time_share:.1%} of the time, part of other)",
        dict(list(unknown.items())[:_NAMES_SHOWN]),
        f"and {len(unknown) - _NAMES_SHOWN} more, see --json" if len(unknown) > _NAMES_SHOWN else "",
    )


def _evidence(use: Use) -> Iterable[str]:
    if not isinstance(use, BackendUse):
        return
    if use.forward_calls or use.backward_calls:
        yield f"{use.forward_calls:,} forward, {use.backward_calls:,} backward"
    yield from (f"{calls:,} {dtype}" for dtype, calls in use.dtypes.items())
    if use.causal_calls:
        yield f"{use.causal_calls:,} causal"
    if use.not_causal_calls:
        yield f"{use.not_causal_calls:,} not causal"
