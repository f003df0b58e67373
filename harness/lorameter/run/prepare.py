"""What is done in a place before anything is measured there: tokens are made, workers greeted, bases prepared.

The order is that of cost: tokens are made while the workers import, and what cannot be measured is refused before a
base is read. It is one and the same for the machine of the run's parent and for any other; what is said of it is JSON,
and the paths stay where they hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lorameter.errors import InvalidRunError
from lorameter.records.record import Notice
from lorameter.records.worker_info import BaseSummary, TokenSummary, WorkerInfo
from lorameter.run.bases import mean_load_s, prepare_bases
from lorameter.run.executors import Executor
from lorameter.run.group_runner import ProgressListener
from lorameter.run.plan import Plan
from lorameter.run.trial_setup import RunContext, site_of
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a place says when it can measure a plan."""

    hellos: dict[str, WorkerInfo]
    """By arm, the one that prepared the tokens first."""
    tokens: tuple[TokenSummary, ...]
    """Of the plan's workloads, in their order."""
    bases: tuple[BaseSummary, ...] = ()
    base_notices: tuple[Notice, ...] = ()
    """Of bases that could not be prepared."""
    load_s: float = 0.0
    """What a cold start will take to load its base, in the mean."""

    @property
    def hello(self) -> WorkerInfo:
        """Of the first arm."""
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
        executors: by arm.
        watcher: is told of each base.
        tell_data: is told what data that somebody gave was recognised as.

    Raises:
        UsageError: data that cannot be read.
        InvalidRunError: a worker that cannot measure these variants.
        RefusedError: the system refuses what keeping a base takes.
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
    return ready, dataclasses.replace(site, bases=bases.folders, lanes=count_lanes(plan, executors))


def count_lanes(plan: Plan, executors: Mapping[str, Executor]) -> int:
    """How many trials of a plan may be at work at once where nothing is timed; each rank of one has its own threads."""
    threads = max(slot.workload.threads * slot.workload.ranks for slot in plan.slots)
    return min(executor.lanes(threads) for executor in executors.values())


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
