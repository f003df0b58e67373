"""Predicts time, memory and disk space of a plan before it runs, each with its source.

The memory comes from an earlier run, or is estimated (`lorameter.models.costs.memory`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lorameter.machine.provenance import Machine
from lorameter.models import catalogue, shapes
from lorameter.models.costs.lora import adapter_parameters, missing_formula
from lorameter.models.costs.memory import (
    COPIED_SHARE,
    CUDA_CONTEXT_BYTES,
    baseline_bytes,
    bound_bytes,
    estimate_peak,
    lora_like,
    mapped_bytes,
    transient_bytes,
)
from lorameter.models.shapes import unknown_layers
from lorameter.records import codec
from lorameter.run.feasibility import processes_on_device
from lorameter.run.forecast_time import Forecast, forecast_time, latest_runs
from lorameter.run.plan import Arm, Group, Plan
from lorameter.run.workers import Executor
from lorameter.studies.request import BaseKey, base_key
from lorameter.studies.script import OWN
from lorameter.studies.variant import AnyVariant, Variant
from lorameter.studies.workload import Workload


def forecast(plan: Plan, machine: Machine, runs: Path, executor: Executor | None = None) -> Forecast:
    """Predict the time, the largest memory of processes that are live at the same time, and the disk space of a run.
    The `executor`, if given, times its steps."""
    expected = forecast_time(plan, machine, runs, executor)
    if plan.study.of_scripts:
        return dataclasses.replace(expected, unknown="it is the scripts' own")
    shape_of = {workload: shapes.shape(catalogue.resolve(workload.model)) for workload in plan.workloads}
    needs = needed_bytes(plan.arms, machine, runs)
    memory = combine_sizes(max, (_group_bytes(group, needs, machine, forked=not plan.sides) for group in plan.groups))
    unknown = next(filter(None, (missing_formula(arm.built, shape_of[arm.workload]) for arm in plan.arms)), None)
    if unknown is not None:
        return dataclasses.replace(expected, memory_bytes=memory, unknown=unknown)
    tokens = sum(
        4 * 8 * workload.sequence_length * (workload.train_sequences + workload.held_out_sequences)
        for workload in plan.workloads
    )
    adapter = max(adapter_parameters(arm.built, shape_of[arm.workload]) for arm in plan.arms)
    disk_bytes = tokens + len(plan.slots) * 64 * 1024 + adapter * 4
    return dataclasses.replace(expected, memory_bytes=memory, disk_bytes=disk_bytes)


def _group_bytes(group: Group, needs: Mapping[str, int | None], machine: Machine, *, forked: bool) -> int | None:
    """Memory of the processes of a group: each counts with its largest trial."""
    largest = [max(launch, key=lambda slot: needs[slot.arm.name] or 0) for launch in group.launches]
    return live_group_bytes([slot.arm for slot in largest], needs, machine, forked=forked)


def combine_sizes(operation: Callable[[Iterable[int]], int], sizes: Iterable[int | None]) -> int | None:
    """The `max` or the `sum` of sizes; None if one is unknown."""
    known = list(sizes)
    return None if None in known else operation(size for size in known if size is not None)


def live_group_bytes(
    arms: Sequence[Arm], needs: Mapping[str, int | None], machine: Machine, *, forked: bool
) -> int | None:
    """Expected memory of one live process for each arm, with shared memory counted once; None if one is unknown.

    `needs` is the memory of single processes, by the name of the arm; `forked` says whether one process that has
    imported the libraries is the parent of all, as in a plan without sides.
    """
    total = combine_sizes(sum, (needs[arm.name] for arm in arms))
    if total is None or machine.device != "cpu" or arms[0].workload.model == OWN:
        return total
    shared = (len(arms) - 1) * int((1 - COPIED_SHARE) * baseline_bytes(machine.cuda)) if forked else 0
    mapped: set[BaseKey] = set()
    logits: list[int] = []
    for arm in arms:
        shape = shapes.shape(catalogue.resolve(arm.workload.model))
        unknown = missing_formula(arm.built, shape)
        logits.append(transient_bytes(lora_like(arm.built) if unknown else arm.built, arm.workload, shape))
        # A base that the adapter's initialisation changes, or whose biases train, is not mapped.
        if not (arm.built.rewrites_base or arm.built.trains_base or unknown):
            key = base_key(arm.built, arm.workload)
            shared += mapped_bytes(arm.built, shape) if key in mapped else 0
            mapped.add(key)
    # A process holds logits only while it computes, and at most as many compute at once as there are CPUs.
    return total - shared - sum(sorted(logits)[: -machine.cpus])


def needed_bytes(arms: Sequence[Arm], machine: Machine, runs: Path | None) -> dict[str, int | None]:
    """Expected memory of a trial's processes on a device, by the name of the arm: the peak of an earlier run if there
    is one, else the estimate; None if the model's layers are unknown. On a GPU it is device memory."""
    baseline = baseline_bytes(machine.cuda)
    kind, extra = "host_peak_train_bytes", 0
    if machine.device == "cuda":
        kind, extra = "device_peak_reserved_train_bytes", CUDA_CONTEXT_BYTES
    workloads = {arm.workload for arm in arms}
    measured = {one: {} if runs is None else measured_peaks(one, machine, runs, kind) for one in workloads}

    def need(variant: AnyVariant, workload: Workload) -> int | None:
        peak, processes = measured[workload].get(variant.id), processes_on_device(workload, machine.device)
        peak = None if peak is None else peak + extra
        shape = None if workload.model == OWN else shapes.shape(catalogue.resolve(workload.model))
        if shape is None or not isinstance(variant, Variant) or unknown_layers(shape):
            return None if peak is None else processes * peak
        if missing_formula(variant, shape):  # there is no formula for its method
            return processes * (peak or bound_bytes(variant, workload, shape, machine.device, baseline))
        expected = estimate_peak(
            variant, workload, shape, device=machine.device, repacks=machine.avx512_bf16, process_bytes=baseline
        )
        if peak is None:
            return processes * expected.needed_bytes
        # A measured peak is that of training; requests may need more.
        return processes * max(peak, expected.needed_bytes if expected.phase == "generate" else 0)

    return {arm.name: need(arm.variant, arm.workload) for arm in arms}


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
