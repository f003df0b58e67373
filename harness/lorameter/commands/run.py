"""The commands that measure a study or two sides of one: `run` and `ab`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from lorameter.commands.measure import measure_study, resume
from lorameter.commands.output import check_page, form_of, print_json
from lorameter.commands.report import show_ab, show_report
from lorameter.errors import EXIT_INVALID, EXIT_PASS, UsageError
from lorameter.records import codec
from lorameter.records.store import Run
from lorameter.report.notices import warn_before_run
from lorameter.report.run import encode_spending
from lorameter.report.run_view import view_of
from lorameter.report.terminal import console_for, show
from lorameter.run.plan import AB_PHASES
from lorameter.run.resume import SETTLED_OPTIONS
from lorameter.run.sites.placement import open_placement
from lorameter.run.workers.sides import command_sides, name_sides
from lorameter.studies.peft_experiments import study_of_experiments
from lorameter.studies.placement import HERE
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import name_of_command, split_command, time_steps
from lorameter.studies.script_study import study_of_command, study_of_engine
from lorameter.studies.study import Study
from lorameter.studies.study_file import load_study
from lorameter.verdicts.calibrate import MOST_ROWS
from lorameter.verdicts.gate import load_policy

SCRIPT_OPTIONS = ("script", "cwd", "steps", "peft_experiments", "select", "quality")
"""Names under which the options are kept; a run that is resumed has settled them."""
AB_OPTIONS = (
    "base", "candidate", "effort", "replicates", "allow-disturbed", "model", "data", "precision", "variant", "phase",
    "inject-rows", "base-command", "candidate-command", "script", "cwd", "steps",
    "mixed",
)  # fmt: skip
"""Options that make an A/B; one that is resumed has them."""


def run_study(options: argparse.Namespace) -> int:
    """Measure a study and print its report; the exit code says whether the run is valid."""
    if options.resume:
        return _show_resumed(options)
    if not options.study and options.peft_experiments is None:
        raise UsageError("run: no study named. Give one, as in `lorameter run lora-or-qlora`, or --resume RUN.")
    if options.effort and options.replicates is not None:
        raise UsageError("--effort and --replicates both set the replicates. Give one of them.")

    with open_placement(_study(options, ""), options.runs_dir) as placement:
        study = _study(options, placement.machine.kind)
        run = measure_study(
            study, placement, options, select=options.variant, phases=options.phase or study.protocol.phases,
            interleaving=options.interleave, shown_only=options.dry_run,
        )  # fmt: skip
    return EXIT_PASS if run is None else _show(run, options)


def _study(options: argparse.Namespace, device: str) -> Study:
    """The study that is named, with the options' changes; `device` chooses its profile."""
    return study_of_script_options(options, device).with_overrides(
        model=options.model,
        data=options.data,
        effort=options.effort,
        replicates=options.replicates,
        precision=options.precision,
        max_minutes=options.max_minutes,
        allow_disturbed=options.allow_disturbed,
        on=options.on,
        sites=options.sites,
        mixed=options.mixed,
    )


def study_of_script_options(options: argparse.Namespace, device: str) -> Study:
    """The study that is named, or with --command what it claims, of that script; `device` chooses its profile.

    Raises:
        UsageError: no such study, or a command that makes none.
    """
    if options.peft_experiments is not None:
        if options.study or options.script is not None:
            raise UsageError("--peft-experiments: it is a study of its own. Leave the study and --command out.")
        return study_of_experiments(options.peft_experiments, options.select or "*", quality=options.quality)
    for name in ("select", "quality"):
        if getattr(options, name):
            raise UsageError(f"--{name}: it belongs to --peft-experiments. Leave it out.")
    if options.script is None:
        for name in ("cwd", "steps"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name}: it belongs to --command. Leave it out.")
        return load_study(options.study, profile=options.profile, device=device)
    if options.profile is not None:
        raise UsageError(f"--profile {options.profile}: a script has none: it brings model and data. Leave it out.")
    if options.variant:
        raise UsageError("--variant: both are needed, with the engine and without it. Leave it out.")
    study = study_of_engine(load_study(options.study), options.script, cwd=options.cwd or "")
    if options.steps is None:
        return study
    return dataclasses.replace(study, protocol=time_steps(study.protocol, options.steps))


def _show_resumed(options: argparse.Namespace) -> int:
    """Resume a run, and show it as the command that began it does."""
    run = resume(options, (*SETTLED_OPTIONS, *SCRIPT_OPTIONS))
    if run is None:
        return EXIT_PASS
    if run.manifest.sides:
        return show_ab(run, options)
    return _show(run, options)


def _show(run: Run, options: argparse.Namespace) -> int:
    """Print what was measured; the exit code says whether the run is valid."""
    view = view_of(run)
    if options.json:
        show(warn_before_run(view.notices), console_for(stderr=True))
        print_json(
            {
                "run": run.manifest.run,
                "path": str(run.path),
                "status": "ok" if view.valid else "invalid",
                "invalid": view.validity.invalid,
                "control": _controls(view),
                "trials": view.counts,
                **encode_spending(run.manifest.spending),
            }
        )
    else:
        show_report(run, view, verbose=options.verbose)
    return EXIT_PASS if view.valid else EXIT_INVALID


def _controls(view: Any) -> dict[str, Any]:
    return {
        f"{table.phase} on {table.site}" if table.site else table.phase: codec.to_json(table.control)
        for table in view.tables
    }


def run_ab(options: argparse.Namespace) -> int:
    """Measure, print, and end with the exit code of the verdicts under the policy."""
    form_of(options)
    check_page(options.html)
    if not 0 <= options.inject_rows <= MOST_ROWS:
        raise UsageError(f"--inject-rows = {options.inject_rows}: no amount of work. Use 0 to {MOST_ROWS}.")
    policy = load_policy(options.policy)  # before anything is measured
    if options.resume:
        resumed = resume(options, AB_OPTIONS, ab=True)
        return EXIT_PASS if resumed is None else show_ab(resumed, options)
    given = study_of_commands(options)
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
        study = read_study(options, placement.machine.kind, of=of)
        run = measure_study(
            study, placement, options, policy=codec.to_json(policy) if options.policy else None,
            select=options.variant, sides=sides,
            phases=options.phase or (study.protocol.phases if study.trains_only else AB_PHASES),
        )  # fmt: skip
    return EXIT_PASS if run is None else show_ab(run, options)


def study_of_commands(options: argparse.Namespace) -> tuple[Study, str] | None:
    """The study of the commands that were given, and the candidate's command where it is another; None without any.

    Raises:
        UsageError: half of what it takes, or two ways of saying it.
    """
    base, candidate, one = options.base_command, options.candidate_command, options.script
    if base is candidate is one is None:
        for name in ("cwd", "steps"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name}: it belongs to --command, --base-command and --candidate-command.")
        return None
    if options.study:
        raise UsageError("ab: a study and a command are given. A command is a study by itself: leave one of them out.")
    if options.inject_rows:
        raise UsageError(
            "--inject-rows: extra work goes into adapters of lorameter's own, and a script has none of them."
        )
    if options.variant:
        raise UsageError("--variant: a command is the one variant. Leave it out.")
    if one is not None and (base is not None or candidate is not None):
        raise UsageError("--command is for both sides, but each side also has its own command. Give one of the two.")
    if one is None and (base is None or candidate is None):
        missing = "--base-command" if base is None else "--candidate-command"
        raise UsageError(
            f"ab: {missing} COMMAND is missing. Give it, or one --command on the sides --base and --candidate."
        )
    if one is None and (options.base or options.candidate):
        raise UsageError(
            "--base and --candidate are sides for one --command. Two commands are the sides themselves: leave them out."
        )
    if candidate is not None:
        split_command("--candidate-command", candidate)
    steps = 16 if options.steps is None else options.steps
    protocol = time_steps(Protocol(phases=("train",)), steps)
    command = one if one is not None else base
    study = study_of_command(command, name=name_of_command(command), cwd=options.cwd or "", protocol=protocol)
    if candidate is not None:
        study = dataclasses.replace(study, title=f"{base} against {candidate}")
    return study, candidate or ""


def read_study(options: argparse.Namespace, device: str, standard: int | None = None, of: Study | None = None) -> Study:
    """The study that is named, or `of`, with the options' changes; 8 replicates, or `standard`, unless something else
    is asked for. `device` chooses its profile."""
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
