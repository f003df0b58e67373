"""The command that shows a stored run: `report`."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lorameter.commands.options import add_options
from lorameter.commands.output import form_of, print_json, show_document
from lorameter.commands.page import check_page, save_run_page
from lorameter.errors import EXIT_INVALID, EXIT_PASS, UsageError

if TYPE_CHECKING:
    from lorameter.records.store import Run
    from lorameter.report.blocks import Document
    from lorameter.report.run_view import ReportFilter, RunView
    from lorameter.verdicts.comparison_report import ComparisonRow

PHASE_WORDS = ("train", "generate", "cold")
SORT_WORDS = ("study", "name", "ratio", "value", "memory")


def add_commands(commands: Any, common: Any) -> None:
    """The parser of this command; `common` adds the options that every command has."""
    report = commands.add_parser("report", help="print the report of a run")
    report.add_argument(
        "run", metavar="RUN", nargs="+", help="a run id or a run directory; of several A/B runs one table"
    )
    add_options(report.add_argument, "metric")
    report.add_argument("--variant", metavar="V", action="append", default=[], help="only this one; repeatable")
    report.add_argument("--phase", choices=PHASE_WORDS, action="append", default=[], help="only this one; repeatable")
    report.add_argument("--sort", choices=SORT_WORDS, default="study", help="the order of the variants")
    add_options(report.add_argument, "policy", "format", "markdown", "html", "verbose")
    common(report)
    report.set_defaults(command=run_report)


def run_report(options: argparse.Namespace) -> int:
    """Print the report of a run, whole or not; of an A/B the gate's, by the policy that it was judged by."""
    from lorameter.records import store
    from lorameter.report.run_view import encode_run, view_of

    form, folder = form_of(options), store.runs_dir(options.runs_dir)
    check_page(options.html)
    if len(options.run) > 1:
        from lorameter.commands.ab_report import show_matrix

        runs = [store.read_run(name, folder) for name in options.run]
        return show_matrix(runs, options, _filter(options, *runs))
    run = store.read_run(options.run[0], folder)
    gc.freeze()  # all of it is needed to the end, and looking through a large run for what is not takes seconds
    if run.manifest.sides:
        from lorameter.commands.ab_report import show_ab

        return show_ab(run, options, metrics=options.metric, keep=_filter(options, run))
    view = view_of(run, _asked(options))
    if form == "json":
        print_json(encode_run(view))
    else:
        show_report(run, view, form, verbose=options.verbose)
    if options.html:
        save_run_page(options.html, run, view, document_of(run, view))
    return EXIT_PASS if view.valid else EXIT_INVALID


def _filter(options: argparse.Namespace, *runs: Run) -> Callable[[ComparisonRow], bool]:
    """Which comparisons of A/Bs are shown. Raises `UsageError` for a variant or a phase that none of them has, and for
    an order."""
    import fnmatch

    from lorameter.report.run_view import phase_of
    from lorameter.studies.study import unknown

    name = ", ".join(run.manifest.run for run in runs)
    names = list(dict.fromkeys(str(variant["name"]) for run in runs for variant in run.manifest.study["variants"]))
    phases = list(dict.fromkeys(phase for run in runs for phase in run.manifest.phases))
    if options.sort != "study":
        raise UsageError(
            f"--sort {options.sort}: run {name} is an A/B, and each of its variants is compared with itself."
        )
    for pattern in options.variant:
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"variant {pattern!r}: {unknown(pattern, names)}")
    for phase in options.phase:
        if phase not in phases:
            raise UsageError(f"phase {phase!r}: run {name} has {', '.join(phases)}.")

    def keep(compared: ComparisonRow) -> bool:
        of_variant = any(fnmatch.fnmatchcase(compared.variant, pattern) for pattern in options.variant)
        of_phase = phase_of(compared.metric) in options.phase
        return (of_variant or not options.variant) and (of_phase or not options.phase)

    return keep


def show_report(run: Run, view: RunView, form: str = "text", *, verbose: bool = False) -> None:
    """The report, with the verdicts on what the study claims where it claims anything."""
    from lorameter.report.annotations import run_annotations

    document = document_of(run, view)
    show_document(document, form, annotations=lambda: run_annotations(view), verbose=verbose)


def document_of(run: Run, view: RunView) -> Document:
    """All that is said of a run that compares variants."""
    from lorameter.report.run import describe_run
    from lorameter.studies.from_run import read_study
    from lorameter.verdicts.sites import is_mixed

    document = describe_run(view)
    # A claim is of one kind of machine, and the notices say what this is.
    if not read_study(run).claims or is_mixed(run):
        return document
    if view.valid:
        from lorameter.report.claims import describe_verdicts
        from lorameter.verdicts.claims import judge_claims

        return document + describe_verdicts(judge_claims(run))
    from lorameter.report.blocks import Section, say

    said = f"not judged: the run is invalid. `lorameter claims {view.run}` judges them by the trials that there are."
    return (*document, Section(title="Claims", lines=(say(said),)))


def _asked(options: argparse.Namespace) -> ReportFilter:
    from lorameter.report.run_view import ReportFilter
    from lorameter.verdicts.gate import load_policy

    return ReportFilter(
        metrics=tuple(options.metric),
        variants=tuple(options.variant),
        phases=tuple(options.phase),
        sort=options.sort,
        limits_of=load_policy(options.policy).limits_of,
    )
