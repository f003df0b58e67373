"""What a report says of a run before its numbers: machine, software, workload, plan, level and state, a line each."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from lorameter.machine.provenance import power_limit_w
from lorameter.records.store import Run
from lorameter.records.units import format_count
from lorameter.report.blocks import Line, say
from lorameter.report.phrases import say_adapters, say_request
from lorameter.studies.from_run import read_own_workloads
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.studies.variant import ScriptVariant
from lorameter.studies.workload import LOSSES, Workload
from lorameter.verdicts.sites import is_mixed, say_machines
from lorameter.verdicts.software import say_threads, versions_of
from lorameter.verdicts.validity import is_single_script_run

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
SOURCES = {"trainer": "a Trainer", "loop": "a loop that names its steps", "optimizer": "updates of an optimizer"}
"""What steps were recognised by, in words."""
_STATES = {
    "running": "under way: a process is measuring it",
    "killed": "its process was killed",
    "interrupted": "stopped by the user",
    "failed": "ended by an error; the logs say which",
}


def facts_of(run: Run, study: Study) -> tuple[Line, ...]:
    """The facts of a run, each with its label."""
    return tuple(say(text, label=label) for label, text in _facts(run, study))


def _facts(run: Run, study: Study) -> Iterator[tuple[str, str]]:
    manifest, protocol, provenance = run.manifest, study.protocol, run.manifest.provenance
    device, name = (provenance.get(key, "unknown") for key in ("device", "device_name"))
    name = say_machines(run.records) if is_mixed(run) else name
    limit, default = (power_limit_w(provenance, which) for which in ("power_limit_w", "default_power_limit_w"))
    power = "" if limit is None else f", power limit {limit} W{'' if default is None else f' of {default} W'}"
    yield "device", f"{name} ({device}, {say_threads(provenance, run.records)}){power}"
    reported, git = versions_of(provenance, run.records), provenance.get("git", {})
    versions = ", ".join(f"{library} {reported.get(library)}" for library in LIBRARIES)
    changes = " with local changes" if git.get("dirty") else ""
    commit = f"commit {git['commit'][:10]}{changes}" if git.get("commit") else "no repository"
    yield "software", f"{versions}, Python {reported['python'] or 'unknown'}; {commit}"
    if study.of_scripts:
        yield from (("command", text) for text in _commands(run, study))
    else:
        yield "workload", _workload(study.workload, str(manifest.tokens.get("data", study.workload.data)))
        yield "tokens", _tokens(manifest.tokens)
    for name, workload in read_own_workloads(run).items():
        pairs = ((field.name, getattr(workload, field.name)) for field in dataclasses.fields(workload))
        changed = ", ".join(f"{key} = {value}" for key, value in pairs if value != getattr(study.workload, key))
        yield "own", f"{name} has {changed}; {_tokens(manifest.tokens.get('own', {}).get(name, {}))}"
    steps = format_count(protocol.turns * protocol.steps_per_turn, "timed step")
    yield "plan", f"{_replicates(run)}, {steps} a trial, order seed {manifest.seed}"
    isolated = any(record.interleaving != manifest.interleaving for record in run.records)
    why = f": {manifest.why}" if manifest.why else ""
    exceptions = "; peaks and what needs its own base: isolated trials" if isolated else ""
    yield "level", f"{manifest.interleaving}{why}{exceptions}"
    if manifest.stopped:
        yield "stopped", manifest.stopped
    if run.state != "complete":
        ended = f"{sum(record.settled for record in run.records)} of {len(manifest.order)} trials have ended"
        resumable = run.state != "running" and not is_single_script_run(run, study)
        resume = f". Resume: lorameter run --resume {manifest.run}" if resumable else ""
        yield "status", f"{_STATES[run.state]}; {ended}{resume}"
    if manifest.resumed:
        times = (time.strftime("%Y-%m-%d %H:%M", time.localtime(one.unix_s)) for one in manifest.resumed)
        yield "resumed", ", ".join(times)


def _workload(workload: Workload, data: str) -> str:
    ranks = ""
    if workload.ranks > 1:
        mended = f", bitsandbytes mended: {workload.repair}" if workload.repair else ""
        ranks = f", by {workload.ranks} ranks ({workload.strategy}{mended})"
    loss = "" if workload.loss == "all" else f", {LOSSES[workload.loss]}"
    return (
        f"{workload.model}; {data}; {workload.batch_size} × {workload.sequence_length} tokens a batch, "
        f"{workload.layout}{ranks}{loss}; {say_request(workload)} tokens a request{say_adapters(workload)}"
    )


def _tokens(tokens: Mapping[str, Any]) -> str:
    loss = f", loss over {tokens['loss_tokens']}" if "loss_tokens" in tokens else ""
    if without := tokens.get("without_loss"):
        loss += f" ({format_count(without, 'sequence')} without a label left out)"
    real, padded = tokens.get("real_tokens", 0), tokens.get("padded_tokens", 0)
    return f"{real} real and {padded} padded in an epoch{loss}, hash {str(tokens.get('hash', ''))[:12]}"


def _replicates(run: Run) -> str:
    """The replicates of a run; of an incomplete run those whose trials have all ended."""
    planned: dict[str, set[str]] = defaultdict(set)
    for trial in run.manifest.order or (record.trial for record in run.records):
        planned[trial.partition("-")[0]].add(trial)
    settled = {record.trial for record in run.records if record.settled}
    whole = sum(trials <= settled for trials in planned.values())
    if whole == len(planned):
        return format_count(whole, "replicate")
    return f"{whole} of {len(planned)} replicates complete"


def _commands(run: Run, study: Study) -> Iterator[str]:
    """Each command, of an A/B of commands on each side: where it ran, what its steps were recognised by, how many."""
    sides = {name: side for name, side in run.manifest.sides.items() if side.get("kind") == SIDE}
    for variant in study.scripts:
        for side in sides or {"": {}}:
            records = [one for one in run.records if one.name == variant.name and (not side or one.side == side)]
            command = str(sides[side].get("spec")) if side else variant.command
            begun = [record for record in records if "source" in record.tokens]
            found = sorted({SOURCES.get(str(one.tokens["source"]), str(one.tokens["source"])) for one in begun})
            counts = sorted({int(one.values["training_steps"]) for one in begun if "training_steps" in one.values})
            seen = f"; steps seen by {' and '.join(found)}" if found else ""
            taken = f", {' or '.join(map(str, counts))} steps a trial" if counts else ""
            yield f"{side or variant.name}: {command}{_place(variant)}{seen}{taken}"


def _place(variant: ScriptVariant) -> str:
    said = [f"cwd {variant.cwd}"] if variant.cwd else []
    said += [f"{name}={value}" for name, value in variant.env.items()]
    said += [f"python {variant.python}"] if variant.python else []
    return f" ({', '.join(said)})" if said else ""
