"""Measures the memory of scripts in a short rehearsal, to decide whether all of them can be live together.

The memory of a variant that lorameter builds is estimated before it runs. A script's model is unknown, so each script
is started once in isolation, runs two steps and is stopped. The rehearsal also shows whether the script trains and can
be stopped. A script that fails is not started again: its trials get the same failure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lorameter.models.costs.memory import CUDA_CONTEXT_BYTES
from lorameter.records import codec
from lorameter.records.record import Interleaving, Notice, PartialRecord, TrialRecord
from lorameter.records.units import format_bytes
from lorameter.run.display import Display
from lorameter.run.interleaving import fits
from lorameter.run.plan import Arm, Plan, Slot, make_plan
from lorameter.run.prepare import RunContext, begin_record, script_request_of
from lorameter.run.workers import Executor, WorkerLostError

REHEARSED = "a rehearsal of the scripts settles it"
"""The reason for a level that is not yet determined."""


def probe_memory(
    plan: Plan, executors: Mapping[str, Executor], context: RunContext, listener: Display
) -> tuple[Plan, tuple[Notice, ...]]:
    """Determine the level of interleaving that the scripts of a plan allow; returns the plan, and notices to show
    first."""
    free = next(iter(executors.values())).free_bytes()
    records: dict[str, TrialRecord] = {}
    for slot in plan.slots:
        if _key(slot.arm) not in records:
            listener.trial_phase(slot, "rehearsing")
            records[_key(slot.arm)] = _rehearse(plan, slot, executors[slot.executor], context)
    level, why = _choose_level([records[_key(arm)] for arm in plan.arms], free)
    settled = make_plan(plan.study, arms=plan.arms, phases=plan.phases, interleaving=level, why=why, sides=plan.sides)
    failed = {arm.name: record for arm in plan.arms if (record := records[_key(arm)]).status != "ok"}
    return dataclasses.replace(settled, failed=failed), tuple(dict.fromkeys(map(_failure_notice, failed.values())))


def _key(arm: Arm) -> str:
    """A key that is equal for an arm and its control, which run the same script."""
    return f"{arm.side} {arm.variant.id}"


def _rehearse(plan: Plan, slot: Slot, executor: Executor, context: RunContext) -> TrialRecord:
    """The record of a short training of a script."""
    trial = f"rehearsal-{slot.arm.name}"
    record = begin_record(slot, "ok").replaced(trial=trial, log=f"logs/{trial}.log")
    request = script_request_of(plan, slot, context, executor.make_place(trial, trial))
    commands: list[tuple[str, dict[str, object]]] = [
        ("prepare", {"request": codec.to_json(dataclasses.replace(request, trial=trial))}),
        ("build", {}),
        ("verify", {}),
        ("finish_training", {"steps": 0}),
    ]
    try:
        worker = executor.launch()
        try:
            for word, arguments in commands:
                if record.status == "ok":
                    answer = worker.ask(word, trial, plan.study.protocol.step_timeout_s, **arguments)
                    record = record.merged(answer)
        finally:
            worker.close()
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


def _choose_level(records: Sequence[TrialRecord], free: int | None) -> tuple[Interleaving, str]:
    """Lockstep if the memory of all scripts together fits; a script that failed counts as 0."""
    sizes = [size for record in records if (size := _needed_bytes(record)) is not None]
    if free is None:
        return "replicates", "how much memory is free cannot be known"
    if not sizes:
        return "replicates", "none of the scripts took a step, so the memory of all together is not known"
    why = f"live together they took {format_bytes(sum(sizes))} in a rehearsal, of {format_bytes(free)} free"
    return ("lockstep" if fits(sum(sizes), free) else "replicates"), why


def _failure_notice(record: TrialRecord) -> Notice:
    assert record.failure is not None  # set in every failed record
    name, failure = record.trial.removeprefix("rehearsal-"), record.failure
    return Notice(
        code="rehearsal-failed",
        message=f"{name}: {record.status} in {failure.phase}: {failure.message.rstrip('.')}.",
        remedy=f"It is not started again. Correct the script or the command; its log is {record.log} in the run.",
    )
