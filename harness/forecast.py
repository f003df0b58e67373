"""What a plan will take: time, memory and disk, before it runs. Rules of thumb, and each says what it rests on.

Time comes from an earlier run of the same study on the same machine where there is one. Without one, a CPU's is
estimated from its own matrix speed, measured for a moment; a GPU's is not guessed. Memory: weights at their stored
size, adapter with gradient and two Adam moments in float32, activations by Korthikanti et al. (2022, arXiv
2205.05198, about 34 bytes per token, layer and hidden unit without the attention matrix), and the logits.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from harness import catalogue, shapes, store
from harness.errors import LorameterError
from harness.plan import Plan
from harness.provenance import Machine
from harness.shapes import ModelShape
from harness.variant import ALL_LINEAR, Variant

PROCESS_BYTES = 700 * 2**20
"""Interpreter with torch, transformers, peft and bitsandbytes: 0.5 to 0.7 GiB resident (measured, CPU build)."""
PROCESS_START_S = 6.0
"""A new interpreter with these imports, measured on two cores."""
CHECK_S = 3.0
"""Fork, build and check of a small model, measured on two cores."""
LAYER_OVERHEAD_S = 3e-3
"""Python and dispatch for one layer's forward and backward on a CPU, measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Expected cost of a plan; `time_s` is None where it would be a guess. `basis` says what the time rests on."""

    time_s: float | None
    basis: str
    memory_bytes: int
    disk_bytes: int


def forecast(plan: Plan, machine: Machine, runs: Path) -> Forecast:
    """Expected wall time, peak memory of the largest trial (with its process) and disk of a run."""
    shape = shapes.shape(catalogue.resolve(plan.study.workload.model))
    adapters = [adapter_parameters(variant, shape) for variant, _ in plan.members]
    memory = max(memory_bytes(variant, plan, shape) for variant, _ in plan.members)
    workload = plan.study.workload
    tokens = 4 * 8 * workload.sequence_length * (workload.train_sequences + workload.held_out_sequences)
    disk = tokens + len(plan.slots) * 64 * 1024 + max(adapters) * 4
    time_s, basis = _time(plan, machine, shape, runs)
    return Forecast(time_s=time_s, basis=basis, memory_bytes=PROCESS_BYTES + memory, disk_bytes=disk)


def linear_widths(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of one block, by the name that target_modules would use."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "q_proj": (shape.hidden_size, query),
        "k_proj": (shape.hidden_size, key),
        "v_proj": (shape.hidden_size, key),
        "o_proj": (query, shape.hidden_size),
        "gate_proj": (shape.hidden_size, shape.intermediate_size),
        "up_proj": (shape.hidden_size, shape.intermediate_size),
        "down_proj": (shape.intermediate_size, shape.hidden_size),
    }


def adapter_parameters(variant: Variant, shape: ModelShape) -> int:
    """Trainable parameters of a Llama-shaped model: r (in + out) for each target; PEFT's default targets q and v."""
    targets = variant.target_modules or ("q_proj", "v_proj")
    widths = linear_widths(shape)
    chosen = widths.values() if ALL_LINEAR in targets else [width for name, width in widths.items() if name in targets]
    return shape.layers * sum(variant.r * (inputs + outputs) for inputs, outputs in chosen)


def memory_bytes(variant: Variant, plan: Plan, shape: ModelShape) -> int:
    """Expected peak of training beyond the bare process."""
    workload = plan.study.workload
    wide = 4 if variant.dtype == "float32" else 2
    linear = shape.layers * sum(inputs * outputs for inputs, outputs in linear_widths(shape).values())
    per_weight = {"none": float(wide), "int8": 1.0}.get(
        variant.quantization, 4.127 / 8 if variant.double_quant else 4.5 / 8
    )
    embeddings = (
        shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2) * (4 if variant.prepare_for_kbit else wide)
    )
    tokens = workload.batch_size * workload.sequence_length
    kept = 2 if variant.gradient_checkpointing else 34
    activations = tokens * shape.hidden_size * shape.layers * kept * wide // 2 + 3 * tokens * shape.vocab_size * 4
    return int(linear * per_weight) + embeddings + 16 * adapter_parameters(variant, shape) + activations


def _time(plan: Plan, machine: Machine, shape: ModelShape, runs: Path) -> tuple[float | None, str]:
    earlier = _earlier_trial_s(plan, machine, runs)
    if earlier is not None:
        seconds, run = earlier
        return PROCESS_START_S + seconds * len(plan.slots), f"trials of run {run}"
    if machine.device != "cpu":
        return None, "no earlier run of this study on this device"
    workload, protocol = plan.study.workload, plan.study.protocol
    weights = shape.layers * sum(inputs * outputs for inputs, outputs in linear_widths(shape).values())
    weights += shape.vocab_size * shape.hidden_size
    rate = _matrix_rate()
    tokens = workload.batch_size * workload.sequence_length
    step = 4 * weights * tokens / rate + shape.layers * LAYER_OVERHEAD_S
    steps = 1 + protocol.warmup_steps_max + protocol.turns * protocol.steps_per_turn
    requests = 2 * (1 + protocol.generate_warmup + protocol.generate_requests) * ("generate" in plan.phases)
    token = 2 * weights / rate + shape.layers * LAYER_OVERHEAD_S / 3
    cold = (PROCESS_START_S + workload.new_tokens * token) * ("cold" in plan.phases)
    trial = CHECK_S + 10 * step + steps * step + requests * workload.new_tokens * token + cold
    return PROCESS_START_S + trial * len(
        plan.slots
    ), "a rule of thumb from this CPU's matrix speed; expect a factor of 2"


def _earlier_trial_s(plan: Plan, machine: Machine, runs: Path) -> tuple[float, str] | None:
    for path in reversed(store.list_runs(runs)):
        try:
            run = store.read_run(str(path), runs)
        except LorameterError:
            continue
        same = run.manifest.provenance.get("device_name") == machine.device_name
        if same and run.manifest.study == plan.study_json() and set(run.manifest.phases) >= set(plan.phases):
            walls = [record.wall_time_s for record in run.records if record.status == "ok"]
            if walls:
                return statistics.fmean(walls), path.name
    return None


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
