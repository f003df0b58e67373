"""The validity of a run: what its controls say, which trials have no result, and whether it is valid as a whole.

All of these use it: the report, a comparison, the gate, a baseline, a tried remedy, the pytest session.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorameter.records.metrics import PHASES, PRIMARY, Phase, primary_metric
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import first_few, format_count
from lorameter.stats import Comparison, VerdictRule
from lorameter.studies.study import Study
from lorameter.verdicts.per_site import fault_of_sites, is_mixed, runs_of_sites
from lorameter.verdicts.series import (
    Groups,
    compare_series,
    compare_to_reference,
    downgrade_equivalent,
    effects_against,
    group_trials,
    is_difference,
)

PHASE_OF_PART: dict[str, Phase] = {"requests": "generate", "cold": "cold"}
"""Parts of a replicate that a time limit can leave out, each with the phase that is nothing without it."""
MOST_FAULTS = 3
"""Faults that are spelt out; a crash at the start of every trial has as many as there are trials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunValidity:
    """What is said of a run before any of its numbers."""

    run: str
    primary: Mapping[Phase, str]
    """The metric that variants are compared by, of each phase that was measured."""
    controls: Mapping[Phase, Comparison | None]
    """The reference against itself measured twice, by phase; None: it should have been measured and was not."""
    failures: tuple[str, ...]
    """Trials without a result, each with its reason, and trials that left no record."""
    faults: tuple[str, ...]
    """What makes every number doubtful; a trial that failed makes those of its variant so."""
    trials: tuple[str, ...] = ()
    """Trials that are not ok, or whose required path was not active: the numbers of their variants are doubtful."""

    @property
    def valid(self) -> bool:
        """Whether every trial is ok, no line is lost, every required path was active, every control is there and came
        out as no difference, and all of it is known to this version."""
        return self.invalid is None

    @property
    def invalid(self) -> str | None:
        """The first few reasons why the run is invalid and none of its verdicts counts; None where it is valid."""
        reasons = (*self.faults, *self.trials)
        return first_few(reasons, MOST_FAULTS, "; ") if reasons else None

    @property
    def broken(self) -> str | None:
        """Why no number counts; None where they do."""
        return say_broken(self.run, self.faults)


def run_validity(run: Run, study: Study) -> RunValidity:
    """The validity of a run by its records; one of unlike sites is valid if each of them is, and its controls
    are in these. Raises nothing for missing trials: what is not there is said."""
    if is_mixed(run):
        return _standing_of_sites(run, study)
    primary = {phase: primary_metric(phase, own_workloads=bool(run.manifest.own_workloads)) for phase in phases_of(run)}
    if run.manifest.sides:
        controls = compare_base_to_itself(run)
    else:
        groups = group_trials(run.records)
        controls = {
            phase: control_of(groups, study.reference, metric, family=len(primary)) for phase, metric in primary.items()
        }
    asked = () if is_single_script_run(run, study) else controls.items()
    return RunValidity(
        run=run.manifest.run,
        primary=primary,
        controls=controls,
        failures=(*_failures(run), *_missing(run)),
        faults=(*run_faults(run), *control_faults(asked)),
        trials=tuple(_trials(run, study)),
    )


def _standing_of_sites(run: Run, study: Study) -> RunValidity:
    sites = {site: run_validity(part, study) for site, part in runs_of_sites(run).items()}
    controls = [
        (f"{phase} on {site}", control) for site, stands in sites.items() for phase, control in stands.controls.items()
    ]
    return RunValidity(
        run=run.manifest.run,
        primary=next((stands.primary for stands in sites.values()), {}),
        controls={},
        failures=(*_failures(run), *_missing(run)),
        faults=(*run_faults(run), *control_faults(controls), *fault_of_sites(run)),
        trials=tuple(_trials(run, study)),
    )


def is_single_script_run(run: Run, study: Study) -> bool:
    """Whether it is the run of one training that was followed where it took place: there is no second one to be its
    control, and none is planned."""
    return study.of_scripts and len(run.manifest.order) == 1 and not run.manifest.sides


def run_faults(run: Run) -> Iterator[str]:
    """What makes every number of a run doubtful: it is not complete, lines or trials are missing."""
    if run.manifest.status != "complete":
        yield f"its status is {run.manifest.status!r}, not 'complete'"
    if run.damaged_lines:
        yield f"{format_count(run.damaged_lines, 'line')} of trials.jsonl damaged"
    if missing := _without_record(run):
        yield f"{format_count(len(missing), 'planned trial')} without a record, {missing[0]} among them"
    for record in run.records:
        if record.role == "control" and record.status != "ok":
            yield f"trial {record.trial} of the control is {record.status}"


def control_faults(controls: Iterable[tuple[str, Comparison | None]]) -> Iterator[str]:
    """What the controls of a side, each with its phase, say against all of its numbers."""
    for phase, control in controls:
        if control is None:
            yield f"the control of phase {phase!r} was not measured"
        elif is_difference(control):
            yield f"its control {control.verdict} in phase {phase!r}: the reference differs from itself"


def trial_faults(record: TrialRecord, study: Study) -> Iterator[str]:
    """What makes the numbers of a trial's variant doubtful: it did not end well, or without a path that is required."""
    if record.status != "ok":
        yield f"trial {record.trial} is {_ending(record)}"
    elif not study.allow_fallback:
        for check in record.checks:
            if check.get("required") is not None and check.get("status") != "active":
                yield f"trial {record.trial}: required path {check.get('path')} is {check.get('status')}, not active"


def discounted(found: Comparison, invalid: str | None) -> Comparison:
    """A comparison as it counts in its run: in one that is invalid its numbers stay, and its verdict is `invalid`."""
    if invalid is None:
        return found
    return dataclasses.replace(found, verdict="invalid", reason=f"the run is invalid: {invalid}")


def say_broken(run: str, faults: Sequence[str]) -> str | None:
    """The first few faults of a run, and how many more there are; None if there is none."""
    return f"run {run}: {first_few(faults, MOST_FAULTS, '; ')}" if faults else None


def phases_of(run: Run) -> tuple[Phase, ...]:
    """What a run measured, in the order in which phases are shown; not what the time limit left out."""
    skipped = {phase for part, phase in PHASE_OF_PART.items() if part in run.manifest.skipped}
    return tuple(phase for phase in PHASES if phase in run.manifest.phases and phase not in skipped)


def compare_base_to_itself(run: Run) -> dict[Phase, Comparison | None]:
    """The base of an A/B against itself, by phase; None where it was not measured."""
    groups, phases = group_trials(run.records, "base"), phases_of(run)
    twin = next((name for name, role in groups if role == "control"), "")
    base, again = groups.get((twin, "variant")), groups.get((twin, "control"))
    if base is None or again is None:
        return dict.fromkeys(phases)
    return {phase: compare_series(base, again, PRIMARY[phase], family=len(phases)) for phase in phases}


def control_of(groups: Groups, name: str, metric: str, *, family: int) -> Comparison | None:
    """The reference, by its name, against its second measurement; None where either has no trial."""
    if (name, "variant") not in groups:
        return None
    found = effects_against(groups, name, metric).get((name, "control"))
    return None if found is None else found.compare(VerdictRule(family=family))


def ratios_of(
    groups: Groups,
    study: Study,
    metric: str,
    control: Comparison | None,
    *,
    tolerance: float | Mapping[str, float] = 0.01,
    margin: float | Mapping[str, float] = 0.05,
) -> dict[str, Comparison]:
    """Every other variant against the reference, by name; none is equivalent where the control is not. Limits are
    fractions, of all or by name."""
    if (study.reference, "variant") not in groups:
        return {}
    found = compare_to_reference(groups, study.reference, metric, tolerance=tolerance, margin=margin)
    ratios = {variant.name: found[variant.name] for variant in study.variants if variant.name in found}
    if control is not None and control.verdict == "equivalent":
        return ratios
    reason = "A/A control inconclusive: equivalence cannot be claimed"
    return {name: downgrade_equivalent(ratio, reason) for name, ratio in ratios.items()}


def _failures(run: Run) -> Iterator[str]:
    for record in run.records:
        if record.status != "ok":
            yield f"{record.trial}: {_ending(record)} (log: {record.log})"


def _trials(run: Run, study: Study) -> Iterator[str]:
    """The faults of all trials; that one of the control is not ok is a fault of the run."""
    for record in run.records:
        if record.role != "control" or record.status == "ok":
            yield from trial_faults(record, study)


def _missing(run: Run) -> Iterator[str]:
    """Trials of the plan that left no record: the parent was killed, or the run is still going on."""
    if missing := _without_record(run):
        yield f"{first_few(missing, 3)}: no record (the run is {run.state})"


def _without_record(run: Run) -> list[str]:
    known = {record.trial for record in run.records}
    return [trial for trial in run.manifest.order if trial not in known]


def _ending(record: TrialRecord) -> str:
    failure = record.failure
    return record.status + (f" in {failure.phase}: {failure.message}" if failure else "")
