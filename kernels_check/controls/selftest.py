"""``python -m kernels_check selftest``: does every check fail where it must, and only there?

Each negative control is built twice, broken and sound, and verified with both instruments. It holds if the broken run
is caught for the right reason and the sound one passes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from kernels_check.check import Check
from kernels_check.controls.control import Control, Outcome, run_control
from kernels_check.visible import make_visible

SCHEMA = 1
EXIT_FAILED = 4
WIDTH = 160
"""Of the table where there is no terminal."""
_VERDICTS = {True: "[green]holds[/]", False: "[red]FAILED[/]", None: "[yellow]skipped[/]"}


def run(arguments: argparse.Namespace) -> int:
    """Run every control, print the table or one JSON document, and return 0 if all hold."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from kernels_check.controls.catalogue import CONTROLS

    def announce(control: Control) -> None:
        print(f"kernels_check selftest: {control.name}", file=sys.stderr)

    outcomes = run_all(CONTROLS, announce=announce)
    print(json.dumps(document(outcomes), indent=2, allow_nan=False)) if arguments.json else show(outcomes)
    return 0 if all(outcome.held is not False for outcome in outcomes) else EXIT_FAILED


def run_all(controls: Iterable[Control], *, announce: Callable[[Control], None] = lambda _: None) -> list[Outcome]:
    """Run the controls one after the other, each with every instrument that can see it."""
    outcomes = []
    for control in controls:
        announce(control)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn of what is broken here on purpose
            outcomes += [run_control(control, instrument) for instrument in control.instruments]
    return outcomes


def document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The JSON document: the verdict on all, and every outcome with both checks."""
    return {
        "schema": SCHEMA,
        "held": all(outcome.held is not False for outcome in outcomes),
        "counts": counts(outcomes),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many held, failed and were skipped."""
    verdicts = [outcome.held for outcome in outcomes]
    return {"held": verdicts.count(True), "failed": verdicts.count(False), "skipped": verdicts.count(None)}


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the table, one row a control, then what failed or was skipped and why."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("control", "path", "sabotage", "twin", "profile", "spy"):
        table.add_column(name, overflow="fold", no_wrap=name not in ("path", "sabotage", "twin"))
    for _, group in groupby(outcomes, key=lambda outcome: outcome.control):
        runs = {outcome.instrument: outcome for outcome in group}
        first = next(iter(runs.values()))
        seen = [_seen(check) for check in (first.sabotage, first.twin)]
        verdicts = [_VERDICTS[runs[name].held] if name in runs else "–" for name in ("profile", "spy")]
        table.add_row(first.control, first.path, *seen, *verdicts)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    for label, held in (("skipped", None), ("FAILED", False)):
        for outcome in outcomes:
            if outcome.held is held:
                line = f"{label}: {outcome.control}, {outcome.instrument}: {outcome.fault}"
                console.print(make_visible(line), markup=False, highlight=False)
    total = counts(outcomes)
    line = f"{total['held']} hold, {total['failed']} failed, {total['skipped']} skipped"
    console.print(line, markup=False, highlight=False)


def _seen(check: Check | None) -> str:
    from rich.markup import escape

    return "–" if check is None else escape(make_visible(f"{check.status} ({check.observed})"))
