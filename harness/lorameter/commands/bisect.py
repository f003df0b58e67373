"""What the command does that looks for the step that made it slower: `bisect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorameter.commands.options import add_options
from lorameter.commands.output import print_json
from lorameter.errors import EXIT_INCONCLUSIVE, EXIT_PASS, InvalidRunError, LorameterError, UsageError

if TYPE_CHECKING:
    from lorameter.records.store import Run
    from lorameter.stats import Comparison
    from lorameter.studies.study import Study

END_HELP = "a git revision of the repository in the current directory, or a release such as 'peft==0.19.0'"


def add_commands(commands: Any, common: Any) -> None:
    """The parser of `bisect`; `common` adds the options that every command has."""
    bisect = commands.add_parser(
        "bisect",
        help="find the commit or release that made it slower",
        description="Find the commit or release that introduced a slow-down: compare candidates between the good and "
        "the bad end with the good one, each in one interleaved job, by bisection.",
    )
    bisect.add_argument("study", metavar="STUDY", help="name of a built-in study, or a TOML file")
    bisect.add_argument("--good", metavar="REV|REQ", required=True, help=END_HELP)
    bisect.add_argument("--bad", metavar="REV|REQ", required=True, help="the same, later and slower")
    bisect.add_argument("--metric", metavar="M", default="step_time_s", help="default: step_time_s")
    bisect.add_argument("--variant", metavar="V", help="default: the reference of the study")
    bisect.add_argument("--effort", choices=("quick", "standard", "rigorous"), help="3, 8 or 12 replicates; default 8")
    add_options(bisect.add_argument, "replicates", "max-minutes", "allow-disturbed", "if-busy", "model", "data")
    bisect.add_argument("--resume", action="store_true", help="reuse finished comparisons in the runs directory")
    bisect.add_argument("--dry-run", action="store_true", help="list the candidates; measure nothing")
    common(bisect)
    bisect.set_defaults(command=run_bisect)


def run_bisect(options: argparse.Namespace) -> int:
    """Search and print; a step that is found is a pass, whatever stays open is inconclusive."""
    from lorameter.commands.ab import read_study
    from lorameter.records import codec
    from lorameter.records.metrics import METRICS
    from lorameter.report.comparison import describe_bisection
    from lorameter.report.terminal import console_for, show
    from lorameter.run.bisect import bisect, list_steps
    from lorameter.run.device_lock import hold_device
    from lorameter.run.workers import open_executor

    if options.metric not in METRICS:
        raise UsageError(f"--metric {options.metric}: no metric with an interval. Use one of {', '.join(METRICS)}.")
    study = read_study(options, open_executor().machine().kind)
    if study.of_scripts:
        raise UsageError(f"bisect: study {study.name} is of scripts. Compare two sides of one with `lorameter ab`.")
    variant = study.variant(options.variant or study.reference).name
    candidates = list_steps(options.good, options.bad, Path.cwd())
    if options.dry_run:
        if options.json:
            print_json({"candidates": codec.to_json(candidates)})
        else:
            from kernels_check.terminal import escape_control_chars

            print(escape_control_chars("\n".join(one.label for one in candidates)))
        return EXIT_PASS
    good = candidates[0].spec
    with hold_device(open_executor(), options.if_busy):

        def compare(side: str, replicates: int) -> Comparison:
            ends = side in (good, candidates[-1].spec)
            return _compared(study, variant, options, (good, side), replicates, must=ends)

        found = bisect(candidates, compare, replicates=study.protocol.replicates)
    if options.json:
        print_json({**codec.to_json(found), "found": found.found, "variant": variant, "metric": options.metric})
    else:
        title = METRICS[options.metric].title
        show(describe_bisection(found, f"{title} of {variant} in study {study.name}"), console_for())
    return EXIT_PASS if found.found else EXIT_INCONCLUSIVE


def _compared(
    study: Study, variant: str, options: argparse.Namespace, sides: tuple[str, str], replicates: int, *, must: bool
) -> Comparison:
    """One A/B of the good end and a candidate; `must`: whether one that cannot be put up ends the search."""
    import dataclasses

    from lorameter.records import store
    from lorameter.records.metrics import METRICS
    from lorameter.report.live import LiveDisplay
    from lorameter.report.terminal import console_for
    from lorameter.run.bisect import find_measured
    from lorameter.run.build_plan import build_plan
    from lorameter.run.measure import measure
    from lorameter.run.plan import SIDES
    from lorameter.run.workers import open_executor
    from lorameter.run.workers.sides import name_side
    from lorameter.verdicts.series import verdict_only

    study = dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, replicates=replicates))
    executor, runs = open_executor(), store.runs_dir(options.runs_dir, make=True)
    try:
        plan, notices = build_plan(
            study,
            executor.machine(),
            free_bytes=executor.free_bytes(),
            select=[variant],
            phases=(METRICS[options.metric].phase,),
            sides={name: name_side(spec, Path.cwd()) for name, spec in zip(SIDES, sides, strict=True)},
            runs=runs,
        )
        earlier = find_measured(plan, runs) if options.resume else None
        if earlier is not None:
            return _judged(earlier, options.metric)
        with LiveDisplay(console_for(stderr=True)) as display:
            run = measure(plan, runs=runs, display=display, notices=notices)
    except LorameterError as error:
        if must:
            raise
        return verdict_only("invalid", str(error))
    if run.manifest.status == "interrupted":
        raise InvalidRunError(
            f"run {run.manifest.run} was stopped, and so is the search: what was found is in its runs."
        )
    return _judged(run, options.metric)


def _judged(run: Run, metric: str) -> Comparison:
    from lorameter.verdicts.ab import report_of
    from lorameter.verdicts.series import verdict_only

    compared = report_of(run, metrics=[metric]).comparisons
    return compared[0] if compared else verdict_only("invalid", f"run {run.manifest.run}: no number")
