"""What the commands that measure two sides in one job do: `ab` and `calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorameter.commands.ab_report import show_ab
from lorameter.commands.ab_scripts import add_script_options, study_of_options
from lorameter.commands.options import add_options
from lorameter.commands.output import form_of, print_json
from lorameter.commands.page import check_page
from lorameter.commands.plan import show_plan
from lorameter.errors import EXIT_INVALID, EXIT_PASS, InvalidRunError, UsageError

if TYPE_CHECKING:
    from lorameter.machine.provenance import Machine
    from lorameter.records.record import Notice
    from lorameter.records.store import Run
    from lorameter.run.plan import Plan, Sides
    from lorameter.run.sites.placement import Placement
    from lorameter.studies.study import Study
    from lorameter.verdicts.gate import Policy

CALIBRATION_REPLICATES = 24
"""Enough for three gates of 8 that share nothing, and about 4 minutes of the default study on two cores."""
SETTLED_OPTIONS = (
    "base", "candidate", "effort", "replicates", "allow-disturbed", "model", "data", "precision", "variant", "phase",
    "inject-rows", "base-command", "candidate-command", "script", "cwd", "steps",
    "mixed",
)  # fmt: skip
"""Options that make an A/B; one that is resumed has them."""
CALIBRATED_STUDY = "training-step"
SIDE_HELP = "a git revision, a Python executable, or requirements such as 'peft==0.20.0'"


def add_commands(commands: Any, common: Any) -> None:
    """The parsers of these commands; `common` adds the options that every command has."""
    ab = commands.add_parser(
        "ab",
        help="measure base and candidate in one interleaved job",
        description="Measure base and candidate in one interleaved job, and judge the candidate.",
    )
    ab.add_argument("study", metavar="STUDY", nargs="?", help="name of a built-in study, or a TOML file")
    ab.add_argument("--base", metavar="SIDE", help=SIDE_HELP)
    ab.add_argument("--candidate", metavar="SIDE", help=SIDE_HELP)
    add_script_options(ab)
    ab.add_argument("--resume", metavar="RUN", help="resume an interrupted A/B, by its own study and sides")
    _measuring(ab, ("quick", "standard", "rigorous"), "3, 8 or 12 replicates; default 8")
    add_options(ab.add_argument, "precision", "mixed", "variant", "dry-run")
    ab.add_argument(
        "--phase", choices=("train", "generate", "cold"), action="append", default=[],
        help="phase to measure; repeatable; default: train and generate",
    )  # fmt: skip
    add_options(ab.add_argument, "policy", "format", "markdown", "html", "verbose")
    ab.add_argument(
        "--inject-rows",
        type=int,
        default=0,
        metavar="N",
        help="injected slow-down, to test the gate: the candidate multiplies N extra rows in every adapted layer",
    )
    common(ab)
    ab.set_defaults(command=run_ab)

    calibrate = commands.add_parser(
        "calibrate",
        help="this machine's own false-alarm rate and power",
        description="Measure false-alarm rate and detectable slow-down on this machine.",
    )
    calibrate.add_argument("study", metavar="STUDY", nargs="?", help=f"default: {CALIBRATED_STUDY}")
    _measuring(calibrate, ("standard", "rigorous"), f"8 or 12 replicates; default {CALIBRATION_REPLICATES}")
    calibrate.add_argument(
        "--variant", metavar="V", action="append", default=[], help="the one variant to measure; default: the reference"
    )
    calibrate.add_argument(
        "--inject-rows", type=int, metavar="N", help="rows of extra work a layer; default: sized by a pilot for 5 %%"
    )
    calibrate.add_argument("--resume", metavar="RUN", help="resume an interrupted calibration")
    common(calibrate)
    calibrate.set_defaults(command=run_calibrate)


def _measuring(command: argparse.ArgumentParser, efforts: tuple[str, ...], said: str) -> None:
    command.add_argument("--effort", choices=efforts, help=said)
    add_options(command.add_argument, "replicates", "max-minutes", "allow-disturbed", "sites", "on", "if-busy")
    add_options(command.add_argument, "model", "data")


def run_ab(options: argparse.Namespace) -> int:
    """Measure, print, and end with the exit code of the verdicts under the policy."""
    from lorameter.run.sites.placement import open_placement
    from lorameter.run.workers.sides import command_sides, name_sides
    from lorameter.verdicts.calibrate import MOST_ROWS
    from lorameter.verdicts.gate import load_policy

    form_of(options)
    check_page(options.html)
    if not 0 <= options.inject_rows <= MOST_ROWS:
        raise UsageError(f"--inject-rows = {options.inject_rows}: no amount of work. Use 0 to {MOST_ROWS}.")
    policy = load_policy(options.policy)  # before anything is measured
    if options.resume:
        return _go_on(options)
    given = study_of_options(options)
    of, command = given or (None, "")
    for name in () if command else ("base", "candidate") if given else ("study", "base", "candidate"):
        if getattr(options, name) is None:
            word = name.upper() if name == "study" else f"--{name} SIDE"
            raise UsageError(f"ab: {word} is missing. Give it, or resume an interrupted A/B by --resume RUN.")
    study = read_study(options, "", of=of)
    if command:
        sides = command_sides(study.scripts[0].command, command)
    else:  # before anything waits in a queue
        sides = name_sides(
            {"base": options.base, "candidate": options.candidate}, Path.cwd(), study.protocol.place,
            slowdown_rows=options.inject_rows,
        )  # fmt: skip
    with open_placement(study, options.runs_dir) as placement:
        run = _measured_there(placement, read_study(options, placement.machine.kind, of=of), sides, options, policy)
    return EXIT_PASS if run is None else show_ab(run, options)


def _measured_there(
    placement: Placement, study: Study, sides: Sides, options: argparse.Namespace, policy: Policy
) -> Run | None:
    """The A/B as measured; None after a dry run."""
    from lorameter.records import codec, store
    from lorameter.report.live import LiveDisplay
    from lorameter.report.notices import warn_before_run
    from lorameter.report.terminal import console_for, show
    from lorameter.run.build_plan import build_plan
    from lorameter.run.measure import measure
    from lorameter.run.plan import AB_PHASES

    runs = store.runs_dir(options.runs_dir, make=not options.dry_run)

    def make(machine: Machine) -> tuple[Plan, tuple[Notice, ...]]:
        return build_plan(
            study,
            machine,
            free_bytes=placement.free_bytes,
            select=options.variant,
            phases=options.phase or (study.protocol.phases if study.trains_only else AB_PHASES),
            sides=sides,
            runs=runs,
        )

    plan, notices = make(placement.machine)
    if options.dry_run:
        show_plan(plan, placement.machine, notices, runs, as_json=options.json)
        return None
    errors = console_for(stderr=True)
    kept = codec.to_json(policy) if options.policy else {}
    with placement.hold(options.if_busy) as waited:
        if waited:
            plan, notices = make(placement.machine)
        show(warn_before_run(notices), errors)
        with LiveDisplay(errors, device=placement.machine.device_name) as display:
            return measure(plan, runs=runs, display=display, notices=notices, policy=kept, placement=placement)


def _go_on(options: argparse.Namespace) -> int:
    from lorameter.commands.resume import resume

    run = resume(options, SETTLED_OPTIONS, ab=True)
    return EXIT_PASS if run is None else show_ab(run, options)


def run_calibrate(options: argparse.Namespace) -> int:
    """Size the slow-down by a pilot, measure, print what the gate can see here."""
    import dataclasses

    from lorameter.run.sites.placement import open_placement
    from lorameter.run.workers import open_executor
    from lorameter.studies.placement import HERE, say_on
    from lorameter.verdicts.calibrate import INJECTED, LEAST_TO_CALIBRATE, MOST_ROWS, PILOT_ROWS, rows_for

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
            rows = rows_for(INJECTED, *seen)
        run = _measured_here(study, variant.name, rows, placement, options)
    return _show_calibration(run, options)


def _calibrate_on(options: argparse.Namespace) -> int:
    """Resume an interrupted calibration; one of which nothing is left is shown as it is."""
    from lorameter.commands.resume import resume
    from lorameter.records import store
    from lorameter.run.resume import is_calibration, study_of
    from lorameter.verdicts.calibrate import LEAST_TO_CALIBRATE

    run = store.read_run(options.resume, store.runs_dir(options.runs_dir))
    name = run.manifest.run
    if not is_calibration(run.manifest):
        raise UsageError(f"run {name} is no calibration. Resume: lorameter run --resume {name}")
    if study_of(run).protocol.replicates < LEAST_TO_CALIBRATE:
        raise UsageError(f"run {name} sized the slow-down of a calibration, and is none itself. Calibrate anew.")
    whole = resume(options, [one for one in SETTLED_OPTIONS if hasattr(options, one.replace("-", "_"))], ab=True)
    assert whole is not None  # that is the answer to --dry-run, which there is none of here
    return _show_calibration(whole, options)


def _require_whole(run: Run, then: str) -> None:
    """Raises `InvalidRunError` where a run was stopped: whoever did that does not want the next one to begin."""
    if run.manifest.status != "complete":
        raise InvalidRunError(f"run {run.manifest.run} was stopped, and what it had measured is kept: {then}.")


def _show_calibration(run: Run, options: argparse.Namespace) -> int:
    """Print what the gate can see, as this run shows; the exit code says whether the machine measures anything now."""
    from lorameter.records import codec
    from lorameter.report.machine import describe_calibration
    from lorameter.report.terminal import console_for, show
    from lorameter.run.resume import INJECTED, study_of
    from lorameter.verdicts.calibrate import calibrate
    from lorameter.verdicts.series import is_difference

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
    from lorameter.records.metrics import PRIMARY
    from lorameter.verdicts.series import compare_series, group_trials

    base, candidate = (group_trials(run.records, side).get((name, "variant")) for side in ("base", "candidate"))
    found = compare_series(base, candidate, PRIMARY["train"]) if base and candidate else None
    if found is None or found.ratio is None:
        raise InvalidRunError(f"run {run.manifest.run}: the pilot measured nothing; see its report.")
    return found.ratio


def _measured_here(study: Study, name: str, rows: int, placement: Placement, options: argparse.Namespace) -> Run:
    """An A/B of the present interpreter with itself, the candidate with extra work; training only."""
    from lorameter.records import store
    from lorameter.report.live import LiveDisplay
    from lorameter.report.notices import warn_before_run
    from lorameter.report.terminal import console_for, show
    from lorameter.run.build_plan import build_plan
    from lorameter.run.measure import measure
    from lorameter.run.workers.sides import present_sides

    runs = store.runs_dir(options.runs_dir, make=True)
    plan, notices = build_plan(
        study,
        placement.machine,
        free_bytes=placement.free_bytes,
        select=[name],
        phases=("train",),
        sides=present_sides(rows),
        runs=runs,
    )
    errors = console_for(stderr=True)
    show(warn_before_run(notices), errors)
    with placement.hold(options.if_busy), LiveDisplay(errors) as display:
        return measure(plan, runs=runs, display=display, notices=notices, placement=placement)


def read_study(options: argparse.Namespace, device: str, standard: int | None = None, of: Study | None = None) -> Study:
    """The study that is named, or `of`, with the options' changes; 8 replicates, or `standard`, unless something else
    is asked for. `device` chooses its profile."""
    from lorameter.studies.placement import HERE
    from lorameter.studies.study_file import load_study

    if options.effort and options.replicates is not None:
        raise UsageError("--effort and --replicates both set the replicates. Give one of them.")
    precision = getattr(options, "precision", None)
    decided = options.effort or options.replicates is not None or precision is not None
    study = of if of is not None else load_study(options.study, device=device)
    return study.with_overrides(
        model=options.model,
        data=options.data,
        effort=options.effort or (None if decided or standard else "standard"),
        replicates=options.replicates if decided else standard,
        precision=precision,
        max_minutes=options.max_minutes,
        allow_disturbed=options.allow_disturbed,
        on=getattr(options, "on", HERE),  # what has no such option measures here
        sites=getattr(options, "sites", None),
        mixed=getattr(options, "mixed", False),
    )
