"""Measures the facts that the harness assumes about a GPU, and prints each as a line of JSON.

A fact that cannot be measured gives a line with the reason, and the next facts follow. Nothing is judged here:
`benchmarks.gpu.claims` defines what each fact decides.

    python -m benchmarks.gpu.probe [FACT ...]
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

Fact = dict[str, Any]
NEEDS_NO_GPU = ("zygote",)
RESTS_S = (0.0, 0.003, 0.03, 0.3, 2.0)
"""No rest, which gives the noise; about the time of a hand-over between turns; and pauses after which a GPU may lower
its clocks."""
COUNTED_S = 1.5


def zygote() -> Fact:
    """Return whether a zygote forks and what its child can do, in a new process with a worker's environment."""
    from lorameter.run.workers.local import worker_environment

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.forked"], env=worker_environment(1), capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
    return dict(json.loads(lines[-1]))


def attention() -> Fact:
    """Return the attention backend that torch selects for the shapes of a study, and the backends that accept a
    mask."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as attend

    def heads(number: int, length: int, *, rows: int = 4, dtype: Any = torch.bfloat16, grad: bool = False) -> Any:
        return torch.randn(rows, number, length, 128, device="cuda", dtype=dtype, requires_grad=grad)

    mask = torch.ones(4, 1, 1024, 1024, device="cuda", dtype=torch.bool).tril()
    attend(heads(32, 8), heads(32, 8), heads(32, 8), is_causal=True)  # the first call fixes torch's order of backends
    cases = {
        "causal": ([heads(32, 1024, grad=True) for _ in range(3)], {"is_causal": True}),
        "masked": ([heads(32, 1024, grad=True) for _ in range(3)], {"attn_mask": mask}),
        "grouped": ([heads(32, 1024, grad=True), heads(8, 1024), heads(8, 1024)], {"is_causal": True}),
        "one token": ([heads(32, 1, rows=1), heads(32, 300, rows=1), heads(32, 300, rows=1)], {}),
        "float32": ([heads(32, 256, dtype=torch.float32) for _ in range(3)], {"is_causal": True}),
    }
    chosen = {}
    for name, (tensors, options) in cases.items():
        number = torch._fused_sdp_choice(
            *tensors, options.get("attn_mask"), 0.0, options.get("is_causal", False), enable_gqa=name == "grouped"
        )
        chosen[name] = SDPBackend(number).name
    takes_mask = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            try:
                attend(*cases["masked"][0], attn_mask=mask)
                takes_mask[backend.name] = True
            except RuntimeError:
                takes_mask[backend.name] = False
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {"capability": capability, "chosen": chosen, "takes_mask": takes_mask}


def clock() -> Fact:
    """Return the ratio of a step's time after each rest of the GPU to that of a step without one."""
    from lorameter.trial.process import Stopwatch

    work, watch = products(), Stopwatch("cuda")

    def median_s(rest_s: float, laps: int) -> float:
        taken = []
        for _ in range(laps):
            time.sleep(rest_s)
            taken.append(watch(lambda: work(20))[1].time_s)
        return statistics.median(taken)

    lap_s = median_s(0.0, 12)
    after = {str(rest): median_s(rest, 15 if rest < 0.1 else 3) / lap_s for rest in RESTS_S}
    return {"lap_s": lap_s, "after_rest": after}


def counters() -> Fact:
    """Return the period of the energy counter, and the clocks during and after queued work."""
    import torch

    from lorameter.machine.telemetry import open_torch_gpu

    opened, work = open_torch_gpu("cuda"), products()
    gpu = opened.value
    if gpu is None:
        raise RuntimeError(f"NVML does not find the GPU of torch: {opened.reason}")
    moved, before, end = [], gpu.energy_j().value, time.perf_counter() + COUNTED_S
    while time.perf_counter() < end:
        work(2)
        torch.cuda.synchronize()
        now = gpu.energy_j().value
        if now != before:
            moved.append(time.perf_counter())
            before = now
    gaps = [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(moved)]
    queued, after = [], []
    for _ in range(10):
        work(60)
        queued.append(gpu.sample())
        torch.cuda.synchronize()
        after.append(gpu.sample())
    gpu.close()
    return {
        "energy_period_ms": statistics.median(gaps) if gaps else None,
        "queued": clocks(queued),
        "after": clocks(after),
    }


def clocks(samples: list[Any]) -> Fact:
    """Return the median clock of the samples, and how many samples are of an idle GPU."""
    found = [one["sm_clock_hz"].value for one in samples if one["sm_clock_hz"].known]
    return {
        "sm_clock_hz": statistics.median(found) if found else None,
        "idle": sum("gpu_idle" in (one["events"].value or ()) for one in samples),
        "of": len(samples),
    }


def products() -> Callable[[int], None]:
    """Return a function that queues the given number of large products without waiting; it is warmed up."""
    import torch

    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def work(times: int) -> None:
        for _ in range(times):
            left @ left

    work(20)
    torch.cuda.synchronize()
    return work


FACTS: tuple[Callable[[], Fact], ...] = (zygote, attention, clock, counters)


def main(arguments: list[str]) -> int:
    """Measure all facts or the given ones; return 0 unless an available fact could not be read."""
    import torch

    failed = 0
    for look in FACTS:
        name = look.__name__
        if arguments and name not in arguments:
            continue
        if name not in NEEDS_NO_GPU and not torch.cuda.is_available():
            found: Fact = {"skipped": f"no CUDA device: torch {torch.__version__} sees none"}
        else:
            try:
                found = look()
            except Exception as error:
                failed, found = failed + 1, {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps({"fact": name, **found}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
