"""The commands that ask what this machine can see and where a slow-down began: `calibrate` and `bisect`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from kernels_check.terminal import escape_control_chars
from lorameter.commands.measure import measure_study, resume
from lorameter.commands.options import CALIBRATED_STUDY, CALIBRATION_REPLICATES
from lorameter.commands.output import print_json
from lorameter.commands.run import AB_OPTIONS, read_study
from lorameter.errors import EXIT_INCONCLUSIVE, EXIT_INVALID, EXIT_PASS, InvalidRunError, LorameterError, UsageError
from lorameter.records import codec, store
from lorameter.records.metrics import METRICS, PRIMARY
from lorameter.records.store import Run
from lorameter.report.comparison import describe_bisection
from lorameter.report.live import LiveDisplay
from lorameter.report.machine import describe_calibration
from lorameter.report.terminal import console_for, show
from lorameter.run.bisect import bisect, find_measured, list_steps
from lorameter.run.build_plan import build_plan
from lorameter.run.device_lock import hold_device
from lorameter.run.measure import measure
from lorameter.run.plan import SIDES
from lorameter.run.resume import INJECTED, is_calibration, study_of
from lorameter.run.sites.placement import Placement, open_placement
from lorameter.run.workers import open_executor
from lorameter.run.workers.sides import name_side, present_sides
from lorameter.stats import Comparison
from lorameter.studies.placement import HERE, say_on
from lorameter.studies.study import Study
from lorameter.verdicts.ab import report_of
from lorameter.verdicts.calibrate import INJECTED as INJECTED_SHARE
from lorameter.verdicts.calibrate import LEAST_TO_CALIBRATE, MOST_ROWS, PILOT_ROWS, calibrate, rows_for
from lorameter.verdicts.series import compare_series, group_trials, is_difference, verdict_only


def run_calibrate(options: argparse.Namespace) -> int:
    """Size the slow-down by a pilot, measure, print what the gate can see here."""
    if options.resume:
        return _calibrate_on(options)
    options.study = options.study or CALIBRATED_STUDY
    if options.inject_rows is not None and not 1 <= options.inject_rows <= MOST_ROWS:
        raise UsageError(
            f"--inject-rows = {options.inject_rows}: no amount of work. Use 1 to {MOST_ROWS}, or leave it out."
        )
    if len(options.variant) > 1:
        raise UsageError(
            f"--variant: {', '.join(options.variant)}: a calibration measures one variant. Give one of them."
        )
    study = read_study(options, open_executor().machine().kind, CALIBRATION_REPLICATES)
    if study.protocol.mixed:
        raise UsageError(f"study {study.name}: mixed: a calibration is of one kind of machine. Take it out.")
    if study.protocol.on != HERE:
        raise UsageError(
            f"{say_on(study.protocol.on)}: a calibration is of the machine that it is started on, whose sites it may "
            "take. Start it on a node, with --on here."
        )
    if study.protocol.replicates < LEAST_TO_CALIBRATE:
        raise UsageError(
            f"{study.protocol.replicates} replicates: gates are drawn from them, which takes {LEAST_TO_CALIBRATE} or "
            f"more. Raise --replicates; {CALIBRATION_REPLICATES} is the default."
        )
    # Every replicate is wanted: a run that stopped at its precision would have too few to draw from.
    study = dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, precision=None))
    variant = study.variant(options.variant[0]) if options.variant else study.variant(study.reference)
    rows = options.inject_rows
    with open_placement(study, options.runs_dir) as placement:
        if rows is None:
            pilot = dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, replicates=3))
            seen = []
            for count in PILOT_ROWS:
                run = _measured_here(pilot, variant.name, count, placement, options)
                _require_whole(run, "it sizes the slow-down of a calibration. Calibrate anew")
                seen.append(calibration_ratio(run, variant.name))
            rows = rows_for(INJECTED_SHARE, *seen)
        run = _measured_here(study, variant.name, rows, placement, options)
    return _show_calibration(run, options)


def _calibrate_on(options: argparse.Namespace) -> int:
    """Resume an interrupted calibration; one of which nothing is left is shown as it is."""
    run = store.read_run(options.resume, store.runs_dir(options.runs_dir))
    name = run.manifest.run
    if not is_calibration(run.manifest):
        raise UsageError(f"run {name} is no calibration. Resume: lorameter run --resume {name}")
    if study_of(run).protocol.replicates < LEAST_TO_CALIBRATE:
        raise UsageError(f"run {name} sized the slow-down of a calibration, and is none itself. Calibrate anew.")
    whole = resume(options, [one for one in AB_OPTIONS if hasattr(options, one.replace("-", "_"))], ab=True)
    assert whole is not None  # that is the answer to --dry-run, which there is none of here
    return _show_calibration(whole, options)


def _require_whole(run: Run, then: str) -> None:
    """Raises `InvalidRunError` where a run was stopped, so that no further one begins."""
    if run.manifest.status != "complete":
        raise InvalidRunError(f"run {run.manifest.run} was stopped, and what it had measured is kept: {then}.")


def _show_calibration(run: Run, options: argparse.Namespace) -> int:
    """Print what the gate can see, as this run shows; the exit code says whether the machine measures anything now."""
    name = run.manifest.run
    _require_whole(run, f"resume: lorameter calibrate --resume {name}")
    result = calibrate(run, study_of(run).variant(run.manifest.selection[0]))
    rows = run.manifest.sides["candidate"][INJECTED]
    if options.json:
        print_json({"calibration": codec.to_json(result), "inject_rows": rows})
    else:
        show(describe_calibration(result, rows), console_for())
    return EXIT_INVALID if is_difference(result.identical) else EXIT_PASS  # of identical code


def calibration_ratio(run: Run, name: str) -> float:
    """The candidate's step time over the base's in a pilot. Raises `InvalidRunError` where it was not measured."""
    base, candidate = (group_trials(run.records, side).get((name, "variant")) for side in ("base", "candidate"))
    found = compare_series(base, candidate, PRIMARY["train"]) if base and candidate else None
    if found is None or found.ratio is None:
        raise InvalidRunError(f"run {run.manifest.run}: the pilot measured nothing; see its report.")
    return found.ratio


def _measured_here(study: Study, name: str, rows: int, placement: Placement, options: argparse.Namespace) -> Run:
    """An A/B of the present interpreter with itself, the candidate with extra work; training only."""
    run = measure_study(study, placement, options, select=[name], phases=("train",), sides=present_sides(rows))
    assert run is not None  # that is the answer to --dry-run, which there is none of here
    return run


def run_bisect(options: argparse.Namespace) -> int:
    """Search and print; a step that is found is a pass, whatever stays open is inconclusive."""
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
    compared = report_of(run, metrics=[metric]).comparisons
    return compared[0] if compared else verdict_only("invalid", f"run {run.manifest.run}: no number")
