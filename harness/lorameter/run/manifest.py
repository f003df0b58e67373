"""What the manifest of a run says of the tokens that its trials see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorameter.records import codec
from lorameter.records.worker_info import TokenSummary
from lorameter.run.plan import Plan
from lorameter.studies.workload import Workload


def describe_tokens(plan: Plan, prepared: Mapping[Workload, TokenSummary]) -> dict[str, Any]:
    """Of the tokens: those of the study's workload, and `own`, by variant, those of others."""
    said = {
        workload: {key: value for key, value in codec.to_json(tokens).items() if key != "path"}
        for workload, tokens in prepared.items()
    }
    own = {name: said[workload] for name, workload in plan.own_workloads.items()}
    return said[plan.study.workload] | ({"own": own} if own else {})
