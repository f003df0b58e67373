"""Predicts time, memory and disk space of a plan before it runs, each with its source.

The memory comes from an earlier run, or is estimated (`lorameter.models.costs.memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorameter.machine.provenance import Machine
from lorameter.models import catalogue, shapes
from lorameter.models.costs.lora import adapter_parameters, uncounted
from lorameter.models.costs.memory import (
    COPIED_SHARE,
    CUDA_CONTEXT_BYTES,
    birth_bytes,
    bound_bytes,
    estimate_peak,
    lora_like,
    mapped_bytes,
    passing_bytes,
)
from lorameter.models.shapes import unknown_layers
from lorameter.records import codec
from lorameter.run.feasibility import processes_on_device
from lorameter.run.forecast_time import TimeForecast, forecast_time, latest_runs
from lorameter.run.plan import Group, Plan
from lorameter.run.workers import Executor
from lorameter.studies.request import BaseKey, base_key
from lorameter.studies.script import OWN
from lorameter.studies.variant import AnyVariant, Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Expected cost of a plan; a value that would be a guess is None."""

    time: TimeForecast
    memory_bytes: int | None
    disk_bytes: int | None
    unknown: str | None = None
    """Why memory or disk space is unknown."""


def forecast(plan: Plan, machine: Machine, runs: Path, executor: Executor | None = None) -> Forecast:
    """Predict the time, the largest memory of processes that are live at the same time, and the disk space of a run.
    The `executor`, if given, times its steps."""
    time = forecast_time(plan, machine, runs, executor)
    if plan.study.of_scripts:
        return Forecast(time=time, memory_bytes=None, disk_bytes=None, unknown="it is the scripts' own")
    shape_of = {workload: shapes.shape(catalogue.resolve(workload.model)) for workload in plan.workloads}
    unknown = next(filter(None, (uncounted(arm.built, shape_of[arm.workload]) for arm in plan.arms)), None)
    needs: dict[str, int | None] = {}
    for workload in plan.workloads:
        variants = [arm.built for arm in plan.arms if arm.workload == workload]
        needs |= needed_bytes(variants, workload, machine, runs)
    memory = combine(max, (_group_bytes(group, needs, machine, forked=not plan.sides) for group in plan.groups))
    if unknown is not None:
        return Forecast(time=time, memory_bytes=memory, disk_bytes=None, unknown=unknown)
    tokens = sum(
        4 * 8 * workload.sequence_length * (workload.train_sequences + workload.held_out_sequences)
        for workload in plan.workloads
    )
    adapter = max(adapter_parameters(arm.built, shape_of[arm.workload]) for arm in plan.arms)
    return Forecast(time=time, memory_bytes=memory, disk_bytes=tokens + len(plan.slots) * 64 * 1024 + adapter * 4)


def _group_bytes(group: Group, needs: Mapping[str, int | None], machine: Machine, *, forked: bool) -> int | None:
    """Memory of the processes of a group: each counts with its largest trial, and shared memory counts once."""
    total = combine(sum, (combine(max, (needs[slot.variant.name] for slot in launch)) for launch in group.launches))
    first = [launch[0] for launch in group.launches]
    return total and total - _shared_bytes([(slot.arm.built, slot.workload) for slot in first], machine, forked=forked)


def _shared_bytes(processes: Sequence[tuple[Variant, Workload]], machine: Machine, *, forked: bool) -> int:
    """Bytes by which the sum of these processes' peaks exceeds their total memory on a CPU; `forked` if one process
    that has imported the libraries is the parent of all."""
    if machine.device != "cpu":
        return 0
    shared = (len(processes) - 1) * int((1 - COPIED_SHARE) * birth_bytes(machine.cuda)) if forked else 0
    mapped: set[BaseKey] = set()
    logits: list[int] = []
    for variant, workload in processes:
        shape = shapes.shape(catalogue.resolve(workload.model))
        unknown = uncounted(variant, shape)
        logits.append(passing_bytes(lora_like(variant) if unknown else variant, workload, shape))
        # A base that the adapter's initialisation changes, or whose biases train, is not mapped.
        if not (variant.rewrites_base or variant.trains_base or unknown):
            key = base_key(variant, workload)
            shared += mapped_bytes(variant, shape) if key in mapped else 0
            mapped.add(key)
    # A process holds logits only while it computes, and at most as many compute at once as there are CPUs.
    return shared + sum(sorted(logits)[: -machine.cpus])


def combine(operation: Callable[[Iterable[int]], int], sizes: Iterable[int | None]) -> int | None:
    """The `max` or the `sum` of sizes; None if one is unknown."""
    known = list(sizes)
    return None if None in known else operation(size for size in known if size is not None)


def together_bytes(
    members: Sequence[AnyVariant], workload: Workload, machine: Machine, runs: Path | None, *, forked: bool
) -> int | None:
    """Expected memory of one live process for each member, with shared memory counted once; None if one is unknown.
    `forked` as for a plan without sides: one process is the parent of all."""
    needs = needed_bytes(members, workload, machine, runs)
    total = combine(sum, (needs[variant.name] for variant in members))
    if total is None or workload.model == OWN:
        return total
    processes = [(variant, workload) for variant in members if isinstance(variant, Variant)]
    return total - _shared_bytes(processes, machine, forked=forked)


def needed_bytes(
    variants: Iterable[AnyVariant], workload: Workload, machine: Machine, runs: Path | None
) -> dict[str, int | None]:
    """Expected memory of a trial's processes on a device, by variant name: the peak of an earlier run if there is one,
    else the estimate; None if the model's layers are unknown. On a GPU it is device memory."""
    shape = None if workload.model == OWN else shapes.shape(catalogue.resolve(workload.model))
    device, birth = machine.device, birth_bytes(machine.cuda)
    kind, extra = "host_peak_train_bytes", 0
    if device == "cuda":
        kind, extra = "device_peak_reserved_train_bytes", CUDA_CONTEXT_BYTES
    measured = {} if runs is None else measured_peaks(workload, machine, runs, kind)
    processes = processes_on_device(workload, device)

    def need(variant: AnyVariant) -> int | None:
        peak = measured[variant.id] + extra if variant.id in measured else None
        if shape is None or not isinstance(variant, Variant) or unknown_layers(shape):
            return None if peak is None else processes * peak
        if uncounted(variant, shape):  # there is no formula for its method
            return processes * (peak or bound_bytes(variant, workload, shape, device, birth))
        expected = estimate_peak(
            variant, workload, shape, device=device, repacks=machine.avx512_bf16, process_bytes=birth
        )
        if peak is None:
            return processes * expected.needed_bytes
        # A measured peak is that of training; requests may need more.
        return processes * max(peak, expected.needed_bytes if expected.phase == "generate" else 0)

    return {variant.name: need(variant) for variant in variants}


def measured_peaks(workload: Workload, machine: Machine, runs: Path, kind: str) -> dict[str, int]:
    """Largest peak of each variant, by its id, measured on this workload in the latest runs on this machine; `kind` is
    its name in records."""
    peaks, wanted = dict[str, int](), codec.to_json(workload)
    for run in latest_runs(machine, runs):
        for record in run.records:
            measured_on = run.manifest.own_workloads.get(record.name, run.manifest.study.get("workload"))
            if kind in record.memory and measured_on == wanted:
                peaks[record.variant] = max(peaks.get(record.variant, 0), record.memory[kind])
    return peaks
