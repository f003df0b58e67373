"""Functions shared by commands and the pytest plugin: plan, forecast or measure a study, resume an interrupted run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kernels_check.terminal import print_stderr
from lorameter.commands.output import show_result
from lorameter.errors import require
from lorameter.records import store
from lorameter.records.record import Notice
from lorameter.records.store import Run
from lorameter.report.blocks import Document, say
from lorameter.report.estimate import describe_plan
from lorameter.report.live import LiveDisplay
from lorameter.report.phrases import warn_before_run
from lorameter.report.terminal import console_for, show
from lorameter.run.build_plan import build_plan
from lorameter.run.feasibility import NOT_HERE
from lorameter.run.forecast import Forecast, forecast
from lorameter.run.forecast_time import TimeForecast
from lorameter.run.measure import measure
from lorameter.run.plan import Plan
from lorameter.run.resume import is_finished, plan_rest, study_of
from lorameter.run.runner import find_unfinished
from lorameter.run.sites.driver import read_broken_off
from lorameter.run.sites.placement import Placement, open_placement
from lorameter.run.workers import open_executor
from lorameter.studies.protocol import HERE
from lorameter.studies.script import OWN
from lorameter.studies.study import Study
from lorameter.studies.study_file import load_study
from lorameter.studies.workload import LOSSES, SYNTHETIC

ON_RESUME = frozenset(
    "calls study resume runs_dir json max_minutes sites on if_busy dry_run verbose policy format markdown html".split()
)
"""Options that are allowed with --resume; all others would change the study or the plan."""


def override(
    study: Study, options: argparse.Namespace, *, effort: str | None = None, replicates: int | None = None
) -> Study:
    """The study with the options' changes; `effort` or `replicates` apply if the options set no precision.

    Raises:
        UsageError: both replicates and an effort are given, or a value is invalid.
    """
    given = vars(options)
    require(
        not (options.effort and options.replicates is not None),
        "--effort and --replicates both set the replicates. Give one of them.",
    )
    if options.effort or options.replicates is not None or given.get("precision") is not None:
        effort, replicates = options.effort, options.replicates
    return study.with_overrides(
        model=options.model,
        data=options.data,
        effort=effort,
        replicates=replicates,
        precision=given.get("precision"),
        max_minutes=options.max_minutes,
        allow_disturbed=options.allow_disturbed,
        on=given.get("on", HERE),  # commands without this option measure here
        sites=given.get("sites"),
        mixed=given.get("mixed", False),
    )


def plan_study(study: Study, placement: Placement, runs: Path, **planned: Any) -> tuple[Plan, tuple[Notice, ...]]:
    """Plan a study in a place, with further arguments of `build_plan`; returns the plan and the notices before it
    starts."""
    return build_plan(study, placement.machine, free_bytes=placement.free_bytes, runs=runs, **planned)


def measure_study(
    study: Study,
    placement: Placement,
    options: argparse.Namespace,
    *,
    policy: Mapping[str, Any] | None = None,
    console: Console | None = None,
    **planned: Any,
) -> Run | None:
    """Plan a study and measure it, or with `--dry-run` show the plan.

    Args:
        study: the study with the options' changes.
        placement: where it is measured.
        options: options of the command.
        policy: policy of an A/B, stored with the run.
        console: console for the progress; None for standard error.
        planned: arguments of `build_plan`.

    Returns:
        The run; None after a dry run.
    """
    dry = vars(options).get("dry_run", False)
    runs, console = store.runs_dir(options.runs_dir, make=not dry), console or console_for(stderr=True)
    plan, notices = plan_study(study, placement, runs, **planned)
    if dry:
        document, data = forecast_plan(plan, notices, placement, runs)
        show_result(options, document, lambda: data)
        return None
    with placement.hold(options.if_busy) as waited:
        if waited:
            plan, notices = plan_study(study, placement, runs, **planned)
        show(warn_before_run(notices), console)
        with LiveDisplay(console, device=placement.machine.device_name) as display:
            return measure(plan, runs=runs, display=display, notices=notices, policy=policy or {}, placement=placement)


def forecast_plan(
    plan: Plan, notices: tuple[Notice, ...], placement: Placement, runs: Path
) -> tuple[Document, dict[str, Any]]:
    """Forecast the time, memory and disk space of a plan, as a report and as JSON."""
    from lorameter.trial.data.records import describe_data

    elsewhere = any(notice.code == NOT_HERE for notice in notices)
    expected = forecast(plan, placement.machine, runs, None if elsewhere or placement.is_remote else open_executor())
    if elsewhere:  # time and memory on another machine are unknown
        why = "it cannot be measured on this machine"
        took = TimeForecast(time_s=None, basis=why)
        expected = Forecast(time=took, memory_bytes=None, disk_bytes=expected.disk_bytes, unknown=why)
    workload = plan.study.workload
    own = workload.data in (SYNTHETIC, OWN)
    data = None if own else f"{describe_data(workload)}; {LOSSES[workload.loss]}"
    return describe_plan(plan, expected, placement.machine, notices, data), {
        "order": [slot.trial for slot in plan.slots],
        "interleaving": plan.interleaving,
        "why": plan.why,
        "seed": plan.study.protocol.seed,
        "time_s": expected.time.time_s,
        "time_basis": expected.time.basis,
        "replicates": expected.time.replicates,
        "skipped": expected.time.skipped,
        "half_width": expected.time.half_width,
        "noise_basis": expected.time.noise,
        "time_for_3_percent_s": expected.time.sought_width_s,
        "memory_bytes": expected.memory_bytes,
        "disk_bytes": expected.disk_bytes,
        **({"unknown": expected.unknown} if expected.unknown else {}),
        **({"data": data} if data else {}),
    }


def find_interrupted(options: argparse.Namespace, *, prefix: str = "--") -> Run:
    """The interrupted run that the option `resume` names.

    Raises:
        UsageError, InvalidRunError: the run does not exist or cannot be resumed, or options would change its plan.
    """
    given = [
        f"{prefix}{'command' if name == 'script' else name.replace('_', '-')}"
        for name, value in vars(options).items()
        if name not in ON_RESUME and value not in (None, False, [])
    ]
    if given:
        raise UsageError(
            f"{prefix}resume: {', '.join(given)} would change the study or the plan, which the run holds. Leave the "
            "option out, or measure a new run."
        )
    study = load_study(options.study).name if options.study else None
    return read_broken_off(options.resume, store.runs_dir(options.runs_dir), study=study)


def resume(run: Run, options: argparse.Namespace, *, console: Console | None = None) -> Run | None:
    """Measure the rest of a run, at its original place or at that of `--on` and `--sites`.

    Returns:
        The run afterwards, also if nothing was left to measure; None with `--dry-run`, which shows the rest.

    Raises:
        UsageError, InvalidRunError: the run cannot be resumed here.
    """
    name, study, console = run.manifest.run, study_of(run), console or console_for(stderr=True)
    if is_finished(run):
        print_stderr(f"run {name} is complete: nothing is left to be measured.")
        return run
    there = study.with_overrides(on=options.on, sites=options.sites, mixed=study.protocol.mixed)
    with open_placement(there, options.runs_dir) as placement:
        plan = plan_rest(run, placement, max_minutes=options.max_minutes)
        unfinished = find_unfinished(plan, run.records, whole=placement.launcher is not None)
        left = [slot.trial for group in unfinished for slot in group.slots]
        kept = f"{len(plan.slots) - len(left)} of {len(plan.slots)} trials are kept"
        print_stderr(f"run {name}: {kept}, {len(left)} are left to be measured.")
        if vars(options).get("dry_run"):
            trials = tuple(say(trial, indented=False) for trial in left)
            show_result(options, trials, lambda: {"run": name, "order": left, "interleaving": plan.interleaving})
            return None
        with placement.hold(options.if_busy), LiveDisplay(console) as display:
            return measure(plan, runs=run.path.parent, display=display, resume=name, placement=placement)
