"""What the commands that measure share: the plan is made and shown or measured with a display; a run is resumed."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorameter.commands.output import print_json
from lorameter.errors import LorameterError, UsageError
from lorameter.machine.provenance import Machine
from lorameter.records import store
from lorameter.records.record import Notice
from lorameter.records.store import Run
from lorameter.report.blocks import say
from lorameter.report.estimate import describe_plan
from lorameter.report.live import LiveDisplay
from lorameter.report.notices import warn_before_run
from lorameter.report.terminal import console_for, show
from lorameter.run.build_plan import build_plan
from lorameter.run.feasibility import NOT_HERE
from lorameter.run.forecast import Forecast, forecast
from lorameter.run.forecast_time import TimeForecast
from lorameter.run.measure import measure
from lorameter.run.plan import Plan
from lorameter.run.resume import is_finished, plan_rest, refuse_settled, study_of
from lorameter.run.runner import find_unfinished
from lorameter.run.sites.driver import read_broken_off_with_jobs
from lorameter.run.sites.placement import Placement, open_placement
from lorameter.studies.data_source import SYNTHETIC
from lorameter.studies.script import OWN
from lorameter.studies.study import Study
from lorameter.studies.study_file import load_study
from lorameter.studies.workload import LOSSES

SHOWN = {"script": "command"}
"""Options by the name under which they are kept, where that is another."""


def measure_study(
    study: Study, placement: Placement, options: argparse.Namespace, *, policy: Mapping[str, Any] | None = None,
    **planned: Any,
) -> Run | None:  # fmt: skip
    """Plan a study and measure it, or with `--dry-run` show the plan.

    Args:
        study: with the changes of the options.
        placement: where it is measured.
        options: of the command.
        policy: of an A/B, kept with the run.
        planned: arguments of `build_plan`.

    Returns:
        The run; None after a dry run.
    """
    dry = getattr(options, "dry_run", False)
    runs = store.runs_dir(options.runs_dir, make=not dry)

    def make() -> tuple[Plan, tuple[Notice, ...]]:
        return build_plan(study, placement.machine, free_bytes=placement.free_bytes, runs=runs, **planned)

    plan, notices = make()
    if dry:
        show_plan(plan, placement.machine, notices, runs, as_json=options.json)
        return None
    errors = console_for(stderr=True)
    with placement.hold(options.if_busy) as waited:
        if waited:
            plan, notices = make()
        show(warn_before_run(notices), errors)
        with display_of(plan, placement.machine, runs, errors) as display:
            return measure(plan, runs=runs, display=display, notices=notices, policy=policy or {}, placement=placement)


def display_of(plan: Plan, machine: Machine, runs: Path, console: Any) -> LiveDisplay:
    """A display that knows the device and how long such a plan takes; what cannot be foreseen stops no run."""
    with contextlib.suppress(LorameterError):
        expected = forecast(plan, machine, runs).time
        return LiveDisplay(console, device=machine.device_name, expected_s=expected.time_s, basis=expected.basis)
    return LiveDisplay(console, device=machine.device_name)


def show_plan(plan: Plan, machine: Machine, notices: Sequence[Notice], runs: Path, *, as_json: bool) -> None:
    """Print a plan and what it is expected to take, as text or as one JSON document."""
    from lorameter.trial.data.records import describe_data

    expected = forecast(plan, machine, runs)
    if any(notice.code == NOT_HERE for notice in notices):  # what it would take on another machine is not known here
        why = "it cannot be measured on this machine"
        took = TimeForecast(time_s=None, basis=why)
        expected = Forecast(time=took, memory_bytes=None, disk_bytes=expected.disk_bytes, unknown=why)
    workload = plan.study.workload
    own = workload.data in (SYNTHETIC, OWN)
    data = None if own else f"{describe_data(workload)}; {LOSSES[workload.loss]}"
    if as_json:
        print_json(
            {
                "order": [slot.trial for slot in plan.slots],
                "interleaving": plan.interleaving,
                "why": plan.why,
                "seed": plan.study.protocol.seed,
                "time_s": expected.time.time_s,
                "time_basis": expected.time.basis,
                "replicates": expected.time.replicates,
                "skipped": list(expected.time.skipped),
                "half_width": expected.time.half_width,
                "noise_basis": expected.time.noise,
                "time_for_3_percent_s": expected.time.sought_width_s,
                "memory_bytes": expected.memory_bytes,
                "disk_bytes": expected.disk_bytes,
                **({"unknown": expected.unknown} if expected.unknown else {}),
                **({"data": data} if data else {}),
            }
        )
        return

    show(describe_plan(plan, expected, machine, notices, data), console_for())


def resume(options: argparse.Namespace, settled: Sequence[str], *, ab: bool = False) -> Run | None:
    """Resume an interrupted run, lost lines or was disturbed; one of which nothing is left is given back.

    The rest is measured where the run was, or where `--on` and `--sites` say.

    Args:
        options: of the command; the run in `resume`.
        settled: names of those of its options that the run has settled, and that may not be given.
        ab: whether the run must be an A/B.

    Returns:
        The run as it is then; None where it was only asked what is left (`--dry-run`).

    Raises:
        UsageError, InvalidRunError: it cannot be resumed, here or at all.
    """
    given = {f"--{SHOWN.get(name, name)}": getattr(options, name.replace("-", "_")) for name in settled}
    refuse_settled("--resume", given)
    runs = store.runs_dir(options.runs_dir)
    study = load_study(options.study).name if options.study else None
    run = read_broken_off_with_jobs(options.resume, runs, study=study)
    name = run.manifest.run
    if ab and not run.manifest.sides:
        raise UsageError(f"run {name} is no A/B. Resume: lorameter run --resume {name}")
    if is_finished(run):
        errors = console_for(stderr=True)
        show((say(f"run {name} is complete: nothing is left to be measured.", indented=False),), errors)
        return run
    there = study_of(run)
    here = there.with_overrides(on=options.on, sites=options.sites, mixed=there.protocol.mixed)
    with open_placement(here, options.runs_dir) as placement:
        return _measure_rest(run, placement, options)


def _measure_rest(run: Run, placement: Placement, options: argparse.Namespace) -> Run | None:
    name, errors = run.manifest.run, console_for(stderr=True)
    plan = plan_rest(run, placement, max_minutes=options.max_minutes)
    unsettled = find_unfinished(plan, run.records, whole=placement.is_spread)
    left = [slot.trial for group in unsettled for slot in group.slots]
    kept = f"{len(plan.slots) - len(left)} of {len(plan.slots)} trials are kept"
    show((say(f"run {name}: {kept}, {len(left)} are left to be measured.", indented=False),), errors)
    if getattr(options, "dry_run", False):
        if options.json:
            print_json({"run": name, "order": left, "interleaving": plan.interleaving})
        else:
            show(tuple(say(trial, indented=False) for trial in left), console_for())
        return None
    with placement.hold(options.if_busy), LiveDisplay(errors) as display:
        return measure(plan, runs=run.path.parent, display=display, resume=name, placement=placement)
