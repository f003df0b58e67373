"""What the commands that judge one side by another do: `compare`, `gate` and `accept`."""

from __future__ import annotations

import argparse
import dataclasses
import gc

from kernels_check.terminal import escape_control_chars
from lorameter.commands.output import check_page, form_of, print_json, save_page, show_document
from lorameter.commands.report import show_ab
from lorameter.errors import EXIT_PASS, UsageError
from lorameter.records import codec, store
from lorameter.report.annotations import comparison_annotations, gate_annotations
from lorameter.report.comparison import describe_comparison, describe_gate, figures_of_comparison, title_of_report
from lorameter.verdicts.baselines import accept, read_base, read_comparand
from lorameter.verdicts.compare import compare, document, exit_code
from lorameter.verdicts.comparison_input import ComparisonInput
from lorameter.verdicts.gate import gate_document, judge, load_policy


def run_compare(options: argparse.Namespace) -> int:
    """Print the comparison; the exit code is that of its verdicts, which a policy gives limits alone."""
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

    said = describe_comparison(report)
    if form == "json":
        print_json(document(report))
    else:
        show_document(said, form, annotations=lambda: comparison_annotations(report), verbose=options.verbose)
    save_page(options.html, said, title_of_report(report), figures=figures_of_comparison(report))
    return exit_code(report.comparisons)


def run_gate(options: argparse.Namespace) -> int:
    """Print what the gate made of the comparison, in one of four formats."""
    form, policy = form_of(options), load_policy(options.policy)
    check_page(options.html)
    if options.candidate is None:
        return _of_ab(options)
    policy = dataclasses.replace(policy, metrics=tuple(options.metric) or policy.metrics)
    base, candidate = _read(options)
    report = compare(base, candidate, metrics=policy.metrics, limits_of=policy.limits_of)
    result = judge(report, policy)

    said = describe_gate(result)
    save_page(options.html, said, title_of_report(report), figures=figures_of_comparison(report))
    if form == "json":
        print_json(gate_document(result))
    else:
        show_document(said, form, annotations=lambda: gate_annotations(result), verbose=options.verbose)
    return result.exit_code


def _of_ab(options: argparse.Namespace) -> int:
    """The comparison that one run holds. Raises `UsageError` for a run that has one side."""
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
    accepted, replaced = accept(options.run, store.runs_dir(options.runs_dir))
    if options.json:
        print_json({"accepted": codec.to_json(accepted), "replaced": codec.to_json(replaced)})
    else:
        instead = f" in place of {replaced.run}" if replaced else ""
        said = f"{accepted.run} is the baseline of {accepted.study}, fingerprint {accepted.fingerprint}{instead}"
        print(escape_control_chars(said))
    return EXIT_PASS


def _read(options: argparse.Namespace) -> tuple[ComparisonInput, ComparisonInput]:
    runs = store.runs_dir(options.runs_dir)
    candidate = read_comparand(options.candidate, runs)
    gc.freeze()  # all of it is needed to the end: what reads the base need not look through it again and again
    base = read_base(options.base, runs, fingerprint=candidate.fingerprint, study=candidate.study)
    gc.freeze()
    return base, candidate
