"""A trial on its way to a worker: what a run's requests have in common, the request, and the record to be filled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorameter.records.record import Status, TrialRecord
from lorameter.records.worker_info import TokenSummary
from lorameter.run.executors import TrialFiles
from lorameter.run.plan import Plan, Slot
from lorameter.studies.request import BaseKey, TrialRequest, base_key
from lorameter.studies.script import OWN
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What every request of a run has in common; paths are those of the machine that measures."""

    device: str
    threads: int
    tokens_path: str
    tokens: dict[str, Any]
    bases: Mapping[tuple[str, BaseKey], str] = field(default_factory=dict)
    """Folders of the prepared bases, by arm and base."""
    lanes: int = 1
    """Processes that may be at work at once where nothing is timed."""
    own: Mapping[Workload, RunContext] = field(default_factory=dict)
    """The same for other workloads than the study's."""

    def of(self, workload: Workload) -> RunContext:
        """What the requests on this workload have in common."""
        return self.own.get(workload, self)


def site_of(workload: Workload, tokens: TokenSummary, device: str) -> RunContext:
    """The site of trials that are measured on one workload."""
    if workload.data == OWN:  # its trials say what they saw
        return RunContext(device=device, threads=workload.threads, tokens_path=tokens.path, tokens={})
    known = {"hash": tokens.hash, "real_tokens": tokens.real_tokens, "padded_tokens": tokens.padded_tokens}
    return RunContext(device=device, threads=workload.threads, tokens_path=tokens.path, tokens=known)


def begin_record(slot: Slot, status: Status) -> TrialRecord:
    """The record of a trial that has nothing yet."""
    return TrialRecord(
        trial=slot.trial,
        status=status,
        name=slot.variant.name,
        variant=slot.variant.id,
        role=slot.role,
        replicate=slot.replicate,
        position=slot.position,
        interleaving=slot.interleaving,
        side=slot.side,
        seed=slot.seed,
        started_unix_s=0.0,
        wall_time_s=0.0,
        log=f"logs/{slot.trial}.log",
    )


def request_of(plan: Plan, slot: Slot, site: RunContext, place: TrialFiles) -> TrialRequest:
    """All that a worker must know of a trial."""
    study, bases, site = plan.study, site.bases, site.of(slot.workload)
    return TrialRequest(
        trial=slot.trial,
        variant=slot.variant,
        role=slot.role,
        replicate=slot.replicate,
        seed=slot.seed,
        workload=slot.workload,
        protocol=study.protocol.here(),  # of no interest there, and unknown to older revisions on a side
        interleaving=slot.interleaving,
        measures=slot.measures,
        slowdown_rows=slot.contender.slowdown_rows,
        device=site.device,
        threads=site.threads,
        tokens_path=site.tokens_path,
        scratch=place.scratch,
        log_path=place.log_path,
        allow_fallback=study.allow_fallback,
        requirements=study.requirements,
        base=bases.get((slot.arm, base_key(slot.variant, slot.workload)), ""),
    )
