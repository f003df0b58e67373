"""A profile: what was observed of one trial's steps, as facts. What they mean is computed from them on demand.

A step is watched in two ways that exclude each other. Timed between the borders of its phases, these have true times
and nothing is known of what ran in them. Under the profiler everything that ran is known, and its times are those of a
slower step. So each is a record of its own, and shares of the one are never mixed with
seconds of the other without a word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from harness.models.costs.peaks import Peak
from harness.records.memory_account import MemoryAccount, MemoryPhase
from harness.records.record import TrialRecord
from harness.studies.variant import Variant
from harness.studies.workload import Workload

SCHEMA = 1
ACTIVITY, TRACE, PEAKS = "activity.json", "trace.json.gz", "peaks.json"
ACCOUNTS: dict[MemoryPhase, str] = {"train": "memory-train.json", "generate": "memory-generate.json"}
"""What a profiled trial leaves in its folder: what ran, the trace that it was read from, peaks, and memory by phase."""
PHASES = ("data", "forward", "backward", "update")
"""Phases of a step: taking the batch, forward, backward, clipping and the optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorUse:
    """One kernel of a GPU, or one operator of a CPU without those that it calls, in a mean step."""

    name: str
    category: str
    """As in kernels_check: "matmul", "dequantize", ..., "other"."""
    calls: float
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseActivity:
    """What ran in one phase of a mean step under the profiler."""

    phase: str
    window_s: float
    """From border to border."""
    busy_s: float
    """Time in which anything of `operators` ran; on a GPU streams may overlap, so it can be less than their sum."""
    operators: tuple[OperatorUse, ...]
    """The longest first."""
    totals_s: dict[str, float] = field(default_factory=dict)
    """Seconds of each operator by name with all that it calls; empty on a GPU, whose kernels call nothing."""

    @property
    def categories_s(self) -> dict[str, float]:
        """Seconds of each category, the largest first."""
        sums: dict[str, float] = {}
        for one in self.operators:
            sums[one.category] = sums.get(one.category, 0.0) + one.time_s
        return dict(sorted(sums.items(), key=lambda pair: -pair[1]))

    @property
    def calls(self) -> float:
        """Launches, or calls of operators."""
        return sum(one.calls for one in self.operators)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What ran in some steps under the profiler, as their mean."""

    device: Literal["cpu", "cuda"]
    """What `operators` are: operators of the host, or kernels."""
    step_times_s: tuple[float, ...]
    """Each profiled step."""
    phases: tuple[PhaseActivity, ...]
    missing: str = ""
    """Why it is not known what ran; empty where it is."""

    @property
    def window_s(self) -> float:
        """Time of a step from border to border, over all phases."""
        return sum(phase.window_s for phase in self.phases)

    @property
    def calls(self) -> float:
        """Launches, or calls of operators, of a step."""
        return sum(phase.calls for phase in self.phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """All that was observed of one variant: nothing in it is an estimate."""

    schema: int = SCHEMA
    study: str
    variant: Variant
    workload: Workload
    device: Literal["cpu", "cuda"]
    device_name: str
    threads: int
    cpus: int
    """CPUs that the process may run on."""
    wide_registers: bool
    """Whether a CPU multiplies 16-bit numbers faster than 32-bit ones (AVX512-BF16); not read on a GPU."""
    memory_bytes: int
    """What the device that trains had free before the trial, or has in all where that is not known."""
    record: TrialRecord
    """Raw times and bytes of the trial, its checks and notices."""
    activity: Activity
    memory: dict[str, MemoryAccount]
    """Of a step and of a request, by phase."""
    peaks: dict[str, Peak]
    """What the device does at best, by "product" and "memory"; stated by the vendor, or measured after the trial. One
    is missing where nobody states it and the trial has left no memory to measure it in."""
    measured_peaks: dict[str, Peak] = field(default_factory=dict)
    """The same as measured after the trial, also where the vendor states it."""
    estimates: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes by kind as `harness.models.costs.memory` expects them from the shape alone, by phase; empty where the model's
    layers are not known."""
