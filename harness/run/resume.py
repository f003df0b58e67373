"""A run that broke off is gone on with: its own plan, on the same machine, and only what is missing is measured.

The plan follows from the study, the selection, the phases, the level and the seed, all of which the manifest holds, so
it is made again; it must name the same trials. Machine, libraries, workload and tokens must be the same too, because
trials of one run are compared without asking. Another version of the harness is only said: a run of days must be able
to survive the mending of a defect elsewhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.machine import provenance
from harness.machine.provenance import Facts
from harness.records import codec, store
from harness.records.record import Notice
from harness.records.store import Manifest, Resumption, Run
from harness.run.contenders import contenders_of
from harness.run.plan import Plan, make_plan
from harness.studies.study import Study
from harness.studies.workload import Workload
from harness.verdicts.comparand import differences

SETTLED_OPTIONS = (
    "effort", "replicates", "profile", "model", "data", "variant", "phase", "interleave", "precision",
    "allow-disturbed",
)  # fmt: skip
"""Options of either door that make a study and its plan; a run that is gone on with has both."""


def refuse_settled(resume: str, options: Mapping[str, Any]) -> None:
    """Raises `UsageError`, by the name of the option that resumes, for options that the run has settled.

    `options` are those of the door by their names, with what was given for each: None, False and [] are nothing.
    """
    given = [name for name, value in options.items() if value not in (None, False, [])]
    if given:
        raise UsageError(
            f"{resume}: {', '.join(given)} would change the study or the plan, which the run holds. Leave the option "
            "out, or measure a new run."
        )


def read_broken_off(name: str, runs: Path, *, study: str | None = None) -> Run:
    """The run to go on with, by id or directory; one that is complete is given back as it is.

    Args:
        name: a run id, or a run directory.
        runs: the folder of runs.
        study: name of the study that the user believes it to be of; None to believe the run.

    Raises:
        UsageError: no such run, one of another study, or one that cannot be gone on with.
    """
    run = store.read_run(name, runs)
    manifest = run.manifest
    if study is not None and manifest.study.get("name") != study:
        raise UsageError(
            f"run {manifest.run} is of study {manifest.study.get('name')!r}, not {study!r}. Leave the study out: the "
            "run holds its own."
        )
    if manifest.sides:
        raise UsageError(
            f"run {manifest.run}: an A/B cannot be gone on with, because its sides were taken down when it broke off. "
            f"Measure it again; what there is, `lorameter report {manifest.run}` shows."
        )
    if run.live:
        raise UsageError(store.refusal_while_live(run.path))
    if run.path.resolve().name != manifest.run:
        raise UsageError(f"{run.path}: holds run {manifest.run}. Give the directory that name again.")
    return run


def study_of(run: Run) -> Study:
    """The study as the run's manifest holds it."""
    return codec.from_json(Study, run.manifest.study, f"run {run.manifest.run}")


def plan_again(run: Run, facts: Facts, *, max_minutes: float | None = None) -> Plan:
    """The plan of a run as it was made, on the machine on which it was made.

    Args:
        run: the run.
        facts: of the present one.
        max_minutes: a limit in place of the study's; either counts from now on.

    Raises:
        UsageError: another machine or other libraries, or a plan that comes out otherwise in this version.
    """
    manifest, study = run.manifest, study_of(run)
    own = codec.from_json(dict[str, Workload], manifest.own_workloads, f"run {manifest.run}")
    here = provenance.collect(study, facts, study.workload.threads, own_workloads=own)
    before = provenance.comparable(manifest.provenance)
    unknown = () if provenance.POWER_LIMIT in before else (provenance.POWER_LIMIT,)  # it was not recorded then
    if provenance.fingerprint(here, without=unknown) != manifest.fingerprint:
        before, now = codec.to_json(before), codec.to_json(provenance.comparable(here, without=unknown))
        said = "; ".join(f"{one.field}: {one.base!r} then, {one.candidate!r} now" for one in differences(before, now))
        raise UsageError(
            f"run {manifest.run}: it cannot be gone on with here, because its trials would be of two kinds: {said}. "
            "Go on where it began and with what was installed there, or measure a new run."
        )
    plan = make_plan(
        study,
        contenders=contenders_of(study, manifest.selection, own),
        phases=manifest.phases,
        interleaving=manifest.interleaving,  # type: ignore[arg-type]
        why=manifest.why,
    )
    if run.manifest.status != "complete" and tuple(slot.trial for slot in plan.slots) != manifest.order:
        raise UsageError(
            f"run {manifest.run}: this version of lorameter plans other trials than the one that began it. "
            "Go on with that version, or measure a new run."
        )
    return dataclasses.replace(plan, study=study.with_overrides(max_minutes=max_minutes))


def _hashes(tokens: Mapping[str, Any]) -> dict[str, str]:
    """The hash of a run's tokens, and of those of each variant with a workload of its own, by what they are called."""
    own = {f"the tokens of {name}": str(one.get("hash")) for name, one in tokens.get("own", {}).items()}
    return {"the tokens": str(tokens.get("hash")), **own}


def continue_manifest(
    manifest: Manifest, facts: Mapping[str, Any], tokens: Mapping[str, Any], max_minutes: float | None
) -> Manifest:
    """The manifest of a run from here on: under way again, with the time and the code that went on with it.

    Args:
        manifest: as it was when the run broke off.
        facts: provenance of now.
        tokens: what the manifest would say of the tokens as they were prepared now.
        max_minutes: the limit from now on.

    Raises:
        UsageError: the tokens are not those that the run began with.
    """
    now = _hashes(tokens)
    for which, before in _hashes(manifest.tokens).items():
        if now.get(which) != before:
            raise UsageError(
                f"run {manifest.run}: {which} have the hash {str(now.get(which))[:12]} now and had {before[:12]}: "
                "the data or the tokenizer has changed. Restore it, or measure a new run."
            )
    harness = facts["worker"]["harness"]
    earlier = [manifest.provenance.get("worker", {}).get("harness"), *(one.harness for one in manifest.resumed)]
    again = Resumption(unix_s=time.time(), harness=harness, commit=facts["git"]["commit"], max_minutes=max_minutes)
    notices = manifest.notices
    if harness != earlier[-1]:
        notices += (
            Notice(
                code="another-harness",
                message=f"the run was gone on with by harness {harness}; before it was {earlier[-1]}.",
                remedy="Measure a new run if what changed in between bears on a number.",
            ),
        )
    return dataclasses.replace(manifest, status="running", resumed=(*manifest.resumed, again), notices=notices)
