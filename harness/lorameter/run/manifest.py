"""What the manifest of a run says of what its trials see and of where they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorameter.machine import provenance
from lorameter.machine.provenance import MachineFacts
from lorameter.records import codec
from lorameter.records.manifest import SiteFacts
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


def describe_sites(
    provenance_of_run: Mapping[str, Any], declared: Sequence[str], sites: Mapping[str, MachineFacts]
) -> dict[str, SiteFacts]:
    """Of each site; `declared` are the fields in which the sides of an A/B are meant to differ."""
    return {
        name: SiteFacts(
            machine=codec.to_json(facts.machine),
            fingerprint=provenance.fingerprint({**provenance_of_run, **provenance.place_of(facts)}, without=declared),
        )
        for name, facts in sites.items()
    }
