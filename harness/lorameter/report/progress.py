"""How far a run has come: what a report must say first of one that is under way, was killed or was interrupted."""

from __future__ import annotations

import time
from collections import defaultdict

from lorameter.records.store import Run
from lorameter.records.units import format_count
from lorameter.report.blocks import Line, say
from lorameter.studies.study import Study
from lorameter.verdicts.validity import is_single_script_run

_WORDS = {
    "running": "under way: a process is measuring it",
    "killed": "its process was killed",
    "interrupted": "stopped by the user",
    "failed": "ended by an error; the logs say which",
}


def standing(run: Run, study: Study) -> tuple[Line, ...]:
    """Facts of a run of this study that is not complete, or was not at some time; none of any other."""
    manifest = run.manifest
    lines = []
    if run.state != "complete":
        ended, planned = sum(record.settled for record in run.records), len(manifest.order)
        said = f"{_WORDS[run.state]}; {ended} of {planned} trials have ended"
        resumable = run.state != "running" and not is_single_script_run(run, study)
        said += f". Resume: lorameter run --resume {manifest.run}" if resumable else ""
        lines.append(say(said, label="status"))
    if manifest.resumed:
        times = ", ".join(time.strftime("%Y-%m-%d %H:%M", time.localtime(one.unix_s)) for one in manifest.resumed)
        lines.append(say(times, label="resumed"))
    return tuple(lines)


def replicates_said(run: Run) -> str:
    """The replicates of a run; of an incomplete run those whose trials have all ended."""
    planned: dict[str, set[str]] = defaultdict(set)
    for trial in run.manifest.order or (record.trial for record in run.records):
        planned[trial.partition("-")[0]].add(trial)
    settled = {record.trial for record in run.records if record.settled}
    whole = sum(trials <= settled for trials in planned.values())
    if whole == len(planned):
        return format_count(whole, "replicate")
    return f"{whole} of {len(planned)} replicates complete"
