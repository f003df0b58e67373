"""Builds the plan of a study on a machine: its arms, and the finest interleaving that they and the memory allow.

The granularity of interleaving matters more than the choice of the test. On a noisy machine, the measured standard
deviation of the log ratio of two identical builds is 27 % if their processes alternate, 2.2 % if two live processes
take turns step by step, and 1.9 % if all variants take turns inside one process. So the level depends on the
differences between the variants and on the memory, and every result contains the reason. On a CPU one process is no
better than several, because its variants share a heap (`ONE_HEAP`).

The memory of a variant that lorameter builds is estimated before it runs. A script's model is unknown, so each script
is started once in isolation when the run begins, runs two steps and is stopped. This rehearsal also shows whether the
script trains and can be stopped. A script that fails is not started again: its trials get the same failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorameter.errors import UsageError, require
from lorameter.machine.provenance import Machine
from lorameter.measurements.metrics import PHASES
from lorameter.models.catalogue import RANDOM_PREFIX
from lorameter.models.costs.memory import CUDA_CONTEXT_BYTES
from lorameter.models.methods import method_facts
from lorameter.records import codec, fileio
from lorameter.records.record import Interleaving, Notice, PartialRecord, TrialRecord
from lorameter.records.units import format_bytes
from lorameter.run.display import Display
from lorameter.run.feasibility import check_feasible
from lorameter.run.forecast import live_group_bytes, needed_bytes
from lorameter.run.plan import Arm, Plan, Sides, Slot, build_arms, list_variants, list_workloads, make_plan
from lorameter.run.prepare import RunContext, begin_record, make_request
from lorameter.run.workers import Executor, WorkerLostError
from lorameter.studies.form import AnyVariant
from lorameter.studies.study import Study
from lorameter.studies.variant import ADAPTER_FIELDS, LoraVariant, Variant
from lorameter.studies.workload import make_absolute

LEVELS: tuple[Interleaving, ...] = ("shared-base", "lockstep", "replicates")
MEMORY_SHARE = 0.8
"""Share of the free memory that live processes are expected to use at most: estimates have errors, and measurements on
a swapping machine are useless."""
ONE_HEAP = "variants in one process would be served from each other's memory"
"""Why variants on a CPU do not share a base in one process. Memory that the C library keeps from a memory-intensive
variant serves the next variant, which then waits for fewer new pages than in its own process. Measured on a tiny model
(page faults of a step, and its time): r 16 alone 1,250 and 53.3 ms, with DoRA in its process 0 and 47.0 ms, while DoRA
took 76 ms in both cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a command asks of the plan of its study."""

    select: Sequence[str] = ()
    """Names of variants; empty for all."""
    phases: Sequence[str] = PHASES
    interleaving: str | None = None
    """A level to use instead of the finest possible one."""
    sides: Sides | None = None
    """Sides of an A/B."""
    shown_only: bool = False
    """Whether the plan is only displayed: if an engine needs another device, that is then only a notice."""


def build_plan(
    study: Study,
    machine: Machine,
    options: PlanOptions = PlanOptions(),  # frozen
    *,
    free_bytes: int | None,
    runs: Path | None = None,
) -> tuple[Plan, tuple[Notice, ...]]:
    """Build the plan of a study on this machine; returns it with notices.

    Args:
        study: the study to measure.
        machine: the machine that measures.
        options: what to plan.
        free_bytes: memory that is free there now; None if unknown.
        runs: folder of earlier runs, whose measured peaks show what fits into memory together.

    Raises:
        UsageError: the plan cannot be measured.
    """
    sides, phases = options.sides, options.phases
    if sides:
        study = _check_sides(study, sides)
    arms = build_arms(study, options.select, sides)
    workloads = list_workloads(study, arms)
    notices = check_feasible(study, machine, arms, free_bytes=free_bytes, phases=phases, shown_only=options.shown_only)
    needs = needed_bytes(arms, machine, runs)
    together = live_group_bytes(arms, needs, machine, forked=True)
    if sides:  # the three processes of one variant are live at the same time
        together = max(live_group_bytes([arm] * 3, needs, machine, forked=False) for arm in arms)
    level, why = choose_interleaving(
        list_variants(arms),
        together_bytes=together,
        free_bytes=free_bytes,
        requested=options.interleaving,
        workloads=len(workloads),
        ranks=max(workload.ranks for workload in workloads),
        adapters=max(workload.adapters for workload in workloads) if "generate" in phases else 1,
        sided=bool(sides),
        one_heap=machine.device == "cpu",
    )
    unknown = options.interleaving is None and math.isinf(together) and free_bytes is not None
    if provisional := study.supports("own training") and unknown:
        level, why = "lockstep", "a rehearsal of the scripts settles it"
    plan = make_plan(study, arms=arms, phases=phases, interleaving=level, why=why, provisional=provisional, sides=sides)
    return plan, notices


def _check_sides(study: Study, sides: Sides) -> Study:
    """Refuse a study that an A/B cannot compare. Returns the study with absolute paths, because a relative path would
    differ in the worktree of a revision."""
    require(
        study.supports("built") or not sides["candidate"].slowdown_rows,
        f"study {study.name}: extra work goes into adapters of lorameter's own, and a script has none of them.",
    )
    require(
        not study.own_workloads,
        f"study {study.name}: its variants differ in what they are trained on, and an A/B compares two sides of "
        f"one variant on one workload. Measure it with `lorameter run {study.name}`.",
    )
    for variant in study.variants:
        for side in sides.values():
            variant.check_side(side.kind)
    if not study.supports("workload"):
        return study
    prefix = RANDOM_PREFIX if study.workload.model.startswith(RANDOM_PREFIX) else ""
    path = Path(study.workload.model.removeprefix(prefix))
    model = f"{prefix}{path.absolute()}" if fileio.is_there(path) else study.workload.model
    workload = dataclasses.replace(study.workload, model=model, data=make_absolute(study.workload.data))
    return dataclasses.replace(study, workload=workload)


# --- interleaving -----------------------------------------------------------------------------------------------------


def choose_interleaving(
    variants: Sequence[AnyVariant],
    *,
    together_bytes: float,
    free_bytes: int | None,
    requested: str | None = None,
    workloads: int = 1,
    ranks: int = 1,
    adapters: int = 1,
    sided: bool = False,
    one_heap: bool = False,
) -> tuple[Interleaving, str]:
    """The level and its reason.

    Args:
        variants: the variants to compare.
        together_bytes: expected memory of all trials of a replicate if each has its own live process; infinite if
            unknown.
        free_bytes: memory that is free on the device now; None if unknown.
        requested: the level that the user requests; None to choose one.
        workloads: number of different workloads.
        ranks: ranks of a trial.
        adapters: maximum number of adapters on the base during a trial's requests.
        sided: whether the variants are on the sides of an A/B.
        one_heap: whether variants in one process share a heap, as on a CPU, and are faster there than alone: each then
            has its own process if memory allows.

    Raises:
        UsageError: the requested level is unknown, or not possible for these variants.
    """
    obstacles = (
        (sided, "base and candidate are separate processes"),
        (
            adapters > 1,
            f"requests have {adapters} adapters on a base, and those of other trials would take part in a switch",
        ),
        (ranks > 1, f"a trial has {ranks} ranks, each of which is a process"),
        # Trials on one base share values, such as its held-out loss, that depend on the workload.
        (workloads > 1, f"the variants are measured on {workloads} workloads"),
    )
    obstacle = next((why for applies, why in obstacles if applies), None) or shared_base_obstacle(variants)
    if requested is not None:
        if requested not in LEVELS:
            raise UsageError(f"interleave = {requested!r}: not known. Use one of {', '.join(LEVELS)}.")
        require(
            requested != "shared-base" or obstacle is None,
            f"interleave = 'shared-base': {obstacle}. Use lockstep, or leave the choice to lorameter.",
        )
        return requested, "requested"
    on_one_base = "the variants differ in their adapters only"
    if obstacle is None and not one_heap:
        return "shared-base", on_one_base
    other: Interleaving = "replicates" if obstacle else "shared-base"
    why = obstacle or on_one_base
    if free_bytes is None:
        return other, f"{why}, and the amount of free memory is unknown"
    if math.isinf(together_bytes):
        return other, f"{why}, and their total memory is unknown"
    sizes = f"all live together need about {format_bytes(together_bytes)} of {format_bytes(free_bytes)} free"
    if not fits_in_memory(together_bytes, free_bytes):
        return other, f"{why}, and {sizes}"
    return "lockstep", f"{obstacle or ONE_HEAP}; {sizes}"


_PER_PROCESS = {
    "compile": "compile = True would recompile for every adapter, and fall back at its limit",
    "merge_adapter": "merge_adapter = True changes the base during its requests",
    "liger_kernel": "liger_kernel = True swaps functions of the architecture for the whole process",
}
"""Why a variant with one of these keys shares no process."""


def fits_in_memory(needed_bytes: float, free_bytes: int) -> bool:
    """Whether processes with this memory can be live at the same time."""
    return needed_bytes <= int(MEMORY_SHARE * free_bytes)


def shared_base_obstacle(variants: Sequence[AnyVariant]) -> str | None:
    """Why these variants cannot share one base model, with the variant's name; None if they can."""
    first = variants[0]
    for variant in variants:
        label, other = variant.name or variant.id, first.name or first.id
        if not isinstance(variant, Variant):
            return f"{label} is {variant.form}, and has its own process"
        if variant.method_name != first.method_name:
            return f"{label} and {other} have different methods, and PEFT allows one method on a base"
        facts = None if isinstance(variant, LoraVariant) else method_facts([variant])[variant.name]
        differing = sorted(
            key for key in variant.differences(first) if key not in ADAPTER_FIELDS and not key.startswith("peft.")
        )
        obstacles = (
            (variant.rewrites_base,
             f"{label}: init_lora_weights = {getattr(variant, 'init_lora_weights', None)!r} rewrites the base"),
            (facts is None and variant.trains_base,
             f"{label}: bias = {getattr(variant, 'bias', None)!r} trains the base's own biases"),
            (facts is not None and (variant.trains_base or not (facts.keeps_base and facts.several)),
             f"{label}: {variant.method_name} changes the base, or allows only one adapter on it"),
            *((getattr(variant, key), f"{label}: {why}") for key, why in _PER_PROCESS.items()),
            (differing, f"{label} differs from {other} in {', '.join(differing)}"),
        )  # fmt: skip
        if obstacle := next((why for applies, why in obstacles if applies), None):
            return obstacle
    return None


# --- the memory of scripts --------------------------------------------------------------------------------------------


def probe_memory(
    plan: Plan, executors: Mapping[str, Executor], context: RunContext, display: Display
) -> tuple[Plan, tuple[Notice, ...]]:
    """Determine the level of interleaving that the scripts of a plan allow: lockstep if the memory of all together
    fits; a script that failed counts as 0. Returns the plan, and notices to show first."""
    free = next(iter(executors.values())).free_bytes() or 0
    records: dict[str, TrialRecord] = {}
    for slot in plan.slots:
        if _key(slot.arm) not in records:
            display.trial_phase(slot, "rehearsing")
            records[_key(slot.arm)] = _rehearse(plan, slot, executors[slot.executor], context)
    sizes = [size for arm in plan.arms if (size := _needed_bytes(records[_key(arm)])) is not None]
    level: Interleaving = "lockstep" if sizes and fits_in_memory(sum(sizes), free) else "replicates"
    why = "none of the scripts took a step, so the memory of all scripts together is unknown"
    if sizes:
        why = f"live together they took {format_bytes(sum(sizes))} in a rehearsal, of {format_bytes(free)} free"
    settled = make_plan(plan.study, arms=plan.arms, phases=plan.phases, interleaving=level, why=why, sides=plan.sides)
    failed = {arm.name: record for arm in plan.arms if (record := records[_key(arm)]).status != "ok"}
    return dataclasses.replace(settled, failed=failed), tuple(dict.fromkeys(map(_failure_notice, failed.values())))


def _key(arm: Arm) -> str:
    """A key that is equal for an arm and its control, which run the same script."""
    return f"{arm.side} {arm.variant.id}"


def _rehearse(plan: Plan, slot: Slot, executor: Executor, context: RunContext) -> TrialRecord:
    """The record of a short training of a script."""
    trial = f"rehearsal-{slot.arm.name}"
    slot = dataclasses.replace(slot, trial=trial)
    record = begin_record(slot, "ok")
    request = make_request(plan, slot, context, executor.make_place(trial, trial))
    commands: list[tuple[str, dict[str, object]]] = [
        ("prepare", {"request": codec.to_json(request)}),
        ("build", {}),
        ("verify", {}),
        ("finish_training", {"steps": 0}),
    ]
    try:
        with contextlib.closing(executor.launch()) as worker:
            for word, arguments in commands:
                if record.status == "ok":
                    record = record.merged(worker.ask(word, trial, plan.study.protocol.step_timeout_s, **arguments))
    except WorkerLostError as lost:
        record = record.merged(PartialRecord().failed(lost.status, lost.failure))
    executor.clear_place(trial)
    return record


def _needed_bytes(record: TrialRecord) -> int | None:
    """Peak memory of a script on its device, or on the host; None if it ran no step."""
    reserved = record.memory.get("device_peak_reserved_train_bytes")
    if reserved is not None:
        return reserved + CUDA_CONTEXT_BYTES
    return max((size for kind, size in record.memory.items() if kind.startswith("host_peak_")), default=None)


def _failure_notice(record: TrialRecord) -> Notice:
    assert record.failure is not None  # set in every failed record
    name, failure = record.trial.removeprefix("rehearsal-"), record.failure
    return Notice(
        code="rehearsal-failed",
        message=f"{name}: {record.status} in {failure.phase}: {failure.message.rstrip('.')}.",
        remedy=f"It is not started again. Correct the script or the command; its log is {record.log} in the run.",
    )
