"""The commands that read stored runs: `report`, `claims`, `sample`, `compare`, `gate` and `accept`."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

from lorameter.commands.output import print_result, show_result
from lorameter.errors import EXIT_INVALID, EXIT_PASS, require
from lorameter.records import codec, store
from lorameter.records.store import Run
from lorameter.report.annotations import claims_annotations, comparison_annotations, run_annotations
from lorameter.report.blocks import Document, Section, to_line
from lorameter.report.comparison import (
    comparison_title,
    describe_attribution,
    describe_claims,
    describe_comparison,
    describe_gate,
    describe_verdicts,
    draw_comparison_figures,
)
from lorameter.report.figures import draw_run_figures
from lorameter.report.parity import describe_samples, read_samples
from lorameter.report.reproduce import reproduction_steps
from lorameter.report.run import describe_run, encode_run
from lorameter.report.run_view import ReportFilter, RunView, make_run_view
from lorameter.verdicts import claims
from lorameter.verdicts.ab import attribute_difference, build_report
from lorameter.verdicts.compare import (
    ComparisonInput,
    ComparisonReport,
    compare,
    comparison_document,
    exit_code,
)
from lorameter.verdicts.gate import accept, gate_document, judge, load_policy, read_base, read_comparand, stored_policy
from lorameter.verdicts.series import is_mixed


def run_report(options: argparse.Namespace) -> int:
    """Print the report of a run, complete or not. For an A/B run, print the gate's report under the run's policy."""
    run = _read_run(options.run or store.latest_run(store.runs_dir(options.runs_dir)), options)
    gc.freeze()  # the run is needed until the end, and the garbage collector would take seconds to scan a large one
    if run.manifest.sides:
        require(
            not (options.variant or options.phase) and options.sort == "study",
            f"run {run.manifest.run} is an A/B, whose verdict is over all of its comparisons: --variant, --phase and "
            "--sort are for other runs. Leave them out; --metric selects metrics.",
        )
        return show_ab(run, options)
    view = make_run_view(
        run,
        ReportFilter(
            metrics=tuple(options.metric),
            variants=tuple(options.variant),
            phases=tuple(options.phase),
            sort=options.sort,
            limits_of=load_policy(options.policy).limits_of,
        ),
    )
    return show_run(view, options, lambda: encode_run(view))


def _read_run(name: str, options: argparse.Namespace) -> Run:
    return store.read_run(name, store.runs_dir(options.runs_dir))


def show_run(view: RunView, options: argparse.Namespace, data: Callable[[], dict[str, Any]]) -> int:
    """Print the report of a run that compares variants; the exit code says whether the run is valid."""
    report = describe_with_claims(view)
    show_result(
        options,
        report,
        data,
        annotations=lambda: run_annotations(view),
        page=lambda: make_run_page(view),
    )
    return EXIT_PASS if view.valid else EXIT_INVALID


def make_run_page(view: RunView) -> dict[str, Any]:
    """Return the title, the variants, the figures and the reproduction commands of a run's page."""
    return {
        "title": view.study.headline,
        "names": view.variants,
        "figures": draw_run_figures(view),
        "reproduction": reproduction_steps(view.run),
    }


def describe_with_claims(view: RunView) -> Document:
    """The report, with the verdicts on the claims of the study, if it has any."""
    report = describe_run(view)
    if not view.study.claims or is_mixed(view.run):  # a claim applies to one kind of machine
        return report
    if view.valid:
        return report + describe_verdicts(claims.judge_claims(view.run))
    command = f"`lorameter claims {view.run.manifest.run}`"
    why = f"not judged: the run is invalid. {command} judges them by the trials that there are."
    return (*report, Section(title="Claims", lines=(to_line(why),)))


def show_ab(run: Run, options: argparse.Namespace) -> int:
    """Print an A/B run; the exit code combines all its verdicts under the policy. The default is the policy that was
    chosen when the run was measured.

    Args:
        run: a run with two sides.
        options: format, policy, and metrics to judge in place of those of the policy.
    """
    values = vars(options)
    policy = load_policy(values["policy"]) if values.get("policy") else stored_policy(run)
    policy = dataclasses.replace(policy, metrics=tuple(values.get("metric", ())) or policy.metrics)
    report = build_report(run, metrics=policy.metrics, limits_of=policy.limits_of, losses=policy.losses == "agree")
    result = judge(report, policy)
    attribution, manifest = attribute_difference(run), run.manifest
    about = {"run": manifest.run, "path": str(run.path), "interleaving": manifest.interleaving}
    show_result(
        options,
        describe_gate(result) + describe_attribution(attribution, run),
        lambda: {**gate_document(result), **about, "attribution": codec.to_json(attribution)},
        annotations=lambda: comparison_annotations(report, result),
        page=lambda: {
            "title": f"{manifest.study['title']}: A/B",
            "figures": draw_comparison_figures(report),
            "reproduction": reproduction_steps(run),
        },
    )
    return result.exit_code


def run_compare(options: argparse.Namespace) -> int:
    """Print the comparison. The exit code depends on its verdicts; a policy only sets the limits."""
    require(
        not (options.metric and options.all_metrics),
        "--metric and --all-metrics both choose the metrics. Give one of them.",
    )
    policy = load_policy(options.policy)
    if options.candidate is None:
        return _show_both_sides(options)
    report = compare(
        *_read_sides(options),
        metrics=options.metric,
        all_metrics=options.all_metrics,
        limits_of=policy.limits_of,
        force=options.force,
    )
    show_result(
        options,
        describe_comparison(report),
        lambda: comparison_document(report),
        annotations=lambda: comparison_annotations(report),
        page=lambda: _make_comparison_page(report),
    )
    return exit_code(report.comparisons)


def run_gate(options: argparse.Namespace) -> int:
    """Print whether the comparison passes the policy, and why."""
    policy = load_policy(options.policy)
    if options.candidate is None:
        return _show_both_sides(options)
    policy = dataclasses.replace(policy, metrics=tuple(options.metric) or policy.metrics)
    report = compare(*_read_sides(options), metrics=policy.metrics, limits_of=policy.limits_of)
    result = judge(report, policy)
    show_result(
        options,
        describe_gate(result),
        lambda: gate_document(result),
        annotations=lambda: comparison_annotations(report, result),
        page=lambda: _make_comparison_page(report),
    )
    return result.exit_code


def _make_comparison_page(report: ComparisonReport) -> dict[str, Any]:
    return {"title": comparison_title(report), "figures": draw_comparison_figures(report)}


def _show_both_sides(options: argparse.Namespace) -> int:
    """Print the comparison of the two sides of one run. Raises `UsageError` for a run that has one side."""
    run = _read_run(options.base, options)
    name, values = run.manifest.run, vars(options)
    require(run.manifest.sides, f"run {name} has one side, so it needs a second run to compare with. Name a CANDIDATE.")
    require(
        not (values.get("force") or values.get("all_metrics")),
        f"run {name} is an A/B: --force and --all-metrics are for two runs.",
    )
    return show_ab(run, options)


def _read_sides(options: argparse.Namespace) -> tuple[ComparisonInput, ComparisonInput]:
    runs = store.runs_dir(options.runs_dir)
    candidate = read_comparand(options.candidate, runs)
    gc.freeze()  # the candidate is needed until the end: the garbage collector need not scan it while the base is read
    base = read_base(options.base, runs, fingerprint=candidate.fingerprint, study=candidate.study)
    gc.freeze()
    return base, candidate


def run_accept(options: argparse.Namespace) -> int:
    """Accept a run and print the baseline that it replaces."""
    accepted, replaced = accept(options.run, store.runs_dir(options.runs_dir))
    instead = f" in place of {replaced.run}" if replaced else ""
    report = f"{accepted.run} is the baseline of {accepted.study}, fingerprint {accepted.fingerprint}{instead}"
    print_result(options, report, {"accepted": accepted, "replaced": replaced})
    return EXIT_PASS


def run_claims(options: argparse.Namespace) -> int:
    """Print the verdicts on the claims. They are findings, not failures, so no verdict changes the exit code."""
    report = claims.judge_claims(_read_run(options.run, options))
    show_result(
        options,
        describe_claims(report),
        lambda: codec.to_json(report),
        annotations=lambda: claims_annotations(report),
        page=lambda: {"title": f"Claims of {options.run}"},
    )
    return EXIT_PASS if report.valid else EXIT_INVALID


def run_sample(options: argparse.Namespace) -> int:
    """Print the prompts of a variant with the answers that it generated."""
    require(
        options.count is None or options.count >= 1,
        f"--count = {options.count}: no answers to show. Use 1 or more, or leave it out for all.",
    )
    run = _read_run(options.run, options)
    samples = read_samples(run, options.variant, replicate=options.replicate, count=options.count)
    title = f"{options.variant}, replicate {options.replicate}, {run.manifest.study['workload']['model']}"
    about = {"run": run.manifest.run, "variant": options.variant, "replicate": options.replicate}
    show_result(options, describe_samples(samples, title), lambda: {**about, "samples": samples})
    return EXIT_PASS
