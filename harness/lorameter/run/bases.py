"""The bases of a run, prepared before anything is measured: each once, for every process that will stand on it.

A base that cannot be prepared is no end of the run: its trials make theirs themselves, which takes longer and says in
their records what is wrong. In an A/B the two sides then do so alike, or one would be measured on mapped weights and
the other on its own.

Then the disk is tidied where bases lie, while those of this run are held: what no run has asked for in a month goes,
and what was used longest ago where all together are too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorameter.models.bases import prune
from lorameter.records.record import Notice
from lorameter.records.worker_info import BaseSummary
from lorameter.run.executors import Executor, WorkerLostError
from lorameter.run.group_runner import ProgressListener
from lorameter.run.plan import Plan, Slot
from lorameter.studies.request import BaseKey, BaseRequest, base_key, base_words


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """What was prepared."""

    folders: Mapping[tuple[str, BaseKey], str] = field(default_factory=dict)
    """By the arm that maps it."""
    summaries: tuple[BaseSummary, ...] = ()
    load_s: Mapping[BaseKey, float] = field(default_factory=dict)
    """What a process takes that makes a base for itself."""
    notices: tuple[Notice, ...] = ()


def prepare_bases(plan: Plan, executors: Mapping[str, Executor], device: str, watcher: ProgressListener) -> Bases:
    """Have each executor of a plan prepare the bases of its trials.

    Raises:
        RefusedError: the system refuses what keeping one takes.
        InvalidRunError: no process can be started.
    """
    if plan.study.of_scripts:
        return Bases()
    first: dict[tuple[str, BaseKey], Slot] = {}
    for slot in plan.slots:
        first.setdefault((slot.arm, base_key(slot.variant, slot.workload)), slot)
    made: dict[tuple[str, BaseKey], BaseSummary] = {}
    notices: dict[BaseKey, Notice] = {}
    for (arm, key), slot in first.items():
        if key in notices:
            continue
        watcher.trial_phase(slot, "base")
        request = BaseRequest(
            workload=slot.workload, variant=slot.variant, device=device, threads=slot.workload.threads, log_path=""
        )
        try:
            made[arm, key] = executors[arm].prepare_base(request)
        except WorkerLostError as lost:
            notices[key] = _notice(slot, lost)
    prune()
    return Bases(
        folders={place: summary.path for place, summary in made.items() if place[1] not in notices},
        summaries=tuple(made.values()),
        load_s={key: summary.load_s for (_, key), summary in made.items()},
        notices=tuple(notices.values()),
    )


def mean_load_s(plan: Plan, bases: Bases) -> float:
    """Mean seconds that a cold start takes to load its base, by what making the bases has taken."""
    each = [
        bases.load_s.get(base_key(slot.variant, slot.workload), 0.0) for slot in plan.slots if "cold" in slot.measures
    ]
    return sum(each) / len(each) if each else 0.0


def _notice(slot: Slot, lost: WorkerLostError) -> Notice:
    return Notice(
        code="base-not-prepared",
        message=f"the base {base_words(slot.variant, slot.workload)} could not be prepared ({lost.status}: "
        f"{lost.failure.message.rstrip('.')}), so each process reads, converts and quantises it itself.",
        remedy="What is wrong stands in logs/base.log of the run and in the records of its trials.",
    )
