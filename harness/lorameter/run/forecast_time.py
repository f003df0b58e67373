"""Predicts how long a plan takes and how wide its intervals will be, by the rule of `lorameter.run.budget`.

The cost of a replicate comes from an earlier run of the same study on the same machine, with any number of replicates
and minutes. Without one, a CPU's is estimated from its own matrix speed, measured for a moment; a GPU's is not guessed.
The scatter comes from the latest run on this machine at the same level of interleaving, else it is assumed.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorameter.errors import LorameterError
from lorameter.machine.provenance import Machine
from lorameter.models.costs.lora import uncounted
from lorameter.models.shapes import ModelShape, linear_widths
from lorameter.records import codec, store
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run, measuring_time_s
from lorameter.records.units import format_duration, format_percent
from lorameter.run.budget import SOUGHT_REPLICATES, Cost, Part, fit, replicate_s
from lorameter.run.interleaving import SCATTER
from lorameter.run.plan import Plan
from lorameter.stats import VerdictRule
from lorameter.stats.effect import Spread
from lorameter.stats.shared_scatter import PRIOR_DF
from lorameter.studies.workload import Workload
from lorameter.verdicts.series import group_trials, pairs_against

PROCESS_START_S = 6.0
"""A new interpreter with these imports, measured on two cores."""
CHECK_S = 1.0
"""Fork and build of a small model, measured on two cores."""
CHECK_STEPS = 6
"""Steps that the first step, the watched one, one more and the held-out loss are worth."""
LAYER_OVERHEAD_S = 3e-3
"""Python and dispatch for one layer's forward and backward on a CPU, measured."""
RUNS_LOOKED_AT = 20
"""Latest runs that are searched."""
SOUGHT_WIDTH = 0.03
"""Half-width for which the minutes are predicted."""
MOST_REPLICATES = 200
RULE_OF_THUMB = "a rule of thumb from this CPU's matrix speed; expect a factor of 2"
_SAMPLES: dict[Part, str] = {
    "requests": "request_time_s", "open_ended": "open_ended_request_time_s", "merged": "merged_request_time_s",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeForecast:
    """Each is None where it would be a guess."""

    time_s: float | None
    basis: str
    """What the time rests on."""
    replicates: int | None = None
    """That the run will have."""
    skipped: tuple[str, ...] = ()
    """What the time limit will leave out."""
    half_width: float | None = None
    """Of the interval of a training ratio, a fraction."""
    noise: str = ""
    """What the half-width rests on."""
    sought_width_s: float | None = None
    """Seconds that a half-width of 3 % takes."""


@dataclass(frozen=True, slots=True)
class _ReplicateCost:
    parts: Mapping[Part, Cost]
    once_s: float
    """What the run takes outside of its replicates: imports, bases, the first check."""
    basis: str


def forecast_time(plan: Plan, machine: Machine, shapes: Mapping[Workload, ModelShape], runs: Path) -> TimeForecast:
    """What a plan takes and how wide its intervals will be; `shapes` are empty for scripts."""
    protocol = plan.study.protocol
    limit_s = None if protocol.max_minutes is None else 60 * protocol.max_minutes
    sd, noise = _scatter(plan, machine, runs)
    found = _measured_cost(plan, machine, runs) or _estimated_cost(plan, machine, shapes)
    if isinstance(found, str):
        replicates = protocol.replicates if limit_s is None else None
        width = None if replicates is None else half_width(sd, replicates, plan)
        return TimeForecast(
            time_s=limit_s, basis=found, replicates=replicates, half_width=width, noise=noise if width else ""
        )
    parts, replicates, rounds = dict(found.parts), protocol.replicates, protocol.turns
    skipped: tuple[str, ...] = ()
    basis = found.basis
    if limit_s is not None:
        left_s, sought = limit_s - found.once_s, min(SOUGHT_REPLICATES, protocol.replicates)
        fitting = fit(parts, left_s, planned=replicates, sought=sought, most_rounds=rounds)
        replicates, rounds, skipped = max(1, fitting.replicates), fitting.rounds, fitting.dropped
        parts = {part: cost for part, cost in parts.items() if part not in skipped}
    each = replicate_s(parts, rounds)
    whole_s = found.once_s + replicates * each
    if limit_s is not None and whole_s > limit_s:
        basis = f"the limit of {limit_s / 60:g} minutes; one replicate takes {format_duration(whole_s)} by {basis}"
    wanted = next((n for n in range(2, MOST_REPLICATES) if (half_width(sd, n, plan) or 1.0) <= SOUGHT_WIDTH), None)
    return TimeForecast(
        time_s=whole_s if limit_s is None else min(whole_s, limit_s),
        basis=basis,
        replicates=replicates,
        skipped=skipped,
        half_width=half_width(sd, replicates, plan),
        noise=noise,
        sought_width_s=None if wanted is None else found.once_s + wanted * each,
    )


def half_width(sd: float, replicates: int, plan: Plan) -> float | None:
    """Half the interval of a ratio as a fraction, where the log ratio of one replicate has the standard deviation `sd`
    and all comparisons of the plan share their scatter; None of one replicate."""
    if replicates < 2:
        return None
    sided = any(one.side for one in plan.arms)
    comparisons = 1 if sided else len(plan.arms) - 1
    prior = min(PRIOR_DF, (comparisons - 1) * (replicates - 1))
    spread = Spread(
        standard_error=sd / math.sqrt(replicates), df=replicates - 1 + prior, sd=sd, df_per_replicate=1.0,
        prior_df=prior, shared_by=comparisons if prior else 0,
    )  # fmt: skip
    family = max(1, comparisons - 1)  # the control is a family of its own
    return math.expm1(spread.half_width(VerdictRule(family=family).tail(spread)))


def _scatter(plan: Plan, machine: Machine, runs: Path) -> tuple[float, str]:
    """The standard deviation of a replicate's log ratio, and what it rests on."""
    for run in _latest(machine, runs):
        if run.manifest.interleaving == plan.interleaving and not run.manifest.sides and not run.manifest.sites:
            groups = group_trials(run.records)
            reference = str(run.manifest.study.get("reference"))
            if (reference, "variant") not in groups:
                continue
            effects = [one.effect for one in pairs_against(groups, reference, "step_time_s").values()]
            found = [one.spread.sd for one in effects if one.spread is not None and one.replicates >= SOUGHT_REPLICATES]
            if found:
                sd = statistics.median(found)
                return sd, f"scatter of {format_percent(sd)} a replicate, as in run {run.manifest.run}"
    sd = SCATTER[plan.interleaving]
    return sd, f"an assumed scatter of {format_percent(sd)} a replicate"


def _latest(machine: Machine, runs: Path) -> Iterator[Run]:
    for path in reversed(store.list_runs(runs)[-RUNS_LOOKED_AT:]):
        with contextlib.suppress(LorameterError):
            if store.read_manifest(path).provenance.get("device_name") == machine.device_name:
                yield store.read_run(str(path), runs)


def _measured_cost(plan: Plan, machine: Machine, runs: Path) -> _ReplicateCost | None:
    """The cost of a replicate in the latest complete run of the same study, level and phases on the same machine."""
    for path in reversed(store.list_runs(runs)):
        with contextlib.suppress(LorameterError):
            manifest = store.read_manifest(path)  # a run of another study is not read for nothing
            if (
                manifest.provenance.get("device_name") == machine.device_name
                and _question(manifest.study) == _question(codec.to_json(plan.study))
                and manifest.own_workloads == codec.to_json(plan.own_workloads)
                and manifest.interleaving == plan.interleaving
                and manifest.phases == plan.phases
                and manifest.status == "complete"
                and (records := store.read_run(str(path), runs).records)
            ):
                return _cost_of(plan, records, path.name)
    return None


def _question(study: Mapping[str, Any]) -> dict[str, Any]:
    """A study as JSON data without how often and how long it is measured."""
    protocol = {
        key: value
        for key, value in study.get("protocol", {}).items()
        if key not in ("replicates", "max_minutes", "precision")
    }
    return {**study, "protocol": protocol}


def _cost_of(plan: Plan, records: tuple[TrialRecord, ...], run: str) -> _ReplicateCost:
    by_replicate: dict[int, list[TrialRecord]] = {}
    for record in records:
        by_replicate.setdefault(record.replicate, []).append(record)
    totals = {number: measuring_time_s(group) for number, group in by_replicate.items()}
    later = {number: total for number, total in totals.items() if number} or totals  # the first checks more
    total_s = statistics.fmean(later.values())
    parts: dict[Part, Cost] = {"training": Cost()}
    for number in later:
        for record in by_replicate[number]:
            if record.turn_lengths:
                parts["training"].round_s += sum(record.samples.get("step_time_s", ())) / len(record.turn_lengths)
            for part, name in _SAMPLES.items():
                if times := record.samples.get(name):
                    cost = parts.setdefault(part, Cost())
                    cost.round_s += statistics.fmean(times)
                    cost.fixed_s += (1 + plan.study.protocol.generate_warmup) * statistics.fmean(times)
            if starts := record.samples.get("cold_start_time_s"):
                import_s = record.values.get("cold_import_time_s", 0.0)
                parts.setdefault("cold", Cost()).fixed_s += starts[0] - import_s * (1 - 1 / len(by_replicate[number]))
    for cost in parts.values():
        cost.fixed_s /= len(later)
        cost.round_s /= len(later)
    taken = max((len(record.turn_lengths) for record in records if record.replicate in later), default=0)
    timed_s = sum(cost.fixed_s + taken * cost.round_s for cost in parts.values())
    parts["training"].fixed_s = max(0.0, total_s - timed_s)
    once_s = PROCESS_START_S + max(0.0, totals.get(0, total_s) - total_s)
    return _ReplicateCost(parts, once_s, f"replicates of run {run}")


def _estimated_cost(plan: Plan, machine: Machine, shapes: Mapping[Workload, ModelShape]) -> _ReplicateCost | str:
    """The cost of a replicate by the matrix speed of a CPU; or why there is none."""
    if plan.study.of_scripts:
        return "no earlier run of these scripts"
    if machine.device != "cpu":
        return "no earlier run of this study on this device"
    if unknown := next(filter(None, (uncounted(arm.built, shapes[arm.workload]) for arm in plan.arms)), None):
        return unknown
    protocol, rate = plan.study.protocol, _matrix_rate()
    seconds = {workload: _step_and_token_s(workload, shape, rate) for workload, shape in shapes.items()}
    parts: dict[Part, Cost] = {"training": Cost()}
    once_s = PROCESS_START_S
    for slot in plan.slots:
        if slot.replicate:
            continue
        new_tokens, (step, token) = slot.workload.new_tokens, seconds[slot.workload]
        if "steps" not in slot.measures:
            once_s += CHECK_S + (CHECK_STEPS + protocol.warmup_steps_min) * step
            continue
        once_s += protocol.warmup_steps_min * step
        parts["training"].fixed_s += CHECK_S + CHECK_STEPS * step
        parts["training"].round_s += protocol.steps_per_turn * step
        requests = 3 if slot.workload.adapters > 1 else 1  # of one adapter, after a switch, mixed
        for part in ("requests", "merged"):
            if part in slot.measures:
                cost = parts.setdefault(part, Cost())
                cost.fixed_s += (1 + protocol.generate_warmup) * new_tokens * token
                cost.round_s += requests * new_tokens * token
        if "cold" in slot.measures:
            cost = parts.setdefault("cold", Cost(fixed_s=PROCESS_START_S))
            cost.fixed_s += CHECK_S + new_tokens * token
    return _ReplicateCost(parts, once_s, RULE_OF_THUMB)


def _step_and_token_s(workload: Workload, shape: ModelShape, rate: float) -> tuple[float, float]:
    """A training step, and a generated token of each prompt of a request, on a CPU of so many operations a second."""
    weights = shape.layers * sum(inputs * outputs for inputs, outputs in linear_widths(shape).values())
    weights += shape.vocab_size * shape.hidden_size
    tokens = workload.batch_size * workload.sequence_length
    step = 4 * weights * tokens / rate + shape.layers * LAYER_OVERHEAD_S
    return step, 2 * weights * workload.request_batch / rate + shape.layers * LAYER_OVERHEAD_S / 3


def _matrix_rate() -> float:
    """Floating-point operations a second of a 512³ float32 product on one thread of this CPU, best of five."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    left = np.ones((512, 512), dtype=np.float32)
    with threadpool_limits(1):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            left @ left
            times.append(time.perf_counter() - begin)
    return float(2 * 512**3 / min(times))
