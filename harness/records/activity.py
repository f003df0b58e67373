"""What a profiled trial leaves behind: the names of its files, and what ran in the phases of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from harness.records.memory_account import MemoryPhase

ACTIVITY, TRACE, PEAKS = "activity.json", "trace.json.gz", "peaks.json"
ACCOUNTS: dict[MemoryPhase, str] = {"train": "memory-train.json", "generate": "memory-generate.json"}
"""What a profiled trial leaves in its folder: what ran, the trace that it was read from, peaks, and memory by phase."""
STEP_PHASES = ("data", "forward", "backward", "update")
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


LEAST_STEP_PAIRS = 8
"""Where fewer undisturbed pairs would remain, all count."""
