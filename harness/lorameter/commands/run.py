"""The command that measures a study: `run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lorameter.commands.options import add_options
from lorameter.commands.output import print_json
from lorameter.commands.plan import show_plan
from lorameter.commands.report import show_report
from lorameter.commands.run_scripts import SCRIPT_OPTIONS, add_script_options, study_of_options
from lorameter.errors import EXIT_INVALID, EXIT_PASS, UsageError

if TYPE_CHECKING:
    from lorameter.machine.provenance import Machine
    from lorameter.records.record import Notice
    from lorameter.records.store import Run
    from lorameter.run.plan import Plan
    from lorameter.run.sites.placement import Placement
    from lorameter.studies.study import Study


def add_commands(commands: Any, common: Any) -> None:
    """The parsers of these commands; `common` adds the options that every command has."""
    run = commands.add_parser("run", help="measure a study", description="Measure a study and print its report.")
    run.add_argument("study", metavar="STUDY", nargs="?", help="name of a built-in study, or a TOML file")
    run.add_argument("--effort", choices=("quick", "standard", "rigorous"), help="3, 8 or 12 replicates")
    add_options(run.add_argument, "replicates", "profile", "model", "data", "variant")
    run.add_argument(
        "--phase", choices=("train", "generate", "cold"), action="append", default=[], help="only this; repeatable"
    )
    run.add_argument(
        "--interleave", metavar="L", help="shared-base, lockstep or replicates; default: the finest possible"
    )
    add_options(run.add_argument, "precision", "max-minutes", "allow-disturbed", "sites", "on", "mixed", "if-busy")
    add_script_options(run)
    run.add_argument("--resume", metavar="RUN", help="resume an interrupted run, by its own study and plan")
    add_options(run.add_argument, "dry-run", "verbose")
    common(run)
    run.set_defaults(command=run_study)


def run_study(options: argparse.Namespace) -> int:
    """Measure a study and print its report; the exit code says whether the run is valid."""
    if options.resume:
        return run_resumed(options)
    if not options.study and options.peft_experiments is None:
        raise UsageError("run: no study named. Give one, as in `lorameter run lora-or-qlora`, or --resume RUN.")
    if options.effort and options.replicates is not None:
        raise UsageError("--effort and --replicates both set the replicates. Give one of them.")
    from lorameter.run.sites.placement import open_placement

    with open_placement(_study(options, ""), options.runs_dir) as placement:
        return _run_on(placement, options)


def _study(options: argparse.Namespace, device: str) -> Study:
    """The study that is named, with the options' changes; `device` chooses its profile."""
    return study_of_options(options, device).with_overrides(
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


def _run_on(placement: Placement, options: argparse.Namespace) -> int:
    """Measure there."""
    from lorameter.commands.display import display_of
    from lorameter.records import store
    from lorameter.report.notices import warn_before_run
    from lorameter.report.terminal import console_for, show
    from lorameter.run.build_plan import build_plan
    from lorameter.run.measure import measure

    runs = store.runs_dir(options.runs_dir, make=not options.dry_run)
    machine = placement.machine
    study = _study(options, machine.kind)

    def make(machine: Machine) -> tuple[Plan, tuple[Notice, ...]]:
        return build_plan(
            study,
            machine,
            free_bytes=placement.free_bytes,
            select=options.variant,
            phases=options.phase or study.protocol.phases,
            interleaving=options.interleave,
            runs=runs,
            shown_only=options.dry_run,
        )

    plan, notices = make(placement.machine)
    if options.dry_run:
        return show_plan(plan, machine, notices, runs, as_json=options.json)
    errors = console_for(stderr=True)
    with placement.hold(options.if_busy) as waited:
        if waited:
            plan, notices = make(placement.machine)
        show(warn_before_run(notices), errors)
        with display_of(plan, machine, runs, errors) as display:
            run = measure(plan, runs=runs, display=display, notices=notices, placement=placement)
    return _show(run, options)


def run_resumed(options: argparse.Namespace) -> int:
    """Resume a run, and show it as the command that began it does."""
    from lorameter.commands.resume import resume
    from lorameter.run.resume import SETTLED_OPTIONS

    run = resume(options, (*SETTLED_OPTIONS, *SCRIPT_OPTIONS))
    if run is None:
        return EXIT_PASS
    if run.manifest.sides:
        from lorameter.commands.ab_report import show_ab

        return show_ab(run, options)
    return _show(run, options)


def _show(run: Run, options: argparse.Namespace) -> int:
    """Print what was measured; the exit code says whether the run is valid."""
    from lorameter.report.notices import warn_before_run
    from lorameter.report.run_view import encode_spending, view_of
    from lorameter.report.terminal import console_for, show

    view = view_of(run)
    if options.json:
        show(warn_before_run(view.notices), console_for(stderr=True))
        print_json(
            {
                "run": view.run,
                "path": view.path,
                "status": "ok" if view.valid else "invalid",
                "invalid": view.invalid,
                "control": _controls(view),
                "trials": view.counts,
                **encode_spending(view.spending),
            }
        )
    else:
        show_report(run, view, verbose=options.verbose)
    return EXIT_PASS if view.valid else EXIT_INVALID


def _controls(view: Any) -> dict[str, Any]:
    from lorameter.records import codec

    return {
        f"{table.phase} on {table.site}" if table.site else table.phase: codec.to_json(table.control)
        for table in view.tables
    }
