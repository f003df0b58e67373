"""Prepares a run before anything is measured: tokens, workers, bases, and what the requests of its trials share.

The order is that of cost: tokens are made while the workers import, and what cannot be measured is refused before a
base is read. Each base is prepared once, for every process that will map it. A base that cannot be prepared does not
end the run: its trials make theirs themselves, on both sides of an A/B alike. Bases that no run has used for a month
are then removed from the disk, and those used longest ago where all together are too large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorameter.errors import InvalidRunError
from lorameter.models.bases import prune
from lorameter.records.record import Notice, Status, TrialRecord
from lorameter.records.worker_info import BaseSummary, TokenSummary, WorkerInfo
from lorameter.run.display import ProgressListener
from lorameter.run.executors import Executor, TrialFiles, WorkerLostError
from lorameter.run.plan import Plan, Slot
from lorameter.studies.request import BaseKey, BaseRequest, TrialRequest, base_key, base_words
from lorameter.studies.script import OWN
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What every request of a run has in common; paths are those of the machine that measures."""

    device: str
    threads: int
    tokens_path: str
    tokens: dict[str, Any]
    bases: Mapping[tuple[str, BaseKey], str] = field(default_factory=dict)
    """Folders of the prepared bases, by executor and base."""
    max_parallel: int = 1
    """Processes that may work at once while nothing is timed."""
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
        slowdown_rows=slot.arm.slowdown_rows,
        device=site.device,
        threads=site.threads,
        tokens_path=site.tokens_path,
        scratch=place.scratch,
        log_path=place.log_path,
        allow_fallback=study.allow_fallback,
        requirements=study.requirements,
        base=bases.get((slot.executor, base_key(slot.variant, slot.workload)), ""),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """What was prepared."""

    folders: Mapping[tuple[str, BaseKey], str] = field(default_factory=dict)
    """By the executor that maps it."""
    summaries: tuple[BaseSummary, ...] = ()
    load_s: Mapping[BaseKey, float] = field(default_factory=dict)
    """What a process takes that makes a base for itself."""
    notices: tuple[Notice, ...] = ()


def prepare_bases(plan: Plan, executors: Mapping[str, Executor], device: str, watcher: ProgressListener) -> Bases:
    """Have each executor of a plan prepare the bases of its trials.

    Raises:
        SystemLimitError: the system refuses memory or disk for one.
        InvalidRunError: no process can be started.
    """
    if plan.study.of_scripts:
        return Bases()
    first: dict[tuple[str, BaseKey], Slot] = {}
    for slot in plan.slots:
        first.setdefault((slot.executor, base_key(slot.variant, slot.workload)), slot)
    made: dict[tuple[str, BaseKey], BaseSummary] = {}
    notices: dict[BaseKey, Notice] = {}
    for (name, key), slot in first.items():
        if key in notices:
            continue
        watcher.trial_phase(slot, "base")
        request = BaseRequest(
            workload=slot.workload, variant=slot.variant, device=device, threads=slot.workload.threads, log_path=""
        )
        try:
            made[name, key] = executors[name].prepare_base(request)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a place says when it can measure a plan."""

    hellos: dict[str, WorkerInfo]
    """By executor, the one that prepared the tokens first."""
    tokens: tuple[TokenSummary, ...]
    """Of the plan's workloads, in their order."""
    bases: tuple[BaseSummary, ...] = ()
    base_notices: tuple[Notice, ...] = ()
    """Of bases that could not be prepared."""
    load_s: float = 0.0
    """What a cold start will take to load its base, in the mean."""

    @property
    def hello(self) -> WorkerInfo:
        """Of the first executor."""
        return next(iter(self.hellos.values()))

    def tokens_of(self, plan: Plan) -> dict[Workload, TokenSummary]:
        """The tokens by workload."""
        return dict(zip(plan.workloads, self.tokens, strict=True))


def prepare_run(
    plan: Plan,
    executors: Mapping[str, Executor],
    watcher: ProgressListener,
    *,
    tell_data: Callable[[str], object],
) -> tuple[Ready, RunContext]:
    """Have everything prepared that the trials of a plan need, by executors that are started; the first prepares the
    tokens of all. The site holds the paths, which are those of the executors' machine.

    Args:
        plan: what will be measured.
        executors: by name.
        watcher: is told of each base.
        tell_data: is told what data that somebody gave was recognised as.

    Raises:
        UsageError: data that cannot be read.
        InvalidRunError: a worker that cannot measure these variants.
        SystemLimitError: the system refuses memory or disk for a base.
    """
    first = next(iter(executors.values()))
    prepared = {workload: first.prepare_tokens(workload) for workload in plan.workloads}
    tokens = prepared[plan.study.workload]
    if not (tokens.synthetic or plan.study.of_scripts):
        tell_data(tokens.data)
    variants = [slot.variant for slot in plan.slots]
    hellos = {name: greet(executor, variants) for name, executor in executors.items()}
    hello = next(iter(hellos.values()))
    bases = prepare_bases(plan, executors, hello.device, watcher)
    ready = Ready(
        hellos=hellos,
        tokens=tuple(prepared.values()),
        bases=bases.summaries,
        base_notices=bases.notices,
        load_s=mean_load_s(plan, bases),
    )
    site = _site(plan, prepared, hello.device)
    return ready, dataclasses.replace(site, bases=bases.folders, max_parallel=max_parallel(plan, executors))


def max_parallel(plan: Plan, executors: Mapping[str, Executor]) -> int:
    """How many trials of a plan may work at once while nothing is timed; each rank of a trial has its own threads."""
    threads = max(slot.workload.threads * slot.workload.ranks for slot in plan.slots)
    return min(executor.max_parallel(threads) for executor in executors.values())


def _site(plan: Plan, prepared: Mapping[Workload, TokenSummary], device: str) -> RunContext:
    """What the requests on the study's workload have in common, and what those on the others do."""
    sites = {workload: site_of(workload, tokens, device) for workload, tokens in prepared.items()}
    study = sites.pop(plan.study.workload)
    return dataclasses.replace(study, own=sites)


def greet(executor: Executor, variants: Iterable[Variant]) -> WorkerInfo:
    """What a worker says of itself. Raises `InvalidRunError` if it cannot measure these variants on its machine."""
    hello, machine = executor.hello(), executor.machine()
    if hello.device != machine.device:
        raise InvalidRunError(
            f"the worker measures on {hello.device!r} and the plan was made for {machine.device!r}: torch and "
            "NVML disagree about the device. Check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES."
        )
    needing = next((variant.name for variant in variants if variant.needs_bitsandbytes), None)
    if needing and hello.lacks:
        raise InvalidRunError(f"{needing} cannot be measured here: {hello.lacks}.")
    return hello
