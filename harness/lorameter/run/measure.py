"""From a study to a run on disk: what the command line and the pytest plugin both call.

The order is that of cost: everything that can be refused is refused first, then the worker starts, then tokens are
prepared, and only then is anything measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from lorameter.errors import InvalidRunError
from lorameter.machine import provenance
from lorameter.machine.provenance import Machine, MachineFacts
from lorameter.records import codec, store
from lorameter.records.metrics import PHASES
from lorameter.records.os_errors import translate_os_errors
from lorameter.records.record import Notice, Side
from lorameter.records.store import Manifest, Run, RunWriter
from lorameter.records.tempdirs import leaving_nothing
from lorameter.records.worker_info import TokenSummary, WorkerInfo
from lorameter.run.budget import Budget, TimeLimitTooShortError, skipped_notice
from lorameter.run.display import Display, Shielded
from lorameter.run.feasibility import check_feasible
from lorameter.run.forecast import together_bytes, total_of
from lorameter.run.interleaving import choose_interleaving
from lorameter.run.interrupts import InterruptHandler
from lorameter.run.memory_probe import REHEARSED, probe_memory
from lorameter.run.plan import Plan, arms_of, make_plan, variants_of, workloads_of
from lorameter.run.prepare import Ready, RunContext, prepare_run
from lorameter.run.resume import continue_manifest, is_finished, mend
from lorameter.run.runner import Measured, Stopping, find_unfinished, records_outside, run_plan
from lorameter.run.sites.driver import measure_in_jobs
from lorameter.run.sites.placement import Placement
from lorameter.run.workers import SCRIPTS, Executor, open_executor
from lorameter.run.workers.environment import Host
from lorameter.studies.study import Study
from lorameter.studies.workload import Workload


def describe_tokens(plan: Plan, prepared: Mapping[Workload, TokenSummary]) -> dict[str, Any]:
    """Of the tokens: those of the study's workload, and `own`, by variant, those of others."""
    said = {
        workload: {key: value for key, value in codec.to_json(tokens).items() if key != "path"}
        for workload, tokens in prepared.items()
    }
    own = {name: said[workload] for name, workload in plan.own_workloads.items()}
    return said[plan.study.workload] | ({"own": own} if own else {})


def plan_study(
    study: Study,
    machine: Machine,
    *,
    free_bytes: int | None,
    select: Sequence[str] = (),
    phases: Sequence[str] = PHASES,
    interleaving: str | None = None,
    runs: Path | None = None,
    own_workloads: Mapping[str, Workload] | None = None,
    shown_only: bool = False,
) -> tuple[Plan, tuple[Notice, ...]]:
    """The plan of a study on this machine, at the finest level that its variants and the memory allow.

    Args:
        study: what to measure.
        machine: where.
        free_bytes: memory that is free there now; None where it cannot be known.
        select: names of variants; empty for all.
        phases: what to measure of them.
        interleaving: a level to use instead.
        runs: folder of earlier runs, whose measured peaks say what fits together.
        own_workloads: workloads of variants that are not measured on the study's, by name; the study's own if left out.
        shown_only: whether the plan is only looked at: that an engine needs another device is then a notice.

    Raises:
        UsageError: anything that cannot work.
    """
    arms = arms_of(study, select, own_workloads)
    workloads = workloads_of(study, arms)
    notices = check_feasible(study, machine, arms, free_bytes=free_bytes, phases=phases, shown_only=shown_only)
    together = total_of(
        together_bytes([one.variant for one in arms if one.workload == workload], workload, machine, runs)
        for workload in workloads
    )
    level, why = choose_interleaving(
        variants_of(arms),
        together_bytes=together,
        free_bytes=free_bytes,
        asked=interleaving,
        workloads=len(workloads),
        ranks=max(workload.ranks for workload in workloads),
        adapters=max(workload.adapters for workload in workloads) if "generate" in phases else 1,
        one_heap=machine.device == "cpu",
    )
    provisional = study.of_scripts and interleaving is None and None is together is not free_bytes
    if provisional:
        level, why = "lockstep", REHEARSED
    plan = make_plan(study, arms=arms, phases=phases, interleaving=level, why=why, provisional=provisional)
    return plan, notices


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmExecutor:
    """Where trials of a run are measured: an executor of its own. A run without sides has one, or one for each of those
    that it compares where these differ in threads.

    Processes of one zygote share its pages, and each finds them warm in the caches when the other has just run. So
    what is compared in an A/B must come from one zygote or each from its own: with base and control from one zygote,
    the candidate, from another, was measured 0.5 % slower on identical code.
    """

    name: str = ""
    executor: Executor
    """Not started yet; on several sites of this machine each has one like it."""
    host: Host = field(default_factory=Host)
    """Where its processes live."""
    side: Side = ""
    declared: tuple[str, ...] = ()
    """Fields of the provenance in which this side is meant to differ."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says of the side beside its facts."""


def executor_of(study: Study) -> str | None:
    """The executor that a study's variants take; None for the one of the environment."""
    return SCRIPTS if study.of_scripts else None


def measure(
    plan: Plan,
    *,
    runs: Path,
    display: Display,
    notices: tuple[Notice, ...] = (),
    arm_executors: Sequence[ArmExecutor] = (),
    resume: str | None = None,
    policy: Mapping[str, Any] | None = None,
    placement: Placement | None = None,
) -> Run:
    """Measure a plan into a run directory and read it back. The first arm prepares the tokens of all.

    Args:
        plan: what to measure.
        runs: where the run is written.
        display: shows what is going on.
        notices: what was known before.
        arm_executors: where trials are measured; those that the plan names, of the present interpreter, if left out.
        resume: id of a run of this plan (`lorameter.run.resume`) to resume; None for a new one.
        policy: what it will be judged by, as JSON data; the manifest keeps it.
        placement: where; in jobs if it has several sites.

    Raises:
        UsageError: data that cannot be read, a run to resume that another process writes or whose tokens differ, or
            a limit of time that not one replicate keeps.
        InvalidRunError: no worker could be started, or it sees another device than the plan was made for.
    """
    study = plan.study
    if placement is not None and placement.launcher is not None:
        return measure_in_jobs(
            plan,
            placement.launcher,
            runs=runs,
            display=display,
            local=not placement.is_remote,
            if_busy=placement.if_busy if placement.is_remote else None,
            notices=notices,
            sides={arm.side: arm.about for arm in arm_executors if arm.side and arm.name == arm.side},
            resume=resume,
            policy=policy,
        )
    threads = {slot.executor: slot.workload.threads for slot in plan.slots}
    arm_executors = arm_executors or [
        ArmExecutor(name=name, executor=open_executor(executor_of(study), label=name)) for name in threads
    ]
    run_id = resume or store.new_run_id(study.name, runs)
    shown = Shielded(display)
    with InterruptHandler(patient=_is_watched()) as stops, contextlib.ExitStack() as stack:
        stack.enter_context(translate_os_errors(lambda: store.refusal_of(runs / run_id)))
        stack.enter_context(leaving_nothing(runs / run_id, unless=store.MANIFEST))
        stack.enter_context(store.writing(runs / run_id))
        earlier = store.read_run(str(runs / run_id), runs) if resume else None  # only now does nobody else write it
        known = () if earlier is None else earlier.records
        groups = find_unfinished(plan, known)
        if earlier is not None and not groups:
            return earlier if is_finished(earlier) else mend(earlier)
        rest = dataclasses.replace(plan, groups=groups)
        shown.starting(rest, run_id)
        budget = _budget(rest, earlier)
        with stops.interruptible():
            ready, context = _start(rest, arm_executors, threads, runs / run_id, shown, stack)
            facts = {
                arm.name: arm.executor.facts()
                for arm in arm_executors
                if arm is arm_executors[0] or arm.name == arm.side
            }
            budget.import_s, budget.load_s = ready.hello.import_time_s, ready.load_s
        executors = {arm.name: arm.executor for arm in arm_executors}
        notices = (*notices, *ready.base_notices)
        if plan.provisional:
            with stops.interruptible():
                plan, found = probe_memory(plan, executors, context, shown)
            shown.rehearsed(plan, found)
            groups, notices = plan.groups, (*notices, *found)
        if earlier is None:
            manifest = _new_manifest(plan, run_id, arm_executors, ready, facts, notices, policy)
        else:
            manifest = _resumed_manifest(plan, earlier.manifest, ready, facts)
        writer = RunWriter(runs, manifest)
        stack.enter_context(writer.refusals())
        stack.enter_context(_finishing_after_errors(writer))
        measured = run_plan(
            plan, executors, context, save=writer.append, listener=shown, budget=budget, earlier=known, stops=stops,
            stop=Stopping(plan, budget, earlier=records_outside(groups, known)),
        )  # fmt: skip
        _finish(writer, plan, budget, measured, stopped=manifest.stopped)
    return store.read_run(str(writer.path), runs)


def _budget(plan: Plan, earlier: Run | None) -> Budget:
    """The budget of what is left of a plan."""
    minutes = plan.study.protocol.max_minutes
    return Budget(
        None if minutes is None else 60 * minutes,
        replicates=len({group.replicate for group in plan.groups}),
        skipped=earlier.manifest.skipped if earlier else (),
    )


def _start(
    plan: Plan, arm_executors: Sequence[ArmExecutor], threads: Mapping[str, int], folder: Path, shown: Shielded,
    stack: contextlib.ExitStack,
) -> tuple[Ready, RunContext]:  # fmt: skip
    """Start the executors with so many `threads`, by name, and have them prepare what the trials need; `stack` closes
    them."""
    for arm in arm_executors:
        stack.callback(arm.executor.close)
        arm.executor.start(folder, threads[arm.name])
    executors = {arm.name: arm.executor for arm in arm_executors}
    return prepare_run(plan, executors, shown, tell_data=shown.tokens_prepared)


def _new_manifest(
    plan: Plan, run_id: str, arm_executors: Sequence[ArmExecutor], ready: Ready, facts: Mapping[str, MachineFacts],
    notices: tuple[Notice, ...], policy: Mapping[str, Any] | None,
) -> Manifest:  # fmt: skip
    collected = _provenance(plan, ready, facts)
    declared = sorted({name for arm in arm_executors for name in arm.declared})
    return Manifest(
        run=run_id,
        study=codec.to_json(plan.study),
        phases=plan.phases,
        selection=tuple(variant.name for variant in variants_of(plan.arms)),
        own_workloads=codec.to_json(plan.own_workloads),
        interleaving=plan.interleaving,
        why=plan.why,
        order=tuple(slot.trial for slot in plan.slots),
        seed=plan.study.protocol.seed,
        created_unix_s=time.time(),
        provenance=collected,
        fingerprint=provenance.fingerprint(collected, without=declared),
        tokens=describe_tokens(plan, ready.tokens_of(plan)),
        bases=ready.bases,
        notices=notices,
        sides=_sides(arm_executors, ready.hellos, facts),
        policy=dict(policy or {}),
    )


def _resumed_manifest(plan: Plan, before: Manifest, ready: Ready, facts: Mapping[str, MachineFacts]) -> Manifest:
    tokens = describe_tokens(plan, ready.tokens_of(plan))
    minutes = plan.study.protocol.max_minutes
    manifest = continue_manifest(before, _provenance(plan, ready, facts), tokens, minutes)
    return msgspec.structs.replace(
        manifest,
        bases=(*manifest.bases, *ready.bases),
        notices=tuple(dict.fromkeys((*manifest.notices, *ready.base_notices))),
    )


def _provenance(plan: Plan, ready: Ready, facts: Mapping[str, MachineFacts]) -> dict[str, Any]:
    first = next(iter(facts.values()))
    return provenance.collect(plan.study, first, plan.study.workload.threads, ready.hello, plan.own_workloads)


@contextlib.contextmanager
def _finishing_after_errors(writer: RunWriter) -> Iterator[None]:
    """State in the manifest how a run ended that an error ends; of one for which there was no time nothing is left."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(InvalidRunError, OSError):  # what ended the run is what is to be reported
            if isinstance(error, TimeLimitTooShortError) and not writer.has_records:
                (writer.path / store.MANIFEST).unlink()
            else:
                writer.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise


def _finish(writer: RunWriter, plan: Plan, budget: Budget, measured: Measured, *, stopped: str | None) -> None:
    notices: tuple[Notice, ...] = ()
    if budget.is_limited and not measured.interrupted:
        count = len({record.replicate for record in measured.records if record.status == "ok"})
        planned = plan.study.protocol.replicates
        notices = skipped_notice(measured.skipped, count, planned, measured.needed_s, measured.training_s)
    unfinished = any(record.status in ("interrupted", "not_run") for record in measured.records)
    writer.finish(
        "interrupted" if unfinished or measured.interrupted else "complete",
        stopped=measured.stopped or stopped,
        measured=[record.trial for record in measured.records],
        notices=notices,
        spending=budget.breakdown(),
        skipped=tuple(sorted(measured.skipped)),
    )


def _is_watched() -> bool:
    """Whether somebody sits at a terminal, who is told of a Ctrl-C and can say it again."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _sides(
    arm_executors: Sequence[ArmExecutor], hellos: Mapping[str, WorkerInfo], facts: Mapping[str, MachineFacts]
) -> dict[str, Any]:
    """What the manifest says of the sides of an A/B."""
    return {
        arm.side: {**arm.about, "declared": list(arm.declared), "worker": hellos[arm.name].harness}
        | {"facts": facts[arm.name].host}
        for arm in arm_executors
        if arm.side and arm.name == arm.side
    }
