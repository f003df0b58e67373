"""The commands `calibrate` and `bisect`: what this machine can detect, and where a slow-down began."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorameter.commands.options import CALIBRATED_STUDY, CALIBRATION_REPLICATES
from lorameter.commands.output import print_result, show_result
from lorameter.commands.run import apply_overrides, find_interrupted, measure_study, plan_study, resume
from lorameter.errors import (
    EXIT_INCONCLUSIVE,
    EXIT_INVALID,
    EXIT_PASS,
    InvalidRunError,
    LorameterError,
    require,
)
from lorameter.machine.products import make_target
from lorameter.measurements.metrics import METRICS, PRIMARY
from lorameter.records import codec, store
from lorameter.records.record import SIDES
from lorameter.records.store import Run
from lorameter.report.comparison import describe_bisection
from lorameter.report.estimate import describe_calibration
from lorameter.run.bisect import bisect, find_earlier_run, list_steps
from lorameter.run.build_plan import PlanOptions
from lorameter.run.resume import is_calibration
from lorameter.run.sites.placement import Placement, open_placement
from lorameter.run.workers import open_executor
from lorameter.run.workers.sides import name_side, present_sides
from lorameter.stats import Comparison
from lorameter.studies.protocol import HERE, format_on
from lorameter.studies.study import Study
from lorameter.studies.study_file import load_study, read_study
from lorameter.verdicts.ab import build_report
from lorameter.verdicts.calibrate import INJECTED, MAX_ROWS, MIN_TO_CALIBRATE, PILOT_ROWS, calibrate, rows_for_slowdown
from lorameter.verdicts.series import compare_series, group_trials, is_difference


def run_calibrate(options: argparse.Namespace) -> int:
    """Determine the size of the injected slow-down with a pilot, measure, and print the rates of the gate on this
    machine."""
    if options.resume:
        return _resume_calibration(options)
    rows = options.inject_rows
    require(
        rows is None or 1 <= rows <= MAX_ROWS,
        f"--inject-rows = {rows}: not a valid amount of work. Use 1 to {MAX_ROWS}, or omit it.",
    )
    study, variant = _load_calibrated(options)
    counts = [*(3 for _ in PILOT_ROWS if rows is None), study.protocol.replicates]
    minutes = study.protocol.max_minutes  # of all runs together, which share it by their replicates
    *pilots, study = (
        study.with_protocol(replicates=count, max_minutes=minutes and minutes * count / sum(counts)) for count in counts
    )
    with open_placement(study, options.runs_dir) as placement:
        if rows is None:
            ratios = [
                _measure_pilot(pilot, variant, count, placement, options)
                for pilot, count in zip(pilots, PILOT_ROWS, strict=True)
            ]
            rows = rows_for_slowdown(INJECTED, *ratios)
        return _show_calibration(_measure_injected(study, variant, rows, placement, options), options)


def _load_calibrated(options: argparse.Namespace) -> tuple[Study, str]:
    """The study for the calibration and its variant. Raises `UsageError` if it is not suitable."""
    study = load_study(options.study or CALIBRATED_STUDY, target=make_target(open_executor().machine()))
    study = apply_overrides(study, options, replicates=CALIBRATION_REPLICATES)
    require(
        not study.protocol.mixed,
        f"study {study.name}: mixed: a calibration needs machines of one kind. Remove the key.",
    )
    require(
        study.protocol.on == HERE,
        f"{format_on(study.protocol.on)}: a calibration is of the machine that it is started on, and may use "
        "its sites. Start it on a node, with --on here.",
    )
    require(
        study.protocol.replicates >= MIN_TO_CALIBRATE,
        f"{study.protocol.replicates} replicates: simulated gates sample them, which needs {MIN_TO_CALIBRATE} or "
        f"more. Raise --replicates; {CALIBRATION_REPLICATES} is the default.",
    )
    variant = study.variant(options.variant or study.reference)
    # All replicates are needed: a run that stopped early would have too few for subsets.
    return study.with_protocol(precision=None, until_decided=False), variant.name


def _measure_injected(study: Study, variant: str, rows: int, placement: Placement, options: argparse.Namespace) -> Run:
    """Measure an A/B of the current interpreter with itself, with extra work in the candidate; training only."""
    wanted = PlanOptions(select=[variant], phases=("train",), sides=present_sides(rows))
    return measure_study(study, placement, options, wanted)


def _measure_pilot(study: Study, variant: str, rows: int, placement: Placement, options: argparse.Namespace) -> float:
    """The slow-down caused by this many rows. Raises `InvalidRunError` if the pilot did not complete or
    measured nothing."""
    run = _measure_injected(study, variant, rows, placement, options)
    _require_whole(run, "it determines the slow-down of a calibration. Start a new calibration")
    base, candidate = (group_trials(run.records, side).get((variant, "variant")) for side in SIDES)
    comparison = compare_series(base, candidate, PRIMARY["train"]) if base and candidate else None
    if comparison is None or comparison.ratio is None:
        raise InvalidRunError(f"run {run.manifest.run}: the pilot measured nothing; see its report.")
    return comparison.ratio


def _resume_calibration(options: argparse.Namespace) -> int:
    run = store.read_run(options.resume, store.runs_dir(options.runs_dir))
    name = run.manifest.run
    require(is_calibration(run.manifest), f"run {name} is not a calibration. Use: lorameter run --resume {name}")
    require(
        read_study(run).protocol.replicates >= MIN_TO_CALIBRATE,
        f"run {name} determined the slow-down of a calibration, but is not a calibration. Start a new one.",
    )
    return _show_calibration(resume(find_interrupted(options), options), options)


def _require_whole(run: Run, then: str) -> None:
    """Raise `InvalidRunError` if a run was stopped, so that no further run begins."""
    if run.manifest.status != "complete":
        raise InvalidRunError(f"run {run.manifest.run} was stopped, and what it had measured is kept: {then}.")


def _show_calibration(run: Run, options: argparse.Namespace) -> int:
    """Print the rates of the gate from this run; the exit code says whether identical code was measured as equal."""
    _require_whole(run, f"resume: lorameter calibrate --resume {run.manifest.run}")
    result = calibrate(run, read_study(run).variant(run.manifest.selection[0]))
    rows = run.manifest.sides["candidate"]["slowdown_rows"]
    show_result(options, describe_calibration(result, rows), lambda: {"calibration": result, "inject_rows": rows})
    return EXIT_INVALID if is_difference(result.identical) else EXIT_PASS  # identical code


def run_bisect(options: argparse.Namespace) -> int:
    """Search and print; finding the step is a pass, any other result is inconclusive."""
    require(
        options.metric in METRICS,
        f"--metric {options.metric}: no metric with an interval. Use one of {', '.join(METRICS)}.",
    )
    study = load_study(options.study, target=make_target(open_executor().machine()))
    study = apply_overrides(study, options, effort="standard")
    require(
        study.supports("built"),
        f"bisect: study {study.name} is of scripts or other processes. Compare two sides of one with `lorameter ab`.",
    )
    variant = study.variant(options.variant or study.reference).name
    candidates = list_steps(options.good, options.bad, Path.cwd())
    if options.dry_run:
        print_result(options, "\n".join(one.label for one in candidates), {"candidates": candidates})
        return EXIT_PASS
    good, bad = candidates[0].spec, candidates[-1].spec

    def compare(side: str, replicates: int) -> Comparison:
        try:
            run = _measure_sides(study.with_protocol(replicates=replicates), variant, (good, side), options)
        except LorameterError as error:
            if side in (good, bad):
                raise
            return Comparison(verdict="invalid", reason=str(error))
        if run.manifest.status == "interrupted":
            raise InvalidRunError(
                f"run {run.manifest.run} was stopped, and the search with it; the finished comparisons are kept."
            )
        compared = build_report(run, metrics=[options.metric]).comparisons
        return compared[0] if compared else Comparison(verdict="invalid", reason=f"run {run.manifest.run}: no value")

    bisection = bisect(candidates, compare, replicates=study.protocol.replicates)
    title = f"{METRICS[options.metric].title} of {variant} in study {study.name}"
    about = {"found": bisection.found, "variant": variant, "metric": options.metric}
    show_result(options, describe_bisection(bisection, title), lambda: {**codec.to_json(bisection), **about})
    return EXIT_PASS if bisection.found else EXIT_INCONCLUSIVE


def _measure_sides(study: Study, variant: str, sides: tuple[str, str], options: argparse.Namespace) -> Run:
    """Measure one A/B of two candidates; with --resume, reuse an earlier one with the same plan."""
    placement, runs = Placement(), store.runs_dir(options.runs_dir, make=True)
    wanted = PlanOptions(
        select=[variant],
        phases=(METRICS[options.metric].phase,),
        sides={name: name_side(spec, Path.cwd()) for name, spec in zip(SIDES, sides, strict=True)},
    )
    if options.resume:
        plan, _ = plan_study(study, placement, runs, wanted)
        if (earlier := find_earlier_run(plan, runs)) is not None:
            return earlier
    return measure_study(study, placement, options, wanted)
