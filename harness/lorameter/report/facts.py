"""What a report says first of a run: machine, software, workload, plan and level, a line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lorameter.machine.provenance import power_limit_w
from lorameter.records.store import Run
from lorameter.records.units import format_count
from lorameter.report.blocks import Line, say
from lorameter.report.phrases import say_adapters, say_request
from lorameter.report.progress import replicates_said, standing
from lorameter.report.scripts import describe_scripts
from lorameter.studies.from_run import read_own_workloads
from lorameter.studies.study import Study
from lorameter.studies.workload import LOSSES, Workload
from lorameter.verdicts.software import say_threads, versions_of


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
