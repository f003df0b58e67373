"""The commands that show a run: `report`, `claims` and `sample`; an A/B as `ab`, `compare` and `gate` show it."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import gc
from collections.abc import Callable, Sequence

import msgspec

from lorameter.commands.output import check_page, form_of, print_json, save_page, save_run_page, show_document
from lorameter.errors import EXIT_INVALID, EXIT_PASS, UsageError
from lorameter.records import codec, store
from lorameter.records.store import Run
from lorameter.report.annotations import annotation, claims_annotations, gate_annotations, run_annotations
from lorameter.report.blocks import Document, Section, say
from lorameter.report.claims import describe_claims, describe_verdicts
from lorameter.report.comparison import (
    MatrixRun,
    describe_attribution,
    describe_gate,
    describe_matrix,
    encode_matrix,
    figures_of_comparison,
)
from lorameter.report.reproduce import reproduction_steps
from lorameter.report.run import describe_run, encode_run
from lorameter.report.run_view import ReportFilter, RunView, phase_of, view_of
from lorameter.report.sample import describe_samples, read_samples
from lorameter.report.terminal import console_for, show
from lorameter.studies.from_run import read_study
from lorameter.studies.study import unknown
from lorameter.verdicts.ab import attribution_of, report_of
from lorameter.verdicts.claims import document, judge_claims
from lorameter.verdicts.compare import ComparisonRow, worst
from lorameter.verdicts.gate import GateResult, gate_document, judge, kept_policy, load_policy
from lorameter.verdicts.sites import is_mixed


def run_report(options: argparse.Namespace) -> int:
    """Print the report of a run, whole or not; of an A/B the gate's, by the policy that it was judged by."""
    form, folder = form_of(options), store.runs_dir(options.runs_dir)
    check_page(options.html)
    if len(options.run) > 1:
        runs = [store.read_run(name, folder) for name in options.run]
        return show_matrix(runs, options, _filter(options, *runs))
    run = store.read_run(options.run[0], folder)
    gc.freeze()  # all of it is needed to the end, and looking through a large run for what is not takes seconds
    if run.manifest.sides:
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
    document = document_of(run, view)
    show_document(document, form, annotations=lambda: run_annotations(view), verbose=verbose)


def document_of(run: Run, view: RunView) -> Document:
    """All that is said of a run that compares variants."""
    document = describe_run(view)
    # A claim is of one kind of machine, and the notices say what this is.
    if not read_study(run).claims or is_mixed(run):
        return document
    if view.valid:
        return document + describe_verdicts(judge_claims(run))

    command = f"`lorameter claims {run.manifest.run}`"
    said = f"not judged: the run is invalid. {command} judges them by the trials that there are."
    return (*document, Section(title="Claims", lines=(say(said),)))


def _asked(options: argparse.Namespace) -> ReportFilter:
    return ReportFilter(
        metrics=tuple(options.metric),
        variants=tuple(options.variant),
        phases=tuple(options.phase),
        sort=options.sort,
        limits_of=load_policy(options.policy).limits_of,
    )


def show_ab(
    run: Run,
    options: argparse.Namespace,
    *,
    metrics: Sequence[str] = (),
    keep: Callable[[ComparisonRow], bool] = lambda compared: True,
) -> int:
    """Print an A/B run in the format asked for; the exit code is that of its verdicts under the policy, which is the
    one that it was measured for unless another is given.

    Args:
        run: a run with two sides.
        options: format and policy.
        metrics: what to judge in place of the metrics of the policy.
        keep: which comparisons are shown; the exit code is that of all.
    """
    form, result = form_of(options), judge_run(run, options, metrics)
    whole = result.report
    shown = tuple(filter(keep, whole.comparisons))
    result = dataclasses.replace(result, report=msgspec.structs.replace(whole, comparisons=shown))

    attribution = attribution_of(run)
    said = describe_gate(result, ab=True) + describe_attribution(attribution, run)
    title, figures = f"{run.manifest.study['title']}: A/B", figures_of_comparison(result.report)
    if html := getattr(options, "html", None):
        save_page(html, said, title, figures=figures, again=reproduction_steps(run))
    if form == "json":
        about = {"run": run.manifest.run, "path": str(run.path), "interleaving": run.manifest.interleaving}
        print_json({**gate_document(result), **about, "attribution": codec.to_json(attribution)})
        return result.exit_code

    verbose = getattr(options, "verbose", False)
    show_document(said, form, annotations=lambda: gate_annotations(result), verbose=verbose)
    return result.exit_code


def judge_run(run: Run, options: argparse.Namespace, metrics: Sequence[str] = ()) -> GateResult:
    """The verdicts of an A/B run by the policy given, or by its own. Raises `UsageError` for a run without sides."""
    given = getattr(options, "policy", None)
    policy = load_policy(given) if given else kept_policy(run)
    policy = dataclasses.replace(policy, metrics=tuple(metrics) or policy.metrics)
    found = report_of(run, metrics=policy.metrics, limits_of=policy.limits_of, losses=policy.losses == "agree")
    return judge(found, policy)


def show_matrix(
    runs: Sequence[Run], options: argparse.Namespace, keep: Callable[[ComparisonRow], bool] = lambda compared: True
) -> int:
    """Several A/B runs in one table, studies by changes of versions; the exit code is the worst of them, of all that
    they compare, whatever of it is kept in the table."""
    form = form_of(options)
    results = [judge_run(run, options, options.metric) for run in runs]
    shown = [
        msgspec.structs.replace(result.report, comparisons=tuple(filter(keep, result.report.comparisons)))
        for result in results
    ]
    changes = [
        MatrixRun(run=run.manifest.run, study=str(run.manifest.study["name"]), report=report)
        for run, report in zip(runs, shown, strict=True)
    ]
    said = describe_matrix(changes)
    save_page(options.html, said, f"{len(runs)} A/B runs")
    code = worst(result.exit_code for result in results)
    if form == "json":
        print_json({"matrix": encode_matrix(changes), "exit": code})
        return code
    noted = annotation("notice" if code == 0 else "error", "lorameter report", f"{len(runs)} A/B runs: exit {code}")
    show_document(said, form, annotations=lambda: f"{noted}\n", verbose=options.verbose)
    return code


def run_claims(options: argparse.Namespace) -> int:
    """Print the verdicts; they are findings, not failures, so any of them is a pass."""
    form = form_of(options)
    check_page(options.html)
    report = judge_claims(store.read_run(options.run, store.runs_dir(options.runs_dir)))

    said = describe_claims(report)
    if form == "json":
        print_json(document(report))
    else:
        show_document(said, form, annotations=lambda: claims_annotations(report), verbose=options.verbose)
    save_page(options.html, said, f"Claims of {options.run}")
    return EXIT_PASS if report.valid else EXIT_INVALID


def run_sample(options: argparse.Namespace) -> int:
    """Print the answers."""
    if options.count is not None and options.count < 1:
        raise UsageError(f"--count = {options.count}: no answers to show. Use 1 or more, or leave it out for all.")
    run = store.read_run(options.run, store.runs_dir(options.runs_dir))
    samples = read_samples(run, options.variant, replicate=options.replicate, count=options.count)
    if options.json:
        about = {"run": run.manifest.run, "variant": options.variant, "replicate": options.replicate}
        print_json({**about, "samples": codec.to_json(samples)})
        return EXIT_PASS

    title = f"{options.variant}, replicate {options.replicate}, {run.manifest.study['workload']['model']}"
    show(describe_samples(samples, title), console_for())
    return EXIT_PASS
