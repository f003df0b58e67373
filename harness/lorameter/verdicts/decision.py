"""What a run has decided so far: the comparisons of its report, from the replicates that have ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from lorameter.records.record import TrialRecord
from lorameter.records.store import Manifest, Run
from lorameter.stats import Comparison
from lorameter.studies.study_file import read_study
from lorameter.verdicts.ab import build_report
from lorameter.verdicts.gate import read_policy
from lorameter.verdicts.series import Key, group_trials, is_mixed, list_ratios
from lorameter.verdicts.validity import run_validity


def compare_so_far(manifest: Manifest, records: Sequence[TrialRecord]) -> Mapping[Key, Comparison]:
    """The comparisons that end a run once they are decided, by variant and metric: those of the two sides that its
    policy gates, or each variant with the reference in the primary metric of each phase. Empty if the sites of the run
    are different machines, whose verdicts belong to one site each."""
    order = tuple(record.trial for record in records)  # what is not measured yet is no fault
    so_far = msgspec.structs.replace(manifest, order=order, status="complete")
    run = Run(path=Path(), manifest=so_far, records=tuple(records))
    if is_mixed(run):
        return {}
    if manifest.sides:
        policy = read_policy(manifest.policy)
        report = build_report(run, metrics=policy.metrics, limits_of=policy.limits_of)
        return {(row.variant, row.metric): row for row in report.comparisons}
    study, groups = read_study(run), group_trials(records)
    validity = run_validity(run, study)
    return {
        (name, metric): comparison
        for phase, metric in validity.primary.items()
        for name, comparison in list_ratios(groups, study, metric, validity.controls[phase]).items()
    }
