"""Prepares a run before the measurement: tokens, workers, bases, and the data shared by the requests of its trials.

Cheap parts come first: tokens are made while the workers import, and variants that cannot be measured are refused
before a base is read. Each base is prepared once, and every process that needs it maps it. A base that cannot be
prepared does not end the run: each trial then makes its own, on both sides of an A/B alike. Finally, bases that no run
has used for a month are removed from the disk, and the least recently used ones if the cache is too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorameter.errors import InvalidRunError
from lorameter.models.bases import prune
from lorameter.records.record import BaseSummary, Notice, Status, TokenSummary, TrialRecord, WorkerInfo
from lorameter.run.display import Display
from lorameter.run.plan import Plan, Slot
from lorameter.run.workers import Executor, TrialFiles, WorkerLostError
from lorameter.studies.form import AnyVariant
from lorameter.studies.request import BaseKey, BaseRequest, Request, base_key, base_words
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """The bases that were prepared."""

    folders: Mapping[tuple[str, BaseKey], str] = field(default_factory=dict)
    """Folders by executor and base."""
    summaries: tuple[BaseSummary, ...] = ()
    notices: tuple[Notice, ...] = ()
    """Notices on bases that could not be prepared."""

    @property
    def load_s(self) -> float:
        """Mean seconds that a process needs to make its own base."""
        return sum(one.load_s for one in self.summaries) / max(1, len(self.summaries))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """The data that all requests of a run share; paths are on the machine that measures."""

    device: str
    tokens: Mapping[Workload, TokenSummary] = field(default_factory=dict)
    """Prepared tokens; a trial without those of its workload defines its data itself, is simulated, or is only
    timed."""
    hellos: Mapping[str, WorkerInfo] = field(default_factory=dict)
    """First messages by executor; the executor that makes the tokens comes first."""
    bases: Bases = field(default_factory=Bases)
    max_parallel: int = 1
    """Processes that may work at once while nothing is timed."""

    @property
    def hello(self) -> WorkerInfo:
        """The first message of the first executor."""
        return next(iter(self.hellos.values()))

    def token_facts(self, workload: Workload) -> dict[str, Any]:
        """Facts about the tokens of a workload for the records of its trials; a process reports its own data."""
        tokens = self.tokens.get(workload)
        if tokens is None:
            return {}
        return {"hash": tokens.hash, "real_tokens": tokens.real_tokens, "padded_tokens": tokens.padded_tokens}


def begin_record(slot: Slot, status: Status) -> TrialRecord:
    """The record of a trial before it has measured anything."""
    return TrialRecord(
        trial=slot.trial,
        status=status,
        name=slot.variant.name,
        variant=slot.variant.id,
        role=slot.arm.role,
        replicate=slot.replicate,
        position=slot.position,
        interleaving=slot.interleaving,
        side=slot.arm.side,
        seed=slot.seed,
        started_unix_s=0.0,
        wall_time_s=0.0,
        log=f"logs/{slot.trial}.log",
    )


def make_request(plan: Plan, slot: Slot, context: RunContext, place: TrialFiles) -> Request:
    """The request with which a worker prepares a trial."""
    study, tokens = plan.study, context.tokens.get(slot.workload)
    base = ""
    if study.supports("built"):
        base = context.bases.folders.get((slot.executor, base_key(slot.arm.built, slot.workload)), "")
    return Request(
        trial=slot.trial,
        role=slot.arm.role,
        replicate=slot.replicate,
        seed=slot.seed,
        variant=slot.variant,
        workload=slot.workload,
        protocol=study.protocol.here(),  # a worker does not need the sites of others
        interleaving=slot.interleaving,
        measures=slot.measures,
        slowdown_rows=slot.arm.slowdown_rows,
        device=context.device,
        threads=slot.workload.threads,
        tokens_path=tokens.path if tokens else "",
        scratch=place.scratch,
        log_path=place.log_path,
        allow_fallback=study.allow_fallback,
        requirements=study.requirements,
        base=base,
    )


def prepare_bases(plan: Plan, executors: Mapping[str, Executor], device: str, display: Display) -> Bases:
    """Have each executor of a plan prepare the bases of its trials.

    Raises:
        SystemLimitError: there is not enough memory or disk space for a base.
        InvalidRunError: no process can be started.
    """
    if not plan.study.supports("built"):
        return Bases()
    made: dict[tuple[str, BaseKey], BaseSummary] = {}
    notices: dict[BaseKey, Notice] = {}
    for slot in plan.slots:
        key = base_key(slot.arm.built, slot.workload)
        if key in notices or (slot.executor, key) in made:
            continue
        display.trial_phase(slot, "base")
        request = BaseRequest(
            workload=slot.workload, variant=slot.arm.built, device=device, threads=slot.workload.threads, log_path=""
        )
        try:
            made[slot.executor, key] = executors[slot.executor].prepare_base(request)
        except WorkerLostError as lost:
            notices[key] = Notice(
                code="base-not-prepared",
                message=f"the base {base_words(slot.arm.built, slot.workload)} could not be prepared "
                f"({lost.status}: {lost.failure.message.rstrip('.')}), so each process reads, converts and quantises "
                "it itself.",
                remedy="See logs/base.log of the run, and the records of its trials.",
            )
    prune()
    return Bases(
        folders={place: summary.path for place, summary in made.items() if place[1] not in notices},
        summaries=tuple(made.values()),
        notices=tuple(notices.values()),
    )


def prepare_run(plan: Plan, executors: Mapping[str, Executor], display: Display) -> RunContext:
    """Prepare everything that the trials of a plan need, with executors that are already started; the first one
    prepares all tokens.

    Args:
        plan: the plan of the run.
        executors: by name.
        display: receives a description of the user's data, and each base that is made.

    Raises:
        UsageError: the data cannot be read.
        InvalidRunError: a worker cannot measure these variants.
        SystemLimitError: there is not enough memory or disk space for a base.
    """
    first = next(iter(executors.values()))
    known = plan.workloads if plan.study.supports("workload") else ()
    tokens = {workload: first.prepare_tokens(workload) for workload in known}
    if known and not tokens[plan.study.workload].synthetic:
        display.tokens_prepared(tokens[plan.study.workload].data)
    variants = [slot.variant for slot in plan.slots]
    hellos = {name: validate_worker(executor, variants) for name, executor in executors.items()}
    device = next(iter(hellos.values())).device
    return RunContext(
        device=device,
        tokens=tokens,
        hellos=hellos,
        bases=prepare_bases(plan, executors, device, display),
        max_parallel=max_parallel(plan, executors),
    )


def max_parallel(plan: Plan, executors: Mapping[str, Executor]) -> int:
    """The number of trials that may run at once while nothing is timed; each rank of a trial has its own threads."""
    threads = max(slot.workload.threads * slot.workload.ranks for slot in plan.slots)
    return min(executor.max_parallel(threads) for executor in executors.values())


def validate_worker(executor: Executor, variants: Iterable[AnyVariant]) -> WorkerInfo:
    """The worker's description of itself. Raises `InvalidRunError` if it cannot measure these variants."""
    hello, machine = executor.hello(), executor.machine()
    if hello.device != machine.device:
        raise InvalidRunError(
            f"the worker measures on {hello.device!r} and the plan was made for {machine.device!r}: torch and "
            "NVML disagree about the device. Check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES."
        )
    needing = next(
        (variant.name for variant in variants if isinstance(variant, Variant) and variant.needs_bitsandbytes), None
    )
    if needing and hello.lacks:
        raise InvalidRunError(f"{needing} cannot be measured here: {hello.lacks}.")
    return hello
