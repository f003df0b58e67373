"""What `--resume` of `run` and `ab` does: say what a run has and lacks, and have the rest measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorameter.commands.output import print_json
from lorameter.errors import UsageError

if TYPE_CHECKING:
    from lorameter.records.store import Run
    from lorameter.run.sites.placement import Placement

SHOWN = {"script": "command"}
"""Options by the name under which they are kept, where that is another."""


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
    from lorameter.records import store
    from lorameter.report.blocks import say
    from lorameter.report.terminal import console_for, show
    from lorameter.run.resume import is_finished, refuse_settled, study_of
    from lorameter.run.sites.driver import read_broken_off_with_jobs
    from lorameter.run.sites.placement import open_placement
    from lorameter.studies.study_file import load_study

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
        return _go_on_there(run, placement, options)


def _go_on_there(run: Run, placement: Placement, options: argparse.Namespace) -> Run | None:
    from lorameter.report.blocks import say
    from lorameter.report.live import LiveDisplay
    from lorameter.report.terminal import console_for, show
    from lorameter.run.measure import measure
    from lorameter.run.resume import plan_rest
    from lorameter.run.runner import find_unfinished

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
