"""What the commands do that show an A/B run: `ab` itself, and `report`, `compare` and `gate` of a stored one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from lorameter.commands.output import form_of, print_json, show_document
from lorameter.commands.page import save_page

if TYPE_CHECKING:
    from lorameter.records.store import Run
    from lorameter.verdicts.comparison_report import ComparisonRow
    from lorameter.verdicts.gate import GateResult


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
    import dataclasses

    from lorameter.records import codec
    from lorameter.verdicts.ab import attribution_of
    from lorameter.verdicts.gate import gate_document

    form, result = form_of(options), judge_run(run, options, metrics)
    whole = result.report
    shown = tuple(filter(keep, whole.comparisons))
    result = dataclasses.replace(result, report=msgspec.structs.replace(whole, comparisons=shown))
    from lorameter.report.comparison import describe_attribution, describe_gate, figures_of_comparison

    attribution = attribution_of(run)
    said = describe_gate(result, ab=True) + describe_attribution(attribution, run)
    title, figures = f"{run.manifest.study['title']}: A/B", figures_of_comparison(result.report)
    if html := getattr(options, "html", None):
        from lorameter.report.reproduce import reproduction_steps

        save_page(html, said, title, figures=figures, again=reproduction_steps(run))
    if form == "json":
        about = {"run": run.manifest.run, "path": str(run.path), "interleaving": run.manifest.interleaving}
        print_json({**gate_document(result), **about, "attribution": codec.to_json(attribution)})
        return result.exit_code
    from lorameter.report.annotations import gate_annotations

    verbose = getattr(options, "verbose", False)
    show_document(said, form, annotations=lambda: gate_annotations(result), verbose=verbose)
    return result.exit_code


def judge_run(run: Run, options: argparse.Namespace, metrics: Sequence[str] = ()) -> GateResult:
    """The verdicts of an A/B run by the policy given, or by its own. Raises `UsageError` for a run without sides."""
    import dataclasses

    from lorameter.verdicts.ab import report_of
    from lorameter.verdicts.gate import judge, kept_policy, load_policy

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
    from lorameter.report.annotations import annotation
    from lorameter.report.comparison import MatrixRun, describe_matrix, encode_matrix
    from lorameter.verdicts.comparison_report import worst

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
