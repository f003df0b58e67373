"""Predicts the time of a plan and the width of its intervals, by running the plan in simulated time.

The simulation uses the code of a real run (`lorameter.run.runner`, `lorameter.run.budget`) with workers that only
advance a clock. Their step and request times are timed for each variant on two layers of its model
(`lorameter.trial.step_times`). The scatter comes from the latest run on this machine with the same interleaving, else
it is assumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.errors import LorameterError
from lorameter.machine.provenance import Machine
from lorameter.records import codec, store
from lorameter.records.fileio import scratch_folder
from lorameter.records.record import PartialRecord, TrialRecord
from lorameter.records.store import Run
from lorameter.records.units import format_duration, format_percent
from lorameter.run.budget import TARGET_REPLICATES, Budget, TimeLimitTooShortError
from lorameter.run.device_lock import hold_device
from lorameter.run.display import Display
from lorameter.run.interleaving import SCATTER
from lorameter.run.plan import Plan, Slot
from lorameter.run.prepare import RunContext, make_request, max_parallel
from lorameter.run.runner import run_plan
from lorameter.run.workers import Executor, TrialFiles, Worker, WorkerLostError
from lorameter.stats import VerdictRule
from lorameter.stats.effect import Spread
from lorameter.stats.estimate import PRIOR_DF
from lorameter.studies.request import TrialRequest, base_key
from lorameter.studies.variant import Variant
from lorameter.verdicts.series import group_trials, pairs_against

LATEST_RUNS = 20
"""Maximum runs that are searched for measured times and peaks."""
TARGET_HALF_WIDTH = 0.03
"""Half-width for which the required time is predicted."""
MAX_REPLICATES = 200
TIMING_LIMIT_S = 60.0
"""Time limit for timing the steps of all variants; if it does not suffice, as for a 7B model on a CPU, the time is
unknown."""


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
class TrialTimes:
    """Seconds of the parts of a variant's trial."""

    load_s: float
    """Time to prepare its model, which is prepared once and then mapped."""
    step_s: float
    evaluate_s: float
    """Time for the loss of all held-out records."""
    request_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTimes:
    """The input times of a simulation."""

    import_s: float
    trials: Mapping[str, TrialTimes]
    """Times by the name of the variant."""
    parallel: int
    """Processes that run at once while nothing is timed."""
    basis: str


def forecast_time(plan: Plan, machine: Machine, runs: Path, executor: Executor | None = None) -> Forecast:
    """Predict the time of a plan and the width of its intervals. `executor` times steps and is not started yet; None if
    steps cannot be timed."""
    protocol = plan.study.protocol
    limit_s = None if protocol.max_minutes is None else 60 * protocol.max_minutes
    sd, noise = _scatter(plan, machine, runs)
    times = time_steps(plan, executor)
    if isinstance(times, str):
        replicates = protocol.replicates if limit_s is None else None
        width = None if replicates is None else half_width(sd, replicates, plan)
        return Forecast(
            time_s=limit_s, basis=times, replicates=replicates, half_width=width, noise=noise if width else ""
        )
    try:
        ends, skipped = simulate(plan, times)
    except TimeLimitTooShortError as error:
        return Forecast(time_s=None, basis=f"{times.basis}: {str(error).rstrip('.')}", replicates=0)
    each = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0]
    wanted = next((n for n in range(2, MAX_REPLICATES) if (half_width(sd, n, plan) or 1.0) <= TARGET_HALF_WIDTH), None)
    return Forecast(
        time_s=ends[-1],
        basis=times.basis,
        replicates=len(ends),
        skipped=skipped,
        half_width=half_width(sd, len(ends), plan),
        noise=noise,
        sought_width_s=None if wanted is None else ends[0] + (wanted - 1) * each,
    )


def half_width(sd: float, replicates: int, plan: Plan) -> float | None:
    """Half the interval of a ratio as a fraction, if the log ratio of one replicate has the standard deviation `sd` and
    all comparisons of the plan share their scatter; None for one replicate."""
    if replicates < 2:
        return None
    sided = any(arm.side for arm in plan.arms)
    comparisons = 1 if sided else len(plan.arms) - 1
    prior = min(PRIOR_DF, (comparisons - 1) * (replicates - 1))
    spread = Spread(
        standard_error=sd / math.sqrt(replicates), df=replicates - 1 + prior, sd=sd, df_per_replicate=1.0,
        prior_df=prior, shared_by=comparisons if prior else 0,
    )  # fmt: skip
    family = max(1, comparisons - 1)  # the control is a separate family
    return math.expm1(spread.half_width(VerdictRule(family=family).tail(spread)))


# --- the simulation ---------------------------------------------------------------------------------------------------


def simulate(plan: Plan, times: PlanTimes) -> tuple[list[float], tuple[str, ...]]:
    """The end time of each replicate of a plan, in seconds from its start, and the skipped parts.

    Raises:
        TimeLimitTooShortError: not one replicate fits into the time limit.
    """
    plan = dataclasses.replace(plan, study=plan.study.with_protocol(precision=None))  # the scatter is not simulated
    protocol = plan.study.protocol
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

    names = {slot.executor for slot in plan.slots}
    run_plan(plan, dict.fromkeys(names, executor), context, save=save, listener=Display(), budget=budget)
    return list(ends.values()), tuple(sorted(budget.skipped))


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

    def cold_start(self, request: TrialRequest) -> PartialRecord:
        """Advance by the imports and the rest of a cold start."""
        imports, rest = self.time_imports("", 0.0), self.launch().ask("cold", request.trial, 0.0)
        return PartialRecord(values={"cold_start_time_s": sum([*imports.values.values(), *rest.values.values()])})

    def time_imports(self, log_path: str, timeout_s: float) -> PartialRecord:
        """Advance by the imports of a new interpreter."""
        self.now_s += self.times.import_s
        return PartialRecord(values={"cold_import_time_s": self.times.import_s})


class _SimulatedWorker(Worker):
    """Works from the moment a command is sent; other workers may work at the same time."""

    start_latency_s = 0.0

    def __init__(self, executor: _SimulatedExecutor) -> None:
        self._executor = executor
        self._ready_s = 0.0
        self._answer = PartialRecord()

    def send(self, command: str, trial: str, **arguments: Any) -> None:
        """Begin the work of a command."""
        slot, protocol = self._executor.slots[trial], self._executor.protocol
        times, workload = self._executor.times.trials[slot.variant.name], slot.workload
        steps = arguments.get("steps", protocol.warmup_steps_min)
        evaluate_s = times.evaluate_s if "steps" in slot.measures else 0.0
        requests = 3 if workload.adapters > 1 else 1  # with one adapter, after a switch, mixed
        open_ended_s = times.request_s * workload.open_ended_tokens / workload.new_tokens
        seconds = {
            "build": times.step_s + (0.0 if slot.replicate else evaluate_s),
            "verify": times.step_s,
            "warm_up": steps * times.step_s,
            "turn": steps * times.step_s,
            "train": steps * times.step_s,
            "finish_training": evaluate_s,
            "begin_generate": (1 + protocol.generate_warmup) * times.request_s,
            "request": requests * times.request_s,
            "open_ended": open_ended_s,
            "base_answers": protocol.open_ended_requests * open_ended_s,
            "cold": times.load_s + times.request_s,
        }.get(command, 0.0)
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


def time_steps(plan: Plan, executor: Executor | None) -> PlanTimes | str:
    """Time each variant on two layers of its model, in a separate process; or return why this failed."""
    if plan.study.of_scripts:
        return "steps of scripts are not timed in advance"
    if executor is None:
        return "steps are not timed on other machines"
    if any(slot.workload.ranks > 1 for slot in plan.slots):
        return "steps of several ranks are not timed in advance"
    try:
        with hold_device(executor, "refuse"), scratch_folder() as folder, contextlib.closing(executor):
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
            if (reference, "variant") not in groups:
                continue
            effects = [pairs.effect for pairs in pairs_against(groups, reference, "step_time_s").values()]
            deviations = [
                effect.spread.sd
                for effect in effects
                if effect.spread is not None and effect.replicates >= TARGET_REPLICATES
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
