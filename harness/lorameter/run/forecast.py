"""Predicts time, width of the intervals, memory and disk space of a plan before it runs, each with its source.

The time comes from running the plan in simulated time, with the code of a real run (`lorameter.run.runner`,
`lorameter.run.budget`) and workers that only advance a clock. Their step and request times are timed for each variant
on two layers of its model (`lorameter.trial.step_times`). The scatter comes from the latest run on this machine with
the same interleaving, else it is assumed. The memory comes from an earlier run, or is estimated
(`lorameter.models.costs.memory`).
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.errors import LorameterError
from lorameter.machine.provenance import Machine
from lorameter.measurements.declaration import TrialTimes, Work
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
from lorameter.records import codec, store
from lorameter.records.fileio import scratch_folder
from lorameter.records.record import Interleaving, PartialRecord, TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import format_duration, format_percent
from lorameter.run.budget import TARGET_REPLICATES, Budget, TimeLimitTooShortError
from lorameter.run.display import Display
from lorameter.run.feasibility import processes_on_device
from lorameter.run.plan import Arm, Group, Plan, Slot
from lorameter.run.prepare import RunContext, make_request, max_parallel
from lorameter.run.runner import run_plan
from lorameter.run.workers import Executor, IfBusy, TrialFiles, Worker, WorkerLostError, hold_devices
from lorameter.stats import VerdictRule
from lorameter.stats.effect import PRIOR_DF, Spread
from lorameter.stats.verdict import detectable_effect
from lorameter.studies.form import AnyVariant
from lorameter.studies.request import COMMANDS, BaseKey, Request, base_key
from lorameter.studies.script import OWN
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload
from lorameter.verdicts.series import group_trials, pairs_against

LATEST_RUNS = 20
"""Maximum runs that are searched for measured times and peaks."""
TARGET_HALF_WIDTH = 0.03
"""Half-width for which the required time is predicted."""
MAX_REPLICATES = 200
TIMING_LIMIT_S = 60.0
"""Time limit for timing the steps of all variants; if it does not suffice, as for a 7B model on a CPU, the time is
unknown."""
SCATTER: dict[Interleaving, float] = {"shared-base": 0.019, "lockstep": 0.022, "replicates": 0.27}
"""Standard deviations of a ratio, assumed on a machine without earlier runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Expected time, memory, disk space and width of the intervals of a plan; None for what would be a guess."""

    time_s: float | None
    basis: str
    """The source of the time."""
    replicates: int | None = None
    """The expected number of replicates."""
    skipped: tuple[str, ...] = ()
    """Parts that the time limit is expected to skip."""
    half_width: float | None = None
    """Half the interval of a training ratio, as a fraction."""
    detectable: float | None = None
    """The slow-down of a step, as a fraction, that is found in 80 % of such runs."""
    decided: int | None = None
    """With planned looks, the replicates after which variants that are alike are decided; the time is of these."""
    noise: str = ""
    """The source of the half-width."""
    sought_width_s: float | None = None
    """Seconds needed for a half-width of 3 %."""
    memory_bytes: int | None = None
    """The largest memory of processes that are live at the same time."""
    disk_bytes: int | None = None
    unknown: str | None = None
    """Why memory or disk space is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTimes:
    """The input times of a simulation."""

    import_s: float
    trials: Mapping[str, TrialTimes]
    """Times by the name of the variant."""
    parallel: int
    """Processes that run at once while nothing is timed."""
    basis: str


def forecast(
    plan: Plan, machine: Machine, runs: Path, executor: Executor | None = None, *, if_busy: IfBusy = "refuse"
) -> Forecast:
    """Predict the time, the width of the intervals, the largest memory of processes that are live at the same time, and
    the disk space of a run.

    The `executor`, which is not started yet, times the steps; None if steps cannot be timed. If its device is in use
    (`if_busy`), it times them nevertheless, or not at all.
    """
    expected = _forecast_time(plan, machine, runs, time_steps(plan, executor, if_busy))
    if not plan.study.supports("built"):
        return dataclasses.replace(expected, unknown="it is the variants' own")
    shape_of = {workload: shapes.shape(catalogue.resolve(workload.model)) for workload in plan.workloads}
    needs = needed_bytes(plan.arms, machine, runs)
    kinds = {frozenset(slot.arm.name for slot in group.slots): group for group in plan.groups}
    memory = max(_group_bytes(group, needs, machine, forked=not plan.sides) for group in kinds.values())
    expected = dataclasses.replace(expected, memory_bytes=None if math.isinf(memory) else int(memory))
    unknown = next(filter(None, (missing_formula(arm.built, shape_of[arm.workload]) for arm in plan.arms)), None)
    if unknown is not None:
        return dataclasses.replace(expected, unknown=unknown)
    tokens = sum(
        4 * 8 * workload.sequence_length * (workload.train_sequences + workload.held_out_sequences)
        for workload in plan.workloads
    )
    adapter = max(adapter_parameters(arm.built, shape_of[arm.workload]) for arm in plan.arms)
    return dataclasses.replace(expected, disk_bytes=tokens + len(plan.slots) * 64 * 1024 + adapter * 4)


def _forecast_time(plan: Plan, machine: Machine, runs: Path, times: PlanTimes | str) -> Forecast:
    """The time of a plan and the width of its intervals; `times` is a text if they are unknown."""
    protocol = plan.study.protocol
    sd, noise = _scatter(plan, machine, runs)
    if isinstance(times, str):
        replicates = protocol.replicates if protocol.max_minutes is None else None
        width = None if replicates is None else half_width(sd, replicates, plan)
        return Forecast(time_s=None, basis=times, replicates=replicates, half_width=width, noise=noise if width else "")
    try:
        ends, skipped = simulate(plan, times)
    except TimeLimitTooShortError as error:
        return Forecast(time_s=None, basis=f"{times.basis}: {str(error).rstrip('.')}", replicates=0)
    each = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0]
    decided = _expected_look(sd, len(ends), plan)
    counts = range(2, MAX_REPLICATES)
    narrow = bisect.bisect_left(counts, True, key=lambda n: (half_width(sd, n, plan) or 1.0) <= TARGET_HALF_WIDTH)
    return Forecast(
        time_s=ends[(decided or len(ends)) - 1],
        basis=times.basis,
        replicates=len(ends),
        skipped=skipped,
        half_width=half_width(sd, len(ends), plan),
        detectable=_detectable(sd, len(ends), plan),
        decided=decided,
        noise=noise,
        sought_width_s=ends[0] + (counts[narrow] - 1) * each if narrow < len(counts) else None,
    )


def half_width(sd: float, replicates: int, plan: Plan) -> float | None:
    """Half the interval of a ratio as a fraction, if the log ratio of one replicate has the standard deviation `sd` and
    all comparisons of the plan share their scatter; None for one replicate."""
    if replicates < 2:
        return None
    spread, rule = _spread_and_rule(sd, replicates, plan)
    return math.expm1(spread.half_width(rule.tail(spread)))


def _detectable(sd: float, replicates: int, plan: Plan) -> float | None:
    return None if replicates < 2 else math.expm1(detectable_effect(*_spread_and_rule(sd, replicates, plan)))


def _expected_look(sd: float, replicates: int, plan: Plan) -> int | None:
    """The first look at which variants without any difference are equivalent, else the last; None without looks."""
    looks = [look for look in plan.study.protocol.looks if 1 < look <= replicates]
    for look in looks:
        spread, rule = _spread_and_rule(sd, look, plan)
        if spread.half_width(rule.alpha) < rule.margin_limit:
            return look
    return replicates if looks else None


def _spread_and_rule(sd: float, replicates: int, plan: Plan) -> tuple[Spread, VerdictRule]:
    sided = any(arm.side for arm in plan.arms)
    comparisons = 1 if sided else len(plan.arms) - 1
    prior = min(PRIOR_DF, (comparisons - 1) * (replicates - 1))
    spread = Spread(
        standard_error=sd / math.sqrt(replicates), df=replicates - 1 + prior, sd=sd, df_per_replicate=1.0,
        prior_df=prior, shared_by=comparisons if prior else 0,
    )  # fmt: skip
    family = max(1, comparisons - 1)  # the control is a separate family
    return spread, VerdictRule(family=family, alpha=plan.study.protocol.alpha)


# --- the simulation ---------------------------------------------------------------------------------------------------


def simulate(plan: Plan, times: PlanTimes) -> tuple[list[float], tuple[str, ...]]:
    """The end time of each replicate of a plan, in seconds from its start, and the skipped parts.

    Raises:
        TimeLimitTooShortError: not one replicate fits into the time limit.
    """
    unlimited = plan.study.with_protocol(precision=None, until_decided=False)  # the scatter is not simulated
    plan = dataclasses.replace(plan, study=unlimited)
    protocol = plan.study.protocol
    # Without a limit, all replicates after those of peaks and cold starts take the same time.
    begin = (protocol.peak_replicates, protocol.cold_replicates or 0)
    count = 2 + max((one for one in begin if one < protocol.replicates), default=0)
    if protocol.max_minutes is None:
        plan = dataclasses.replace(plan, groups=tuple(one for one in plan.groups if one.replicate < count))
    executor = _SimulatedExecutor(plan, times)
    budget = Budget(
        None if protocol.max_minutes is None else 60 * protocol.max_minutes,
        replicates=protocol.replicates,
        clock=lambda: executor.now_s,
    )
    loads = {
        base_key(arm.variant, arm.workload): times.trials[arm.variant.name].load_s
        for arm in plan.arms
        if isinstance(arm.variant, Variant)
    }
    executor.now_s += times.import_s + sum(loads.values())
    budget.import_s, budget.load_s = times.import_s, sum(loads.values()) / max(1, len(loads))
    context = RunContext(device="cpu", max_parallel=times.parallel)
    ends: dict[int, float] = {}

    def save(record: TrialRecord) -> None:
        ends[record.replicate] = executor.now_s

    executors = {slot.executor: executor for slot in plan.slots}
    run_plan(plan, executors, context, save=save, display=Display(), budget=budget)
    found = list(ends.values())
    later = range(1, protocol.replicates - count + 1 if protocol.max_minutes is None else 1)
    return found + [found[-1] + more * (found[-1] - found[-2]) for more in later], tuple(sorted(budget.skipped))


class _SimulatedExecutor(Executor):
    """Executes commands by advancing its own clock."""

    def __init__(self, plan: Plan, times: PlanTimes) -> None:
        self.now_s = 0.0
        self.times = times
        self.slots = {slot.trial: slot for slot in plan.slots}
        self.protocol = plan.study.protocol

    def make_place(self, trial: str, log: str) -> TrialFiles:
        """Return empty paths."""
        return TrialFiles(scratch="", log_path="")

    def clear_place(self, trial: str) -> None:
        """Do nothing."""

    def launch(self) -> _SimulatedWorker:
        """Launch a worker in no time."""
        return _SimulatedWorker(self)

    def start_interpreter(self, log_path: str, timeout_s: float, request: Request | None = None) -> PartialRecord:
        """Advance by the imports of a new interpreter, and with a request by the rest of a cold start."""
        self.now_s += self.times.import_s
        rest = PartialRecord() if request is None else self.launch().ask("cold", request.trial, 0.0)
        whole_s = sum(rest.values.values(), self.times.import_s)
        return PartialRecord(values={"cold_import_time_s": self.times.import_s, "cold_start_time_s": whole_s})


class _SimulatedWorker(Worker):
    """Works from the moment a command is sent; other workers may work at the same time."""

    start_latency_s = 0.0

    def __init__(self, executor: _SimulatedExecutor) -> None:
        self._executor = executor
        self._ready_s = 0.0
        self._answer = PartialRecord()
        self._repeated: dict[str, tuple[str, int]] = {}
        """The last command of each trial, and how often it was repeated."""

    def send(self, command: str, trial: str, **arguments: Any) -> None:
        """Begin the work of a command."""
        slot, protocol = self._executor.slots[trial], self._executor.protocol
        times, steps = self._executor.times.trials[slot.variant.name], arguments.get("steps", protocol.warmup_steps_min)
        last, rounds = self._repeated.get(trial, ("", 0))
        self._repeated[trial] = command, rounds + 1 if command == last else 1
        evaluates = "steps" in slot.measures and not (command == "build" and slot.replicate)
        work = Work(
            load_s=times.load_s, step_s=times.step_s, evaluate_s=times.evaluate_s if evaluates else 0.0,
            request_s=times.request_s, steps=steps, rounds=rounds, workload=slot.workload, protocol=protocol,
        )  # fmt: skip
        seconds = COMMANDS[command].cost(work)
        self._ready_s = self._executor.now_s + seconds
        taken = steps * (times.step_s,)
        self._answer = {
            "build": PartialRecord(values={"build_step_time_s": times.step_s}),
            "warm_up": PartialRecord(samples={"warmup_step_time_s": taken}),
            "turn": PartialRecord(samples={"step_time_s": taken, "step_cpu_time_s": taken}),
            "cold": PartialRecord(values={"cold_after_import_time_s": seconds}),
        }.get(command, PartialRecord())

    def receive(self, command: str, timeout_s: float) -> PartialRecord:
        """The answer, at the time when it is due."""
        self._executor.now_s = max(self._executor.now_s, self._ready_s)
        return self._answer

    def close(self) -> None:
        """Do nothing: there is no process."""


# --- the times it uses ------------------------------------------------------------------------------------------------


def time_steps(plan: Plan, executor: Executor | None, if_busy: IfBusy = "refuse") -> PlanTimes | str:
    """Time each variant on two layers of its model, in a separate process; or return why this failed."""
    if not plan.study.supports("built"):
        return "only what lorameter builds is timed in advance"
    if executor is None:
        return "steps are not timed on other machines"
    if any(slot.workload.ranks > 1 for slot in plan.slots):
        return "steps of several ranks are not timed in advance"
    try:
        with hold_devices([executor], if_busy), scratch_folder() as folder, contextlib.closing(executor):
            executor.start(folder, plan.study.workload.threads)
            hello = executor.hello()
            first = {slot.variant.name: slot for slot in reversed(plan.slots)}
            end = time.monotonic() + TIMING_LIMIT_S
            trials = {name: _time_variant(plan, slot, executor, hello.device, end) for name, slot in first.items()}
            return PlanTimes(
                import_s=hello.import_time_s,
                trials=trials,
                parallel=max_parallel(plan, dict.fromkeys([""], executor)),
                basis="two layers of each model, timed now",
            )
    except (LorameterError, WorkerLostError) as error:
        if isinstance(error, WorkerLostError) and error.status == "timeout":
            return f"timing its steps takes more than {format_duration(TIMING_LIMIT_S)} here"
        return f"its steps cannot be timed: {str(error).rstrip('.')}"


def _time_variant(plan: Plan, slot: Slot, executor: Executor, device: str, end: float) -> TrialTimes:
    context = RunContext(device=device)
    request = make_request(plan, slot, context, executor.make_place(slot.trial, slot.trial))
    with contextlib.closing(executor.launch()) as worker:
        answer = worker.ask("times", slot.trial, max(end - time.monotonic(), 1.0), request=codec.to_json(request))
    if answer.failure is not None:
        raise WorkerLostError(answer.status, answer.failure)
    times, workload = answer.values, slot.workload
    return TrialTimes(
        step_s=times["step"],
        evaluate_s=times["evaluate"] * math.ceil(workload.held_out_sequences / workload.batch_size),
        request_s=times["request"],
        load_s=times["load"],
    )


def _scatter(plan: Plan, machine: Machine, runs: Path) -> tuple[float, str]:
    """The standard deviation of a replicate's log ratio, and its source."""
    for run in latest_runs(machine, runs):
        if run.manifest.interleaving == plan.interleaving and not run.manifest.sides and not run.manifest.sites:
            groups = group_trials(run.records)
            reference = str(run.manifest.study.get("reference"))
            pairs = pairs_against(groups.get((reference, "variant")), groups, "step_time_s").values()
            deviations = [
                effect.spread.sd
                for effect in (pair.shared for pair in pairs)
                if effect is not None and effect.spread is not None and effect.replicates >= TARGET_REPLICATES
            ]
            if deviations:
                sd = statistics.median(deviations)
                return sd, f"scatter of {format_percent(sd)} a replicate, as in run {run.manifest.run}"
    sd = SCATTER[plan.interleaving]
    return sd, f"an assumed scatter of {format_percent(sd)} a replicate"


def latest_runs(machine: Machine, runs: Path) -> Iterator[Run]:
    """The latest readable runs on this machine, newest first."""
    for path in reversed(store.list_runs(runs)[-LATEST_RUNS:]):
        with contextlib.suppress(LorameterError):
            if store.read_manifest(path).provenance.get("device_name") == machine.device_name:
                yield store.read_run(str(path), runs)


# --- memory -----------------------------------------------------------------------------------------------------------


def _group_bytes(group: Group, needs: Mapping[str, float], machine: Machine, *, forked: bool) -> float:
    """Memory of the processes of a group: each counts with its largest trial."""
    largest = [max(launch, key=lambda slot: needs[slot.arm.name]) for launch in group.launches]
    return live_group_bytes([slot.arm for slot in largest], needs, machine, forked=forked)


def live_group_bytes(arms: Sequence[Arm], needs: Mapping[str, float], machine: Machine, *, forked: bool) -> float:
    """Expected memory of one live process for each arm, with shared memory counted once; infinite if one is unknown.

    `needs` is the memory of single processes, by the name of the arm; `forked` says whether one process that has
    imported the libraries is the parent of all, as in a plan without sides.
    """
    total = sum(needs[arm.name] for arm in arms)
    if math.isinf(total) or machine.device != "cpu" or arms[0].workload.model == OWN:
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


def needed_bytes(arms: Sequence[Arm], machine: Machine, runs: Path | None) -> dict[str, float]:
    """Expected memory of a trial's processes on a device, by the name of the arm: the peak of an earlier run if there
    is one, else the estimate; infinite if the model's layers are unknown. On a GPU it is device memory."""
    baseline = baseline_bytes(machine.cuda)
    kinds = {"cpu": ("host_peak_train_bytes", 0), "cuda": ("device_peak_reserved_train_bytes", CUDA_CONTEXT_BYTES)}
    kind, extra = kinds[machine.device]
    workloads = {arm.workload for arm in arms}
    measured = {one: {} if runs is None else measured_peaks(one, machine, runs, kind) for one in workloads}

    def need(variant: AnyVariant, workload: Workload) -> float:
        """Memory of one process."""
        peak = measured[workload].get(variant.id, math.inf) + extra
        shape = None if workload.model == OWN else shapes.shape(catalogue.resolve(workload.model))
        if shape is None or not isinstance(variant, Variant) or unknown_layers(shape):
            return peak
        if missing_formula(variant, shape):  # there is no formula for its method
            return bound_bytes(variant, workload, shape, machine.device, baseline) if math.isinf(peak) else peak
        expected = estimate_peak(
            variant, workload, shape, device=machine.device, repacks=machine.avx512_bf16, process_bytes=baseline
        )
        if math.isinf(peak):
            return expected.needed_bytes
        # A measured peak is that of training; requests may need more.
        return max(peak, expected.needed_bytes if expected.phase == "generate" else 0)

    return {
        arm.name: processes_on_device(arm.workload, machine.device) * need(arm.variant, arm.workload) for arm in arms
    }


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
