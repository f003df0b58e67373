"""What the commands that judge one side by another do: `compare`, `gate` and `accept`."""

from __future__ import annotations

import argparse
import gc
from typing import TYPE_CHECKING, Any

from kernels_check.terminal import escape_control_chars
from lorameter.commands.options import add_options
from lorameter.commands.output import form_of, print_json, show_document
from lorameter.commands.page import check_page, save_page
from lorameter.errors import EXIT_PASS, UsageError

if TYPE_CHECKING:
    from lorameter.verdicts.comparison_input import ComparisonInput


def add_commands(commands: Any, common: Any) -> None:
    """The parsers of these commands; `common` adds the options that every command has."""
    compare = commands.add_parser(
        "compare", help="compare two runs", description="Compare two runs metric by metric; the exit code says how."
    )
    _sides(compare)
    add_options(compare.add_argument, "metric")
    compare.add_argument("--all-metrics", action="store_true", help="everything that was measured")
    compare.add_argument("--force", action="store_true", help="show ratios of sides that are not comparable")
    add_options(compare.add_argument, "policy", "format", "markdown", "html", "verbose")
    common(compare)
    compare.set_defaults(command=run_compare)

    gate = commands.add_parser(
        "gate", help="pass or fail a comparison by a policy", description="Pass or fail a comparison by a policy file."
    )
    _sides(gate)
    add_options(gate.add_argument, "metric", "policy", "format", "markdown", "html", "verbose")
    common(gate)
    gate.set_defaults(command=run_gate)

    accept = commands.add_parser(
        "accept", help="make a run the baseline of its fingerprint", description="Make a valid run the baseline."
    )
    accept.add_argument("run", metavar="RUN", help="a run id, or a directory in the runs directory")
    common(accept)
    accept.set_defaults(command=run_accept)


def _sides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "base",
        metavar="BASE",
        help="a run id, a run directory, a pytest-benchmark .json, a folder or quoted pattern of several (each is a "
        "replicate), the word baseline, or an A/B, which is both sides",
    )
    command.add_argument(
        "candidate",
        metavar="CANDIDATE",
        nargs="?",
        help="a run id, a run directory, a pytest-benchmark .json, or a folder or quoted pattern of several",
    )


def run_compare(options: argparse.Namespace) -> int:
    """Print the comparison; the exit code is that of its verdicts, which a policy gives limits alone."""
    from lorameter.verdicts.compare import compare
    from lorameter.verdicts.comparison_report import document, exit_code
    from lorameter.verdicts.gate import load_policy

    if options.metric and options.all_metrics:
        raise UsageError("--metric and --all-metrics both choose the metrics. Give one of them.")
    form, policy = form_of(options), load_policy(options.policy)
    check_page(options.html)
    if options.candidate is None:
        return _of_ab(options)
    base, candidate = _read(options)
    report = compare(
        base,
        candidate,
        metrics=options.metric,
        all_metrics=options.all_metrics,
        limits_of=policy.limits_of,
        force=options.force,
    )
    from lorameter.report.comparison import describe_comparison, figures_of_comparison, title_of_report

    said = describe_comparison(report)
    if form == "json":
        print_json(document(report))
    else:
        from lorameter.report.annotations import comparison_annotations

        show_document(said, form, annotations=lambda: comparison_annotations(report), verbose=options.verbose)
    save_page(options.html, said, title_of_report(report), figures=figures_of_comparison(report))
    return exit_code(report.comparisons)


def run_gate(options: argparse.Namespace) -> int:
    """Print what the gate made of the comparison, in one of four formats."""
    import dataclasses

    from lorameter.verdicts.compare import compare
    from lorameter.verdicts.gate import gate_document, judge, load_policy

    form, policy = form_of(options), load_policy(options.policy)
    check_page(options.html)
    if options.candidate is None:
        return _of_ab(options)
    policy = dataclasses.replace(policy, metrics=tuple(options.metric) or policy.metrics)
    base, candidate = _read(options)
    report = compare(base, candidate, metrics=policy.metrics, limits_of=policy.limits_of)
    result = judge(report, policy)
    from lorameter.report.comparison import describe_gate, figures_of_comparison, title_of_report

    said = describe_gate(result)
    save_page(options.html, said, title_of_report(report), figures=figures_of_comparison(report))
    if form == "json":
        print_json(gate_document(result))
    else:
        from lorameter.report.annotations import gate_annotations

        show_document(said, form, annotations=lambda: gate_annotations(result), verbose=options.verbose)
    return result.exit_code


def _of_ab(options: argparse.Namespace) -> int:
    """The comparison that one run holds. Raises `UsageError` for a run that has one side."""
    from lorameter.commands.ab_report import show_ab
    from lorameter.records import store

    run = store.read_run(options.base, store.runs_dir(options.runs_dir))
    if not run.manifest.sides:
        raise UsageError(
            f"run {run.manifest.run} has one side, and nothing was named to compare it with. Name a CANDIDATE."
        )
    if getattr(options, "force", False) or getattr(options, "all_metrics", False):
        raise UsageError(f"run {run.manifest.run} is an A/B: --force and --all-metrics are for two runs.")
    return show_ab(run, options, metrics=options.metric)


def run_accept(options: argparse.Namespace) -> int:
    """Accept a run and say what it replaces."""
    from lorameter.records import codec, store
    from lorameter.verdicts.baselines import accept

    accepted, replaced = accept(options.run, store.runs_dir(options.runs_dir))
    if options.json:
        print_json({"accepted": codec.to_json(accepted), "replaced": codec.to_json(replaced)})
    else:
        instead = f" in place of {replaced.run}" if replaced else ""
        said = f"{accepted.run} is the baseline of {accepted.study}, fingerprint {accepted.fingerprint}{instead}"
        print(escape_control_chars(said))
    return EXIT_PASS


def _read(options: argparse.Namespace) -> tuple[ComparisonInput, ComparisonInput]:
    from lorameter.records import store
    from lorameter.verdicts.baselines import read_base, read_comparand

    runs = store.runs_dir(options.runs_dir)
    candidate = read_comparand(options.candidate, runs)
    gc.freeze()  # all of it is needed to the end: what reads the base need not look through it again and again
    base = read_base(options.base, runs, fingerprint=candidate.fingerprint, study=candidate.study)
    gc.freeze()
    return base, candidate
