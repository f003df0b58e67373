"""What the commands do that ask what a study found: `claims`."""

from __future__ import annotations

import argparse
from typing import Any

from lorameter.commands.options import add_options
from lorameter.commands.output import form_of, print_json, show_document
from lorameter.commands.page import check_page, save_page
from lorameter.errors import EXIT_INVALID, EXIT_PASS


def add_commands(commands: Any, common: Any) -> None:
    """The parsers of these commands; `common` adds the options that every command has."""
    claims = commands.add_parser(
        "claims",
        help="judge the claims of a study by a run",
        description="Judge each claim of the study by a run: supported, refuted, inconclusive, not judged.",
    )
    claims.add_argument("run", metavar="RUN", help="a run id or a run directory; also of an unfinished run")
    add_options(claims.add_argument, "format", "markdown", "html", "verbose")
    common(claims)
    claims.set_defaults(command=run_claims)


def run_claims(options: argparse.Namespace) -> int:
    """Print the verdicts; they are findings, not failures, so any of them is a pass."""
    from lorameter.records import store
    from lorameter.verdicts.claims import document, judge_claims

    form = form_of(options)
    check_page(options.html)
    report = judge_claims(store.read_run(options.run, store.runs_dir(options.runs_dir)))
    from lorameter.report.claims import describe_claims

    said = describe_claims(report)
    if form == "json":
        print_json(document(report))
    else:
        from lorameter.report.annotations import claims_annotations

        show_document(said, form, annotations=lambda: claims_annotations(report), verbose=options.verbose)
    save_page(options.html, said, f"Claims of {options.run}")
    return EXIT_PASS if report.valid else EXIT_INVALID
