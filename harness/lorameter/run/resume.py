"""Resumes an interrupted run with its own plan, on the same machine, and measures only missing trials.

The manifest contains everything that determines the plan (the study, the selection, the phases, the level and the
seed), so the plan is made again, here or in a job on another machine; it must have the same trials. Machine, libraries,
workload and tokens must also be the same, because trials of one run are compared. Another version of the harness is
only reported: a run of several days must survive an unrelated fix.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from lorameter.errors import require
from lorameter.machine import provenance
from lorameter.machine.provenance import HARDWARE_FIELDS, MachineFacts, git_state
from lorameter.records import codec, store
from lorameter.records.fileio import describe_other_writer
from lorameter.records.record import SIDES, Notice, Side
from lorameter.records.store import Manifest, Resumption, Run
from lorameter.run.plan import PRESENT, Plan, PlanSpec, SideSpec, read_plan
from lorameter.run.workers.environment import restore_spec
from lorameter.studies.script import SIDE
from lorameter.studies.study_file import read_own_workloads, read_study
from lorameter.verdicts.compare import find_differences


def read_trusted_manifest(run: Run, *, trust: bool) -> Manifest:
    """The manifest of a run to resume. Raises `UsageError` if resuming would execute commands that another user may
    have written, unless `trust` is true."""
    sides, manifest = run.manifest.sides.values(), run.manifest
    if trust or (read_study(run).supports("built") and all(side["kind"] == PRESENT for side in sides)):
        return manifest

    def check(file: BinaryIO) -> None:
        why = describe_other_writer(file)
        require(
            not why,
            f"run {manifest.run}: resuming it would execute the commands in {run.path / store.MANIFEST}, and {why}. "
            "Read them there, then resume it by lorameter run with --trust.",
        )

    return store.read_manifest(run.path, check)  # again, because the first file may have been replaced


SIDE_FIELDS = ("python", "libraries", "cuda", "packages")
"""Provenance of a side that must be equal for all its parts, measured at different times or places."""


def is_calibration(manifest: Manifest) -> bool:
    """Whether a run is an A/B of the measuring interpreter with itself."""
    return {side["kind"] for side in manifest.sides.values()} == {PRESENT}


def is_finished(run: Run) -> bool:
    """Whether no trial of a run remains to be measured: each has ended regularly, none was disturbed, and no line of
    the file is damaged."""
    settled = {record.trial for record in run.records if record.settled and not record.disturbed}
    return run.manifest.status == "complete" and not run.damaged_lines and settled >= set(run.manifest.order)


def check_same(run: Run, facts: Mapping[str, MachineFacts]) -> None:
    """Raise `UsageError` if the machine, or a side of an A/B, has changed; `facts` are by side."""
    for name, side in run.manifest.sides.items():
        if side["kind"] not in (PRESENT, SIDE):
            fields = (*SIDE_FIELDS, *(("git",) if side["kind"] == "revision" else ()))
            now = codec.to_json(facts[name].host or {})
            then, is_now = (
                {field: facts_of_side.get(field) for field in fields} for facts_of_side in (side["facts"], now)
            )
            _require_same(run, f"its {name}", then, is_now)
    check_place(run, next(iter(facts.values())))


def _require_same(run: Run, what: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changes = "; ".join(f"{one.field}: {one.base!r} then, {one.candidate!r} now" for one in find_differences(was, now))
    require(
        was == now,
        f"run {run.manifest.run}: it cannot be resumed here, because {what} would change during the run: {changes}. "
        "Resume it on the original machine with the original packages, or measure a new run.",
    )


def check_place(run: Run, facts: MachineFacts) -> None:
    """Raise `UsageError` if the machine or the libraries differ from those of the run.

    `facts` are the current ones; for an A/B those of the base, whose declared fields may differ. If the run has
    different sites, any of them is accepted.
    """
    manifest, study = run.manifest, read_study(run)
    here = provenance.collect(study, facts, study.workload.threads, own_workloads=read_own_workloads(run))
    without = [name for side in manifest.sides.values() for name in side["declared"]]
    without += HARDWARE_FIELDS if study.protocol.mixed else ()
    was, now = (
        codec.to_json(provenance.fingerprint_fields(one, without=without)) for one in (manifest.provenance, here)
    )
    _require_same(run, "its trials", was, now)


def restore_plan(run: Run, facts: MachineFacts | None, *, remote: bool, max_minutes: float | None = None) -> Plan:
    """The original plan of a run.

    Args:
        run: the run.
        facts: of the machine that measures the rest; None for an A/B, whose sides are not prepared yet.
        remote: whether this is another machine than the current one.
        max_minutes: replaces the study's limit; the limit counts from now.

    Raises:
        UsageError: the run is of another machine, a side cannot be named without a credential, or this version makes
            another plan.
    """
    manifest = run.manifest
    if facts is not None:
        check_place(run, facts)
    require(
        not (is_calibration(manifest) and remote),
        f"run {manifest.run} is a calibration, which measures the current machine. Use --on here.",
    )
    sides: dict[Side, SideSpec] = {
        name: SideSpec(
            kind=side["kind"],
            spec=restore_spec(f"run {manifest.run}, {name}", side["spec"]),
            label=side["label"],
            slowdown_rows=side["slowdown_rows"],
        )
        for name in SIDES
        if (side := manifest.sides.get(name))
    }
    plan = read_plan(
        PlanSpec(
            study=manifest.study,
            phases=manifest.phases,
            selection=manifest.selection,
            interleaving=manifest.interleaving,  # type: ignore[arg-type]
            why=manifest.why,
            order=manifest.order,
            trials=manifest.order,
            sides=sides,
        )
    )
    if max_minutes is None:
        return plan
    return dataclasses.replace(plan, study=plan.study.with_protocol(max_minutes=max_minutes))


def _hashes(tokens: Mapping[str, Any]) -> dict[str, str]:
    """The hash of a run's tokens, and of the tokens of variants with their own workload, by a name for messages."""
    own = {f"the tokens of {name}": str(one.get("hash")) for name, one in tokens.get("own", {}).items()}
    return {"the tokens": str(tokens.get("hash")), **own}


def mark_complete(run: Run) -> Run:
    """Mark a run as complete if all its trials are recorded: a damaged line repeated other lines, or its process was
    killed after the last trial."""
    again = Resumption(
        unix_s=time.time(), harness=provenance.harness_identity(), commit=git_state(Path.cwd())["commit"]
    )
    manifest = msgspec.structs.replace(run.manifest, status="running", resumed=(*run.manifest.resumed, again))
    store.RunWriter(run.path.parent, manifest).finish("complete", stopped=run.manifest.stopped)
    return store.read_run(str(run.path), run.path.parent)


def continue_manifest(manifest: Manifest, begun: Manifest, max_minutes: float | None) -> Manifest:
    """The manifest of a resumed run: running again, with the current time and harness version, and with the bases and
    notices of both.

    Args:
        manifest: the manifest of the interrupted run.
        begun: a manifest as if the run began now, with the current provenance and the newly prepared tokens.
        max_minutes: the time limit from now on.

    Raises:
        UsageError: the tokens differ from those at the start of the run.
    """
    now, facts = _hashes(begun.tokens), begun.provenance
    for which, before in _hashes(manifest.tokens).items():
        require(
            now.get(which) == before,
            f"run {manifest.run}: {which} have the hash {str(now.get(which))[:12]} now and had {before[:12]}: "
            "the data or the tokenizer has changed. Restore it, or measure a new run.",
        )
    harness = facts["worker"]["harness"]
    earlier = [manifest.provenance.get("worker", {}).get("harness"), *(one.harness for one in manifest.resumed)]
    again = Resumption(unix_s=time.time(), harness=harness, commit=facts["git"]["commit"], max_minutes=max_minutes)
    notices = [*manifest.notices, *begun.notices]
    if harness != earlier[-1]:
        notices.append(
            Notice(
                code="harness-version-changed",
                message=f"the run was resumed by harness {harness}; before it was {earlier[-1]}.",
                remedy="Measure a new run if a change between the versions affects a number.",
            )
        )
    return msgspec.structs.replace(
        manifest,
        status="running",
        resumed=(*manifest.resumed, again),
        bases=(*manifest.bases, *begun.bases),
        notices=tuple(dict.fromkeys(notices)),
        spending=None,
    )
