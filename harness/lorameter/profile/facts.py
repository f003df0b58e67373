"""Profiles: the observations of one trial's steps or requests. Conclusions are computed from them on demand.

A step is observed in two ways that exclude each other. Timing between the borders of its phases gives their true times,
but not the operators in them. The profiler records all operators, but slows the step down. So each observation is a
separate record, and shares of one are never silently combined with seconds of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.costs.peaks import Peak
from lorameter.models.shapes import ModelShape
from lorameter.records.activity import Activity, RequestFacts
from lorameter.records.record import MemoryAccount, TrialRecord
from lorameter.studies.variant import BuiltVariant
from lorameter.studies.workload import Workload

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialProfile:
    """The common part of profiles of steps and of requests; it contains no estimates.

    Attributes:
        schema: version of the file.
        study: name of the study.
        variant: the profiled variant.
        workload: the profiled workload.
        device: "cpu" or "cuda".
        device_name: the vendor's name of the device.
        threads: threads of the trial.
        cpus: CPUs on which the process may run.
        wide_registers: whether a CPU multiplies 16-bit numbers faster than 32-bit ones (AVX512-BF16); not read on a
            GPU.
        memory_bytes: free memory of the device before the trial, or its total memory if that is unknown.
        record: raw times and bytes of the trial, its checks and notices.
        activity: the operators recorded by the profiler.
        peaks: peak rates of the device, for "product" and "memory"; stated by the vendor, or measured after the trial.
            A rate is missing if the vendor states none and there was no memory or time to measure it.
        measured_peaks: the rates measured after the trial, also if the vendor states them.
    """

    schema: int = SCHEMA
    study: str
    variant: BuiltVariant
    workload: Workload
    device: Literal["cpu", "cuda"]
    device_name: str
    threads: int
    cpus: int
    wide_registers: bool
    memory_bytes: int
    record: TrialRecord
    activity: Activity
    peaks: dict[str, Peak]
    measured_peaks: dict[str, Peak] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(TrialProfile):
    """The observations of one variant's steps: `memory` at the peak of a step, and `estimates` of its bytes by kind
    from the shape (`lorameter.models.costs.memory`), empty if the model's layers are unknown."""

    memory: MemoryAccount
    estimates: dict[str, int] = field(default_factory=dict)


COLD_PARTS: Mapping[str, str] = {
    "cold_import_time_s": "interpreter and imports",
    "cold_prepare_time_s": "limits, data and device",
    "cold_base_time_s": "reading, moving and quantising the base",
    "cold_adapter_time_s": "the adapter",
    "cold_first_token_time_s": "first token",
    "cold_rest_s": "all other tokens",
}
"""Parts of a cold start in order; they are consecutive, so they add up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestProfile(TrialProfile):
    """The observations of one variant's requests; names of times with the adapter merged begin with "merged_". The
    recorded operators are those of the adapter as the variant serves it.

    `merged_activity` contains the operators with the adapter merged, None if the variant itself serves it merged;
    `memory` is the memory at the peak of a request; `shape` is the model's shape, None if its files do not contain it.
    """

    facts: RequestFacts
    merged_activity: Activity | None
    memory: MemoryAccount
    shape: ModelShape | None = None

    @property
    def merged(self) -> RequestProfile | None:
        """The same profile with the activity of the merged adapter."""
        activity = self.merged_activity
        return None if activity is None else dataclasses.replace(self, activity=activity)

    @property
    def cold_parts_s(self) -> dict[str, float]:
        """Seconds of each part of a cold start; empty if its parts were not timed."""
        values = self.record.values
        if "cold_base_time_s" not in values:
            return {}
        parts_s = values | {"cold_rest_s": values["cold_completion_time_s"] - values["cold_first_token_time_s"]}
        return {name: parts_s[name] for name in COLD_PARTS if name in parts_s}


def find_shape(model: str) -> ModelShape | None:
    """The shape of a model by its name; None for a model type with unknown layers."""
    try:
        return shapes.shape(catalogue.resolve(model))
    except UsageError:
        return None
