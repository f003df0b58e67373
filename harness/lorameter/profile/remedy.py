"""A finding's remedy, tried: the present variant against the suggested one, measured like any two variants.

A rule counts what a cause costs; only a comparison with the replacement shows what is won. So the remedy is a variant,
the present one is the reference, and the control, the verdict and the interval are those of every study. A remedy of
the workload is the same variant on a workload of its own: the two are compared by the time of a real token, since a
step of either is another number of them, and not by their losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lorameter.errors import UsageError
from lorameter.profile.rules import Finding
from lorameter.records.metrics import METRICS, Phase
from lorameter.records.record import Notice
from lorameter.records.store import Run
from lorameter.stats import Comparison
from lorameter.studies.from_run import read_study
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant
from lorameter.verdicts.notices import notices_of
from lorameter.verdicts.series import control_of, group_trials, is_difference, ratios_of
from lorameter.verdicts.validity import phases_of, run_validity

LEAST_TURNS = 2
"""Of training, where requests are at issue: trials that take turns have some."""
LEAST_REQUESTS = 12
"""Of each trial, where requests are at issue."""


def choose_finding(findings: Sequence[Finding], code: str | None) -> Finding:
    """The finding to try: the one named, or the most expensive that can be tried.

    Raises:
        UsageError: no such finding here, or nothing of it can be tried.
    """
    possible = [finding for finding in findings if finding.suggestion]
    known = ", ".join(finding.code for finding in possible) or "none"
    if code is None:
        if not possible:
            raise UsageError("--try: no finding here has a remedy that can be tried.")
        return possible[0]
    finding = next((finding for finding in findings if finding.code == code), None)
    if finding is None:
        raise UsageError(f"--try {code}: not found in this profile. Can be tried: {known}.")
    if not finding.suggestion:
        why = f"That cannot be tried here: {finding.obstacle}."
        raise UsageError(f"--try {code}: {finding.remedy} {why} Can be tried: {known}.")
    return finding


def make_pair(study: Study, variant: Variant, finding: Finding) -> Study:
    """A study of the present variant, the reference, and the suggested one, on its own workload if that changes.

    As in a profile, a path that is not active is a notice: the present variant may be slow for want of it. What the
    study requires in addition is left out, since the remedy may change it.

    Raises:
        UsageError: the change makes no variant or workload that could run.
    """
    name = f"without-{finding.code}"
    protocol, workload = study.protocol, study.workload
    notes: tuple[str, ...] = ()
    if phase_of(finding) != "train":  # requests of one length are at issue, and nothing else needs to be measured
        protocol = dataclasses.replace(
            protocol, epochs=0.0, merged=False, turns=min(protocol.turns, LEAST_TURNS),
            generate_requests=max(protocol.generate_requests, LEAST_REQUESTS),
        )  # fmt: skip
        workload = dataclasses.replace(workload, open_ended_tokens=0)
    own = {} if finding.changes else {name: dict(finding.workload_changes)}
    if own:
        notes = (f"{variant.name} and {name} train on different workloads; their losses are not compared.",)
        protocol = dataclasses.replace(protocol, epochs=0.0)  # they are for the losses
    changes = ", ".join(f"{key} = {value}" for key, value in finding.suggestion.items())
    return Study(
        name=f"try-{finding.code}",
        title=f"{variant.name} against {changes}",
        workload=workload,
        workloads=own,
        protocol=protocol,
        variants=(variant, dataclasses.replace(variant, name=name, **finding.changes)),
        reference=variant.name,
        allow_fallback=True,
        notes=notes,
    )


def phase_of(finding: Finding) -> Phase:
    """In which phase the cost of a finding shows, and a remedy is measured."""
    return METRICS[finding.metric].phase


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RemedyResult:
    """The outcome of a remedy.

    Attributes:
        finding: whose remedy it is.
        run: that measured both variants.
        interleaving: of that run.
        metric: by which the two are compared.
        comparison: the suggested variant over the present one, below 1 is a gain; None where either failed.
        control: the present variant against itself.
        failures: trials without a result.
        notices: notices of the run that were not known before it was measured.
        valid: whether the comparison counts: every trial ok, and the control no difference.
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
    """Judge the run of such a study."""
    study = read_study(run)
    validity, known = run_validity(run, study), run.manifest.notices
    groups, phase = group_trials(run.records), phases_of(run)[0]
    metric, control = validity.primary[phase], validity.controls[phase]
    if phase_of(finding) != "train":  # of a request the part that the finding is about
        metric = finding.metric
        control = control_of(groups, study.reference, metric, family=1)
    comparison = next(iter(ratios_of(groups, study, metric, control).values()), None)
    return RemedyResult(
        finding=finding,
        run=run.manifest.run,
        interleaving=run.manifest.interleaving,
        metric=metric,
        comparison=comparison,
        control=control,
        failures=validity.failures,
        notices=tuple(notice for notice in notices_of(run, study, validity.controls) if notice not in known),
        valid=validity.valid and comparison is not None and not (control is not None and is_difference(control)),
    )
