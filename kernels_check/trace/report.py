"""Prints the judgement of a recording: tables for a reader, one JSON document for a program."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence

from kernels_check.check import format_count
from kernels_check.terminal import escape_control_chars, print_stderr
from kernels_check.trace.recording import TraceError
from kernels_check.trace.summary import BackendUse, KernelSummary, Use, read_trace

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

    console = Console(highlight=False)
    what = "kernel launches" if summary.device == "gpu" else "operator calls"
    where = "GPU time" if summary.device == "gpu" else "time in operators of the host (no GPU kernel recorded)"
    console.print(f"{summary.calls:,} {what}, {summary.time_ms:,.3f} ms of {where}")
    if summary.busy_share is not None:
        console.print(f"busy share {summary.busy_share:.1%} of the time from the first start to the last end")
    if (steps := summary.kernels_per_step) is not None:
        over = format_count(steps.steps, "step")
        console.print(f"kernels a step: median {steps.median:,g}, {steps.lowest:,} to {steps.highest:,} over {over}")

    def table(title: str, headings: Iterable[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
        from rich.table import Table
        from rich.text import Text

        if not rows:
            return
        printed = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
        for heading in headings:
            printed.add_column(heading, justify="left" if heading in ("", "by name") else "right", overflow="fold")
        for row in rows:
            printed.add_row(*(Text(escape_control_chars(cell)) for cell in row))
        console.print(printed)

    used = "", "calls", "time ms", "share"
    backends = summary.attention.backends
    evidence = [(*row, _evidence(use)) for row, use in zip(_rows(backends), backends.values(), strict=True)]
    table("Attention", (*used, "by name"), evidence, "calls are launches")
    formats = ", ".join(f"{calls:,} in {dtype}" for dtype, calls in summary.fourbit.dtypes.items())
    table("4-bit paths", used, _rows(summary.fourbit.paths), f"compute dtype: {formats}" if formats else "")
    table("4-bit formats", used, _rows(summary.fourbit.quant_types))
    table("Matrix products by number format", used, _rows(summary.matmul_dtypes))
    times = summary.category_time_ms
    categories = [(name, f"{times[name]:,.3f}", f"{share:.1%}") for name, share in summary.categories.items()]
    table("Categories", ("", "time ms", "share"), categories)
    unknown = _rows(summary.unclassified.kernels)
    more = len(unknown) - _NAMES_SHOWN
    share = summary.unclassified.time_share
    table(
        f"Names that no rule knows: {len(unknown)} ({share:.1%} of the time, part of other)",
        used,
        unknown[:_NAMES_SHOWN],
        f"and {more} more, see --json" if more > 0 else "",
    )


def _rows(uses: Mapping[str, Use]) -> list[tuple[str, ...]]:
    return [(name, f"{use.calls:,}", f"{use.time_ms:,.3f}", f"{use.time_share:.1%}") for name, use in uses.items()]


def _evidence(use: BackendUse) -> str:
    """What the names of the kernels prove."""
    known = [f"{calls:,} {dtype}" for dtype, calls in use.dtypes.items()]
    if use.forward_calls or use.backward_calls:
        known.insert(0, f"{use.forward_calls:,} forward, {use.backward_calls:,} backward")
    known += [f"{use.causal_calls:,} causal"] if use.causal_calls else []
    known += [f"{use.not_causal_calls:,} not causal"] if use.not_causal_calls else []
    return ", ".join(known)
