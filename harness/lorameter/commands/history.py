"""What the command does that asks how a number went over time: `history`."""

from __future__ import annotations

import argparse

from lorameter.commands.output import check_page, print_json, save_page
from lorameter.errors import EXIT_PASS
from lorameter.records import codec, store
from lorameter.report.history import describe_history, figures_of_history, names_of
from lorameter.report.terminal import console_for, show
from lorameter.results.history import DEFAULT_METRIC, history_of


def run_history(options: argparse.Namespace) -> int:
    """Print the history; a suspicion is no verdict, so the exit code is that of a pass."""
    check_page(options.html)
    runs = store.runs_dir(options.runs_dir)
    found = history_of(runs, options.metric or DEFAULT_METRIC, study=options.study, variant=options.variant)

    if options.html:
        figures, names = figures_of_history(found), names_of(found)
        save_page(options.html, describe_history(found, every_run=False), "History", names=names, figures=figures)
    if options.json:
        print_json(codec.to_json(found))
        return EXIT_PASS

    show(describe_history(found, every_run=options.runs), console_for())
    return EXIT_PASS
