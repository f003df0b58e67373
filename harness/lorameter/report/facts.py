"""What a report says of a run before its numbers: machine, software, workload, plan, level and state, a line each."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorameter.machine.provenance import power_limit_w
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import format_count
from lorameter.report.blocks import Line, say
from lorameter.report.phrases import say_adapters, say_request
from lorameter.studies.from_run import read_own_workloads
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.studies.variant import ScriptVariant
from lorameter.studies.workload import LOSSES, Workload
from lorameter.verdicts.software import say_threads, versions_of
from lorameter.verdicts.validity import is_single_script_run


def facts_of(run: Run, study: Study) -> tuple[Line, ...]:
    """The facts of a run, each with its lead."""
    provenance, workload, protocol = run.manifest.provenance, study.workload, study.protocol
    tokens, git = run.manifest.tokens, provenance.get("git", {})
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    reported = versions_of(provenance, run.records)
    versions = ", ".join(f"{name} {reported.get(name)}" for name in libraries)
    changes = " with local changes" if git.get("dirty") else ""
    commit = f"commit {git['commit'][:10]}{changes}" if git.get("commit") else "no repository"
    device, name = (provenance.get(key, "unknown") for key in ("device", "device_name"))
    of_what = (
        [*describe_scripts(run, study)]
        if study.of_scripts
        else [
            say(
                f"{workload.model}; {tokens.get('data', workload.data)}; "
                f"{workload.batch_size} × {workload.sequence_length} tokens a batch, {workload.layout}"
                f"{_ranks_of(workload)}{'' if workload.loss == 'all' else f', {LOSSES[workload.loss]}'}; "
                f"{say_request(workload)} tokens a request{say_adapters(workload)}",
                label="workload",
            ),
            say(_tokens(tokens), label="tokens"),
        ]
    )
    return (
        say(f"{name} ({device}, {say_threads(provenance, run.records)}){_power_limit(provenance)}", label="device"),
        say(f"{versions}, Python {reported['python'] or 'unknown'}; {commit}", label="software"),
        *of_what,
        *_own_workloads(run, study),
        say(
            f"{replicates_said(run)}, {format_count(protocol.turns * protocol.steps_per_turn, 'timed step')} a trial, "
            f"order seed {run.manifest.seed}",
            label="plan",
        ),
        say(f"{run.manifest.interleaving}{_level(run)}", label="level"),
        *([say(run.manifest.stopped, label="stopped")] if run.manifest.stopped else []),
        *standing(run, study),
    )


def _power_limit(provenance: Mapping[str, Any]) -> str:
    """Of a GPU: what it is, and what it is by default; nothing on a CPU and of runs that did not record it."""
    limit, default = (power_limit_w(provenance, which) for which in ("power_limit_w", "default_power_limit_w"))
    if limit is None:
        return ""
    return f", power limit {limit} W" + ("" if default is None else f" of {default} W")


def _tokens(tokens: Mapping[str, Any]) -> str:
    real, padded = tokens.get("real_tokens", 0), tokens.get("padded_tokens", 0)
    loss = f", loss over {tokens['loss_tokens']}" if "loss_tokens" in tokens else ""
    if without := tokens.get("without_loss"):
        loss += f" ({format_count(without, 'sequence')} without a label left out)"
    return f"{real} real and {padded} padded in an epoch{loss}, hash {str(tokens.get('hash', ''))[:12]}"


def _own_workloads(run: Run, study: Study) -> Iterator[Line]:
    """What variants are measured on that are not measured on the study's workload."""
    tokens = run.manifest.tokens.get("own", {})
    for name, workload in read_own_workloads(run).items():
        pairs = ((field.name, getattr(workload, field.name)) for field in dataclasses.fields(workload))
        changes = ", ".join(f"{key} = {value}" for key, value in pairs if value != getattr(study.workload, key))
        yield say(f"{name} has {changes}; {_tokens(tokens.get(name, {}))}", label="own")


def _level(run: Run) -> str:
    """Why this level, and what was measured outside it."""
    why = f": {run.manifest.why}" if run.manifest.why else ""
    isolated = any(record.interleaving != run.manifest.interleaving for record in run.records)
    return f"{why}; peaks and what needs its own base: isolated trials" if isolated else why


def _ranks_of(workload: Workload) -> str:
    """Who shares a batch, where more than one rank does."""
    if workload.ranks == 1:
        return ""
    mended = f", bitsandbytes mended: {workload.repair}" if workload.repair else ""
    return f", by {workload.ranks} ranks ({workload.strategy}{mended})"


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


SOURCES = {"trainer": "a Trainer", "loop": "a loop that names its steps", "optimizer": "updates of an optimizer"}
"""Where steps were seen, in words."""


def describe_scripts(run: Run, study: Study) -> Iterator[Line]:
    """A line for each command; of an A/B of commands one for each side."""
    sides = {name: side for name, side in run.manifest.sides.items() if side.get("kind") == SIDE}
    for variant in study.scripts:
        for side in sides or {"": {}}:
            records = [one for one in run.records if one.name == variant.name and (not side or one.side == side)]
            command = str(sides[side].get("spec")) if side else variant.command
            yield say(f"{side or variant.name}: {command}{_where(variant)}{_seen(records)}", label="command")


def _where(variant: ScriptVariant) -> str:
    said = [f"cwd {variant.cwd}"] if variant.cwd else []
    said += [f"{name}={value}" for name, value in variant.env.items()]
    said += [f"python {variant.python}"] if variant.python else []
    return f" ({', '.join(said)})" if said else ""


def _seen(records: Iterable[TrialRecord]) -> str:
    """By what its steps were seen and how many there were; nothing where it did not come to that."""
    begun = [record for record in records if "source" in record.tokens]
    if not begun:
        return ""
    sources = sorted({SOURCES.get(str(one.tokens["source"]), str(one.tokens["source"])) for one in begun})
    steps = sorted({int(one.values["training_steps"]) for one in begun if "training_steps" in one.values})
    taken = f", {' or '.join(map(str, steps))} steps a trial" if steps else ""
    return f"; steps seen by {' and '.join(sources)}{taken}"
