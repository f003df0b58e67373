"""Scripts are tried once, alone and for a moment, where nothing else says how much memory they take.

What a variant of lorameter's own needs is counted before it runs. A script's model is not known, so each script is
started once, takes two steps and is stopped, and what it took says whether all fit side by side. It shows as well
whether the script trains and can be stopped. A script that fails is not started again: its trials fail as it did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lorameter.models.costs.memory import CUDA_CONTEXT_BYTES
from lorameter.records import codec
from lorameter.records.record import Interleaving, Notice, PartialRecord, TrialRecord
from lorameter.records.units import format_bytes
from lorameter.run.display import ProgressListener
from lorameter.run.interleaving import fits
from lorameter.run.plan import Arm, Plan, Slot, make_plan
from lorameter.run.prepare import RunContext, begin_record, script_request_of
from lorameter.run.workers import Executor, WorkerLostError
from lorameter.studies.request import COMMANDS

REHEARSED = "a rehearsal of the scripts settles it"
"""Why a plan has a level that is not settled."""
WORDS = ("prepare", "build", "verify", "finish_training")
"""What a script is asked in its rehearsal; it ends after the two steps of the second to last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProbe:
    """What came of one script's rehearsal."""

    name: str
    record: TrialRecord

    @property
    def needed_bytes(self) -> int | None:
        """Of the device that it computed on, or of the host; None where it did not come to a step."""
        memory = self.record.memory
        reserved = memory.get("device_peak_reserved_train_bytes")
        if reserved is not None:
            return reserved + CUDA_CONTEXT_BYTES
        peaks = [size for kind, size in memory.items() if kind.startswith("host_peak_")]
        return max(peaks, default=None)


def probe_memory(
    plan: Plan, executors: Mapping[str, Executor], context: RunContext, listener: ProgressListener
) -> tuple[Plan, tuple[Notice, ...]]:
    """The plan at the level that its scripts allow, with notices to show before the start."""
    first = next(iter(executors.values()))
    free = first.free_bytes()
    seen: dict[str, MemoryProbe] = {}
    for slot in plan.slots:
        key = _key(slot.arm)
        if key not in seen:
            listener.trial_phase(slot, "rehearsing")
            seen[key] = _rehearse(plan, slot, executors[slot.executor], context)
    level, why = _level(plan, seen, free)
    settled = make_plan(plan.study, arms=plan.arms, phases=plan.phases, interleaving=level, why=why, sides=plan.sides)
    failed = {one.name: record for one in plan.arms if (record := seen[_key(one)].record).status != "ok"}
    return dataclasses.replace(settled, failed=failed), tuple(dict.fromkeys(_notices(seen.values())))


def _key(arm: Arm) -> str:
    """Equal for an arm and its control, which are one script."""
    return f"{arm.side} {arm.variant.id}"


def _rehearse(plan: Plan, slot: Slot, executor: Executor, context: RunContext) -> MemoryProbe:
    trial = f"rehearsal-{slot.arm.name}"
    record = begin_record(slot, "ok").replaced(trial=trial, log=f"logs/{trial}.log")
    place = executor.make_place(trial, trial)
    request = dataclasses.replace(script_request_of(plan, slot, context, place), trial=trial)
    try:
        worker = executor.launch()
        try:
            for word in WORDS:
                if record.status != "ok":
                    break
                arguments = {"prepare": {"request": codec.to_json(request)}, "finish_training": {"steps": 0}}
                record = record.merged(
                    worker.ask(
                        COMMANDS[word].name, trial, plan.study.protocol.step_timeout_s, **arguments.get(word, {})
                    )
                )
        finally:
            worker.close()
    except WorkerLostError as lost:
        record = record.merged(PartialRecord().failed(lost.status, lost.failure))
    executor.clear_place(trial)
    return MemoryProbe(name=slot.arm.name, record=record)


def _level(plan: Plan, seen: Mapping[str, MemoryProbe], free: int | None) -> tuple[Interleaving, str]:
    """Side by side if all of those that are compared with each other fit; one that does not train takes nothing."""
    sizes = [size for one in plan.arms if (size := seen[_key(one)].needed_bytes) is not None]
    if free is None:
        return "replicates", "how much memory is free cannot be known"
    if not sizes:
        return "replicates", "none of the scripts came to a step, so what they take together is not known"
    said = f"live together they took {format_bytes(sum(sizes))} in a rehearsal, of {format_bytes(free)} free"
    return ("lockstep" if fits(sum(sizes), free) else "replicates"), said


def _notices(seen: Iterable[MemoryProbe]) -> Iterator[Notice]:
    for one in seen:
        failure = one.record.failure
        if failure is not None:
            yield Notice(
                code="rehearsal-failed",
                message=f"{one.name}: {one.record.status} in {failure.phase}: {failure.message.rstrip('.')}.",
                remedy="It is not started again. Correct the script or the command; its log is "
                f"{one.record.log} in the run.",
            )
