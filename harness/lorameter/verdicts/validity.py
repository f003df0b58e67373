"""The validity of a run: for which reasons it, or one of its variants, does not count.

It is decided here and nowhere else. A report, a comparison, the gate, a baseline, an export and the pytest session ask
`run_validity`; the runner asks `mark_disturbed` of each trial that has ended.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorameter.machine.disturbances import Disturbance, judge
from lorameter.records.metrics import PHASES, Phase, primary_metric
from lorameter.records.record import DISTURBED, Failure, Notice, Side, TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import first_few, format_count
from lorameter.stats import Comparison
from lorameter.studies.study import Study
from lorameter.verdicts.series import compare_base_to_itself, control_of, group_trials, is_difference, occupancy
from lorameter.verdicts.sites import is_mixed, runs_of_sites, unmeasured_sites

PHASE_OF_PART: dict[str, Phase] = {"requests": "generate", "cold": "cold"}
"""Parts of a replicate that a time limit can leave out, each with the phase that needs it."""
MOST_FAULTS = 3
"""Faults that are spelt out; a crash at the start of every trial has as many as there are trials."""
WATCHED: dict[str, str] = {"train": "training", "generate": "generating"}
"""The phases whose surroundings are watched, as words."""


class InvalidReason(enum.StrEnum):
    """Why a run, or one of its variants, does not count."""

    INCOMPLETE = "incomplete"
    """The run was killed, interrupted or failed, or is under way."""
    DAMAGED_LINES = "damaged-lines"
    NO_RECORD = "no-record"
    """A planned trial left no record."""
    CONTROL_FAILED = "control-failed"
    """A trial of the A/A control is not ok."""
    CONTROL_NOT_MEASURED = "control-not-measured"
    CONTROL_DIFFERS = "control-differs"
    """The reference differs from itself."""
    SITE_NOT_MEASURED = "site-not-measured"
    """A site has measured nothing: the others do not speak for it."""
    TRIAL_FAILED = "trial-failed"
    """A trial crashed, ran out of memory or time, or ended invalid."""
    DISTURBED = "disturbed"
    """The surroundings of a trial were past a limit."""
    PATH_INACTIVE = "path-inactive"
    """A required path was not active."""
    VARIANT_CHANGED = "variant-changed"
    """Trials of one name are of different variants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One reason, in words."""

    reason: InvalidReason
    message: str
    variant: str = ""
    """The variant whose numbers do not count; empty: all variants."""
    side: Side = ""
    site: str = ""
    """The site that it is limited to, where sites are different machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunValidity:
    """Whether a run counts, by its records and controls."""

    run: str
    primary: Mapping[Phase, str]
    """The metric that variants are compared by, of each phase that was measured."""
    controls: Mapping[Phase, Comparison | None]
    """The reference against itself measured twice, by phase; None: it should have been measured and was not."""
    faults: tuple[Fault, ...]
    """Those of the whole run first."""
    failures: tuple[str, ...]
    """Trials without a result, each with its reason and log, and trials that left no record."""

    @property
    def valid(self) -> bool:
        """Whether every trial is ok, no line is lost, every required path was active, and every control is there and
        shows no difference."""
        return not self.faults

    @property
    def invalid(self) -> str | None:
        """The first few reasons why the run is invalid and none of its verdicts counts; None where it is valid."""
        return say_faults(self.faults) if self.faults else None

    @property
    def broken(self) -> str | None:
        """Why no number of the run counts; None where they do."""
        return self.broken_variant("")

    def broken_variant(self, name: str, side: Side = "") -> str | None:
        """Why no number of a variant counts, in addition to `broken`; None where they do."""
        message = say_faults([one for one in self.faults if (one.variant, one.side, one.site) == (name, side, "")])
        return f"run {self.run}: {message}" if message else None


def say_faults(faults: Sequence[Fault]) -> str:
    """The first few faults, and how many more there are; empty where there is none."""
    return first_few([fault.message for fault in faults], MOST_FAULTS, "; ") if faults else ""


def run_validity(run: Run, study: Study) -> RunValidity:
    """The validity of a run; one whose sites are unlike is valid if each of them is, and its controls are in these.

    Raises nothing for missing trials: they are faults.
    """
    primary: Mapping[Phase, str] = {
        phase: primary_metric(phase, own_workloads=bool(run.manifest.own_workloads)) for phase in phases_of(run)
    }
    controls: dict[Phase, Comparison | None] = {}
    faults = list(_run_faults(run))
    if is_mixed(run):
        sites = {site: run_validity(part, study) for site, part in runs_of_sites(run).items()}
        primary = next((one.primary for one in sites.values()), {})
        for site, its in sites.items():
            of_site = control_faults((f"{phase} on {site}", control) for phase, control in its.controls.items())
            faults += [dataclasses.replace(fault, site=site) for fault in of_site]
        faults += [Fault(reason=InvalidReason.SITE_NOT_MEASURED, message=one) for one in unmeasured_sites(run)]
    else:
        if run.manifest.sides:
            controls = compare_base_to_itself(run.records, phases_of(run))
        else:
            groups = group_trials(run.records)
            controls = {
                phase: control_of(groups, study.reference, metric, family=len(primary))
                for phase, metric in primary.items()
            }
        faults += () if is_single_script_run(run, study) else control_faults(controls.items())
    return RunValidity(
        run=run.manifest.run,
        primary=primary,
        controls=controls,
        faults=(*faults, *_variant_faults(run, study)),
        failures=tuple(_failures(run)),
    )


def is_single_script_run(run: Run, study: Study) -> bool:
    """Whether it is the run of one training that was followed in place, which has no control."""
    return study.of_scripts and len(run.manifest.order) == 1 and not run.manifest.sides


def phases_of(run: Run) -> tuple[Phase, ...]:
    """The phases that a run measured, in the order in which they are shown, without those that the time limit
    dropped."""
    skipped = {phase for part, phase in PHASE_OF_PART.items() if part in run.manifest.skipped}
    return tuple(phase for phase in PHASES if phase in run.manifest.phases and phase not in skipped)


def control_faults(controls: Iterable[tuple[str, Comparison | None]]) -> Iterator[Fault]:
    """The faults that the A/A controls reveal, which concern all numbers; each control comes with its phase or
    metric."""
    for phase, control in controls:
        if control is None:
            yield Fault(
                reason=InvalidReason.CONTROL_NOT_MEASURED, message=f"the control of phase {phase!r} was not measured"
            )
        elif is_difference(control):
            message = f"its control {control.verdict} in phase {phase!r}: the reference differs from itself"
            yield Fault(reason=InvalidReason.CONTROL_DIFFERS, message=message)


def discounted(found: Comparison, invalid: str | None) -> Comparison:
    """A comparison as it counts in its run: in one that is invalid its numbers stay, and its verdict is `invalid`."""
    if invalid is None:
        return found
    return dataclasses.replace(found, verdict="invalid", reason=f"the run is invalid: {invalid}")


def _run_faults(run: Run) -> Iterator[Fault]:
    missing = _without_record(run)
    among = f"{format_count(len(missing), 'planned trial')} without a record, {''.join(missing[:1])} among them"
    damaged = f"{format_count(run.damaged_lines, 'line')} of trials.jsonl damaged"
    status = run.manifest.status
    for holds, reason, message in (
        (status == "complete", InvalidReason.INCOMPLETE, f"its status is {status!r}, not 'complete'"),
        (not run.damaged_lines, InvalidReason.DAMAGED_LINES, damaged),
        (not missing, InvalidReason.NO_RECORD, among),
        *(
            (
                record.status == "ok",
                InvalidReason.CONTROL_FAILED,
                f"trial {record.trial} of the control is {record.status}",
            )
            for record in run.records
            if record.role == "control"
        ),
    ):
        if not holds:
            yield Fault(reason=reason, message=message)


def _variant_faults(run: Run, study: Study) -> Iterator[Fault]:
    """Trials that did not end well, or without a path that is required; those of the control are faults of the run."""
    identities: dict[tuple[str, Side], set[str]] = {}
    for record in run.records:
        identities.setdefault((record.name, record.side), set()).add(record.variant)
        reason, messages = InvalidReason.PATH_INACTIVE, list[str]()
        if record.status != "ok":
            reason = InvalidReason.DISTURBED if record.disturbed else InvalidReason.TRIAL_FAILED
            messages = [] if record.role == "control" else [f"trial {record.trial} is {_ending(record)}"]
        elif not study.allow_fallback:
            messages = [
                f"trial {record.trial}: required path {check.get('path')} is {check.get('status')}, not active"
                for check in record.checks
                if check.get("required") is not None and check.get("status") != "active"
            ]
        yield from (Fault(reason=reason, message=one, variant=record.name, side=record.side) for one in messages)
    for (name, side), found in identities.items():
        if len(found) > 1:
            message = f"the trials of {name} are of {len(found)} different variants"
            yield Fault(reason=InvalidReason.VARIANT_CHANGED, message=message, variant=name, side=side)


def _failures(run: Run) -> Iterator[str]:
    for record in run.records:
        if record.status != "ok":
            yield f"{record.trial}: {_ending(record)} (log: {record.log})"
    if missing := _without_record(run):
        yield f"{first_few(missing, 3)}: no record (the run is {run.state})"


def _without_record(run: Run) -> list[str]:
    known = {record.trial for record in run.records}
    return [trial for trial in run.manifest.order if trial not in known]


def _ending(record: TrialRecord) -> str:
    failure = record.failure
    return record.status + (f" in {failure.phase}: {failure.message}" if failure else "")


def disturbances_of(record: TrialRecord, *, on_cpu: bool) -> Iterator[tuple[str, Disturbance]]:
    """The disturbances of a trial by its surroundings (other jobs, heat, swapping), each with its phase.

    Only the surroundings are judged: a rule that looked at the times would select them. A CPU of which a training
    trial of one thread had too little is left to the notice on occupancy, which counts for every such trial, unless
    the trial is to be measured again for it.
    """
    in_turns = record.interleaving in ("shared-base", "lockstep")
    for phase in WATCHED:
        share = occupancy(record) if on_cpu and phase == "train" else None
        for disturbance in judge(record.values, record.memory, phase, in_turns=in_turns, occupancy=share):
            if disturbance.code != "cpu-contention" or share is None or disturbance.invalid:
                yield phase, disturbance


def mark_disturbed(record: TrialRecord, *, on_cpu: bool) -> TrialRecord:
    """The record itself, or as invalid where its surroundings were past a limit; the samples stay in it."""
    past = [(phase, one) for phase, one in disturbances_of(record, on_cpu=on_cpu) if one.invalid]
    if record.status != "ok" or not past:
        return record
    message = "; ".join(f"while {WATCHED[phase]} {one.message}" for phase, one in past)
    return record.replaced(status="invalid", failure=Failure(phase=past[0][0], kind=DISTURBED, message=message))


def disturbance_notices(records: Sequence[TrialRecord], *, on_cpu: bool) -> Iterator[Notice]:
    """A notice for each kind of disturbance, those past a limit first."""
    found = [(record, phase, one) for record in records for phase, one in disturbances_of(record, on_cpu=on_cpu)]
    found.sort(key=lambda one: (not one[2].invalid, -one[2].weight))
    for code in dict.fromkeys(disturbance.code for _, _, disturbance in found):
        alike = [one for one in found if one[2].code == code]
        worst, phase, disturbance = alike[0]
        past = sorted({record.trial for record, _, other in alike if other.invalid})
        trials = len({record.trial for record, _, _ in alike})
        message = f"{trials} of {len(records)} trials; {worst.trial} while {WATCHED[phase]}: {disturbance.message}."
        message += f" Past the limit: {first_few(past, 3)}." if past else ""
        yield Notice(code=code, message=message, remedy=disturbance.remedy)
