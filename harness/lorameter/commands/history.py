"""What the command does that asks how a number went over time: `history`."""

from __future__ import annotations

import argparse
from typing import Any

from lorameter.commands.options import add_options
from lorameter.commands.output import print_json
from lorameter.commands.page import check_page, save_page
from lorameter.errors import EXIT_PASS


def add_commands(commands: Any, common: Any) -> None:
    """The parser of `history`; `common` adds the options that every command has."""
    history = commands.add_parser(
        "history",
        help="history of a metric across runs, and where it changed",
        description="Show a metric across all runs with the same fingerprint, with known breaks, suspected changes, "
        "and the commands that would confirm them.",
    )
    history.add_argument("metric", metavar="METRIC", nargs="?", help="default: step_time_s")
    history.add_argument("--study", metavar="S", help="only this study, by its name")
    history.add_argument("--variant", metavar="V", help="only this variant")
    history.add_argument(
        "--runs", action="store_true", help="also show one row per run, with its interval, commit and versions"
    )
    add_options(history.add_argument, "html")
    common(history)
    history.set_defaults(command=run_history)


def run_history(options: argparse.Namespace) -> int:
    """Print the history; a suspicion is no verdict, so the exit code is that of a pass."""
    from lorameter.records import codec, store
    from lorameter.results.history import DEFAULT_METRIC, history_of

    check_page(options.html)
    runs = store.runs_dir(options.runs_dir)
    found = history_of(runs, options.metric or DEFAULT_METRIC, study=options.study, variant=options.variant)
    from lorameter.report.history import describe_history

    if options.html:
        from lorameter.report.history import figures_of_history, names_of

        figures, names = figures_of_history(found), names_of(found)
        save_page(options.html, describe_history(found, every_run=False), "History", names=names, figures=figures)
    if options.json:
        print_json(codec.to_json(found))
        return EXIT_PASS
    from lorameter.report.terminal import console_for, show

    show(describe_history(found, every_run=options.runs), console_for())
    return EXIT_PASS
