"""Tries the remedy of a finding: compares the suggested variant with the current one.

A rule estimates the cost of a cause; only a comparison with the replacement shows the gain. So the remedy becomes a
variant with the current variant as its reference, and control, verdict and interval are those of any study. A remedy
that changes the workload is the same variant on another workload: the two are compared by the time per real token,
since their steps hold different numbers of tokens, and not by their losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lorameter.errors import UsageError
from lorameter.measurements.metrics import METRICS, Phase
from lorameter.profile.rules import Finding
from lorameter.records.record import Notice
from lorameter.records.store import Run
from lorameter.stats import Comparison
from lorameter.studies.study import Study
from lorameter.studies.study_file import read_study
from lorameter.studies.variant import Variant
from lorameter.verdicts.notices import collect_notices
from lorameter.verdicts.series import compare_control, group_trials, is_difference, list_ratios
from lorameter.verdicts.validity import measured_phases, run_validity


def choose_finding(findings: Sequence[Finding], code: str | None) -> Finding:
    """The finding to try: the one with this code, or the most expensive one that can be tried.

    Raises:
        UsageError: there is no such finding, or its remedy cannot be tried; the report says why.
    """
    possible = [finding for finding in findings if finding.suggestion]
    chosen = next((finding for finding in possible if code in (None, finding.code)), None)
    if chosen is None:
        known = ", ".join(finding.code for finding in possible) or "none"
        option = "--try" if code is None else f"--try {code}"
        raise UsageError(f"{option}: no such finding here has a remedy that can be tried. Can be tried: {known}.")
    return chosen


def make_pair(study: Study, variant: Variant, finding: Finding) -> Study:
    """A study of the current variant (the reference) and the suggested one, which has its own workload if that changes.

    As in a profile, an inactive path gives a notice: its absence may be why the current variant is slow. The study's
    own requirements are left out, since the remedy may change them.

    Raises:
        UsageError: the changed variant or workload cannot run.
    """
    name = f"without-{finding.code}"
    protocol, workload = study.protocol, study.workload
    notes: tuple[str, ...] = ()
    if finding_phase(finding) != "train":  # about requests of one length: nothing else needs to be measured
        protocol = dataclasses.replace(
            protocol, epochs=0.0, merged=False, generate_requests=max(protocol.generate_requests, 12),
            turns=min(protocol.turns, 2),  # trials that take turns need some
        )  # fmt: skip
        workload = dataclasses.replace(workload, open_ended_tokens=0)
    changed_workloads = {} if finding.changes else {name: dict(finding.workload_changes)}
    if changed_workloads:
        notes = (f"{variant.name} and {name} train on different workloads; their losses are not compared.",)
        protocol = dataclasses.replace(protocol, epochs=0.0)  # further epochs serve only the losses
    changes = ", ".join(f"{key} = {value}" for key, value in finding.suggestion.items())
    return Study(
        name=f"try-{finding.code}",
        title=f"{variant.name} against {changes}",
        workload=workload,
        workloads=changed_workloads,
        protocol=protocol,
        variants=(variant, dataclasses.replace(variant, name=name, **finding.changes)),
        reference=variant.name,
        allow_fallback=True,
        notes=notes,
    )


def finding_phase(finding: Finding) -> Phase:
    """The phase in which a finding's cost occurs and its remedy is measured."""
    return METRICS[finding.metric].phase


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RemedyResult:
    """The outcome of a remedy.

    Attributes:
        finding: the finding whose remedy was tried.
        run: the run that measured both variants.
        interleaving: interleaving of the run.
        metric: the metric by which the two are compared.
        comparison: the suggested variant over the current one, a gain below 1; None if either failed.
        control: the current variant compared with itself.
        failures: trials without a result.
        notices: notices that arose during the run.
        valid: whether the comparison counts: every trial is ok, and the control shows no difference.
    """

    finding: Finding
    run: str
    interleaving: str
    metric: str
    comparison: Comparison | None
    control: Comparison | None
    failures: tuple[str, ...]
    notices: tuple[Notice, ...]
    valid: bool


def judge_remedy(run: Run, finding: Finding) -> RemedyResult:
    """Judge a run of the study that `make_pair` returns."""
    study = read_study(run)
    validity, known = run_validity(run, study), run.manifest.notices
    groups, phase = group_trials(run.records), measured_phases(run)[0]
    metric, control = validity.primary[phase], validity.controls[phase]
    if finding_phase(finding) != "train":  # the part of a request that the finding is about
        metric = finding.metric
        control = compare_control(groups, study.reference, metric, family=1, alpha=study.protocol.alpha)
    comparison = next(iter(list_ratios(groups, study, metric, control).values()), None)
    return RemedyResult(
        finding=finding,
        run=run.manifest.run,
        interleaving=run.manifest.interleaving,
        metric=metric,
        comparison=comparison,
        control=control,
        failures=validity.failures,
        notices=tuple(notice for notice in collect_notices(run, study, validity.controls) if notice not in known),
        valid=validity.valid and comparison is not None and not (control is not None and is_difference(control)),
    )
