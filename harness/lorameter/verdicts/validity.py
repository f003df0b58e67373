"""Decides whether a run, or one of its variants, counts, and for which reasons it does not.

This module is the only place of that decision. Reports, comparisons, the gate, baselines, exports and the pytest
session call `run_validity`; the runner calls `mark_disturbed` for each trial that has ended.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorameter.machine.disturbances import Disturbance, judge
from lorameter.measurements.metrics import MEASURED_BY, PHASES, PRIMARY, Phase, primary_metric
from lorameter.records.record import DISTURBED, Failure, Notice, Side, TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import first_few, format_count
from lorameter.stats import Comparison
from lorameter.studies.study import Study
from lorameter.verdicts.series import (
    compare_control,
    group_trials,
    is_difference,
    is_mixed,
    occupancy,
    split_sites,
)

MAX_FAULTS = 3
"""Maximum faults that are listed; a crash at the start of every trial gives one fault per trial."""
WATCHED: dict[str, str] = {"train": "training", "generate": "generating"}
"""The phases whose disturbances are monitored, as words."""


class InvalidReason(enum.StrEnum):
    """Why a run, or one of its variants, does not count."""

    INCOMPLETE = "incomplete"
    """The run was killed, interrupted or failed, or is still running."""
    DAMAGED_LINES = "damaged-lines"
    NO_RECORD = "no-record"
    """A planned trial left no record."""
    CONTROL_FAILED = "control-failed"
    """A trial of the A/A control is not ok."""
    CONTROL_NOT_MEASURED = "control-not-measured"
    CONTROL_DIFFERS = "control-differs"
    """The reference differs from itself."""
    SITE_NOT_MEASURED = "site-not-measured"
    """A site has measured nothing, and the others cannot replace it."""
    TRIAL_FAILED = "trial-failed"
    """A trial crashed, ran out of memory or time, or ended invalid."""
    DISTURBED = "disturbed"
    """A disturbance of a trial exceeded a limit."""
    PATH_INACTIVE = "path-inactive"
    """A required path was not active."""
    VARIANT_CHANGED = "variant-changed"
    """Trials with one name belong to different variants."""


_QUIETER = "Stop other work on this machine, and measure again"
REMEDIES: dict[InvalidReason, str] = {
    InvalidReason.INCOMPLETE: "See its status",
    InvalidReason.DAMAGED_LINES: "Restore trials.jsonl, or measure again: lorameter run --resume {run}",
    InvalidReason.NO_RECORD: "Measure the others: lorameter run --resume {run}",
    InvalidReason.CONTROL_DIFFERS: _QUIETER,
    InvalidReason.DISTURBED: f"{_QUIETER}, or with --allow-disturbed",
    InvalidReason.PATH_INACTIVE: "Read the evidence of the check and make the path run, or set allow_fallback = true",
}
DEFAULT_REMEDY = "Read the trial's log, correct its cause or leave the variant out, and measure again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One reason, as text."""

    reason: InvalidReason
    message: str
    variant: str = ""
    """The variant whose numbers do not count; empty: all variants."""
    side: Side = ""
    site: str = ""
    """The site to which it is limited, if sites are different machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunValidity:
    """Whether a run counts, according to its records and controls."""

    run: str
    primary: Mapping[Phase, str]
    """The metric by which variants are compared, for each measured phase."""
    controls: Mapping[Phase, Comparison | None]
    """The reference compared with its second measurement, by phase; None if it should have been measured but was
    not."""
    faults: tuple[Fault, ...]
    """Faults, those of the whole run first."""
    failures: tuple[str, ...]
    """Trials without a result, each with its reason and log, and trials that left no record."""

    @property
    def valid(self) -> bool:
        """Whether every trial is ok, no line is lost, every required path was active, and every control exists and
        shows no difference."""
        return not self.faults

    @property
    def invalid(self) -> str | None:
        """The first few reasons why the run is invalid and none of its verdicts counts; None if it is valid."""
        return format_faults(self.faults) if self.faults else None

    @property
    def remedy(self) -> str:
        """What to do about the first reason; empty if the run is valid."""
        found = [REMEDIES.get(fault.reason, DEFAULT_REMEDY) for fault in self.faults[:1]]
        return "".join(found).format(run=self.run) + "." * len(found)

    @property
    def broken(self) -> str | None:
        """Why no number of the run counts; None if they count."""
        return self.broken_variant("")

    def broken_variant(self, name: str, side: Side = "") -> str | None:
        """Why no number of a variant counts, in addition to `broken`; None if they count."""
        message = format_faults([one for one in self.faults if (one.variant, one.side, one.site) == (name, side, "")])
        return f"run {self.run}: {message}" if message else None


def format_faults(faults: Sequence[Fault]) -> str:
    """The first few faults, and the number of the others; empty if there are none."""
    return first_few([fault.message for fault in faults], MAX_FAULTS, "; ") if faults else ""


def run_validity(run: Run, study: Study) -> RunValidity:
    """The validity of a run. If its sites differ, it is valid if each of them is, and the controls are those of the
    sites.

    Missing trials raise no exception: they are faults.
    """
    has_sides = bool(run.manifest.sides)
    own_workloads = bool(run.manifest.own_workloads) and not has_sides
    primary = {phase: primary_metric(phase, own_workloads=own_workloads) for phase in measured_phases(run)}
    controls: dict[Phase, Comparison | None] = {}
    faults = list(_run_faults(run))
    if is_mixed(run):
        sites = {site: run_validity(part, study) for site, part in split_sites(run).items()}
        for site, validity in sites.items():
            of_site = control_faults((f"{phase} on {site}", control) for phase, control in validity.controls.items())
            faults += [dataclasses.replace(fault, site=site) for fault in of_site]
        measured = {record.site for record in run.records if record.status == "ok"}
        faults += [
            Fault(reason=InvalidReason.SITE_NOT_MEASURED, message=f"site {site} has measured nothing")
            for site in run.manifest.sites
            if site not in measured
        ]
    else:
        groups, reference = group_trials(run.records, "base" if has_sides else ""), study.reference
        if has_sides:  # the variants of an A/B are not compared with each other, so they share no scatter
            reference = next((name for name, role in groups if role == "control"), "")
            groups = {key: series for key, series in groups.items() if key[0] == reference}
        controls = {
            phase: compare_control(groups, reference, metric, family=len(primary), alpha=study.protocol.alpha)
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
    """Whether it is the run of a single training measured in place, which has no control."""
    return study.supports("own training") and len(run.manifest.order) == 1 and not run.manifest.sides


def measured_phases(run: Run) -> tuple[Phase, ...]:
    """The phases that a run measured, in display order, without those that the time limit dropped."""
    skipped = {phase for phase, metric in PRIMARY.items() if MEASURED_BY[metric] in run.manifest.skipped}
    return tuple(phase for phase in PHASES if phase in run.manifest.phases and phase not in skipped)


def control_faults(controls: Iterable[tuple[str, Comparison | None]]) -> Iterator[Fault]:
    """The faults shown by the A/A controls, which concern all numbers; each control comes with its phase or metric."""
    for phase, control in controls:
        if control is None or control.verdict == "invalid":
            why = "was not measured" if control is None else f"is invalid: {control.reason}"
            message = f"the control of phase {phase!r} {why}"
            yield Fault(reason=InvalidReason.CONTROL_NOT_MEASURED, message=message)
        elif is_difference(control):
            message = f"its control {control.verdict} in phase {phase!r}: the reference differs from itself"
            yield Fault(reason=InvalidReason.CONTROL_DIFFERS, message=message)


def mark_invalid(found: Comparison, invalid: str | None) -> Comparison:
    """A comparison as it counts in its run: in an invalid run its numbers stay, and its verdict is `invalid`."""
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
    """Trials that failed, or lack a required path; those of the control are faults of the run."""
    identities: dict[tuple[str, Side], set[str]] = {}
    trials: dict[tuple[InvalidReason, str, str, Side], list[str]] = {}
    for record in run.records:
        identities.setdefault((record.name, record.side), set()).add(record.variant)
        reason, messages = InvalidReason.PATH_INACTIVE, list[str]()
        if record.status != "ok":
            reason = InvalidReason.DISTURBED if record.disturbed else InvalidReason.TRIAL_FAILED
            messages = [] if record.role == "control" else [_ending(record)]
        elif not study.allow_fallback:
            messages = [
                f"required path {check.get('path')} is {check.get('status')}, not active"
                for check in record.checks
                if check.get("required") is not None and check.get("status") != "active"
            ]
        for message in messages:
            trials.setdefault((reason, message, record.name, record.side), []).append(record.trial)
    for (reason, message, name, side), alike in trials.items():
        yield Fault(reason=reason, message=f"trial {first_few(alike, 1)}: {message}", variant=name, side=side)
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


def find_disturbances(record: TrialRecord, *, on_cpu: bool) -> Iterator[tuple[str, Disturbance]]:
    """The disturbances of a trial by its environment (other jobs, heat, swapping), each with its phase.

    Only external conditions are judged, never the times: such a rule would bias them. Too little CPU time of a
    single-threaded training trial is left to the notice on occupancy, which covers all such trials, unless the trial
    must be measured again because of it.
    """
    in_turns = record.interleaving in ("shared-base", "lockstep")
    for phase in WATCHED:
        share = occupancy(record) if on_cpu and phase == "train" else None
        for disturbance in judge(record.values, record.memory, phase, in_turns=in_turns, occupancy=share):
            if disturbance.code != "cpu-contention" or share is None or disturbance.invalid:
                yield phase, disturbance


def mark_disturbed(record: TrialRecord, *, on_cpu: bool) -> TrialRecord:
    """The record, unchanged or marked as invalid if a disturbance exceeded a limit; the samples stay in it."""
    past = [
        (phase, disturbance) for phase, disturbance in find_disturbances(record, on_cpu=on_cpu) if disturbance.invalid
    ]
    if record.status != "ok" or not past:
        return record
    message = "; ".join(f"while {WATCHED[phase]} {disturbance.message}" for phase, disturbance in past)
    return record.replaced(status="invalid", failure=Failure(phase=past[0][0], kind=DISTURBED, message=message))


def disturbance_notices(records: Sequence[TrialRecord], *, on_cpu: bool) -> Iterator[Notice]:
    """A notice for each kind of disturbance, those beyond a limit first."""
    found = [(record, phase, one) for record in records for phase, one in find_disturbances(record, on_cpu=on_cpu)]
    found.sort(key=lambda one: (not one[2].invalid, -one[2].weight))
    for code in dict.fromkeys(disturbance.code for _, _, disturbance in found):
        alike = [one for one in found if one[2].code == code]
        worst, phase, disturbance = alike[0]
        past = sorted({record.trial for record, _, other in alike if other.invalid})
        trials = len({record.trial for record, _, _ in alike})
        message = f"{trials} of {len(records)} trials; {worst.trial} while {WATCHED[phase]}: {disturbance.message}."
        message += f" Past the limit: {first_few(past, 3)}." if past else ""
        yield Notice(code=code, message=message, remedy=disturbance.remedy)
