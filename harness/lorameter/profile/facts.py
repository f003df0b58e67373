"""Profiles: what was observed of one trial's steps or requests. Conclusions are computed from these facts on demand.

A step is observed in two ways that exclude each other. Timed between the borders of its phases, these have true times
and it is unknown what ran in them. Under the profiler everything that ran is known, and its times are those of a
slower step. So each is a record of its own, and shares of the one are never mixed with seconds of the other without
a word.
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
from lorameter.records.memory_account import MemoryAccount
from lorameter.records.record import TrialRecord
from lorameter.studies.variant import BuiltVariant
from lorameter.studies.workload import Workload

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialProfile:
    """What a profile of steps and one of requests have in common; nothing is an estimate.

    Attributes:
        schema: version of the file.
        study: name.
        variant: as profiled.
        workload: as profiled.
        device: "cpu" or "cuda".
        device_name: as its vendor calls it.
        threads: of the trial.
        cpus: that the process may run on.
        wide_registers: whether a CPU multiplies 16-bit numbers faster than 32-bit ones (AVX512-BF16); not read on a
            GPU.
        memory_bytes: what the device had free before the trial, or has in all where that is not known.
        record: raw times and bytes of the trial, its checks and notices.
        activity: what ran under the profiler.
        peaks: what the device does at best, by "product" and "memory"; stated by the vendor, or measured after the
            trial. One is missing where the vendor states none and there was no memory or time to measure it.
        measured_peaks: the same as measured after the trial, also where the vendor states it.
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
    """All that was observed of one variant's steps: `memory` at the peak of one, and `estimates` of its bytes by kind
    from the shape alone (`lorameter.models.costs.memory`), empty where the model's layers are not known."""

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
"""Parts of a cold start in their order; consecutive, so that they add up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestProfile(TrialProfile):
    """All that was observed of one variant's requests; times with the adapter merged begin with "merged_". What ran is
    that of the adapter as the variant serves it.

    `merged_activity` is what ran with the adapter merged, None where the variant serves it so; `memory` that at the
    peak of a request; `shape` that of the model, None where its files do not say.
    """

    facts: RequestFacts
    merged_activity: Activity | None
    memory: MemoryAccount
    shape: ModelShape | None = None

    @property
    def merged(self) -> RequestProfile | None:
        """The same profile with the activity of the merged adapter."""
        if self.merged_activity is None:
            return None
        return dataclasses.replace(self, activity=self.merged_activity)

    @property
    def cold_parts_s(self) -> dict[str, float]:
        """Seconds of each part of a cold start; nothing where its parts were not timed."""
        values = self.record.values
        if "cold_base_time_s" not in values:
            return {}
        known = values | {"cold_rest_s": values["cold_completion_time_s"] - values["cold_first_token_time_s"]}
        return {name: known[name] for name in COLD_PARTS if name in known}


def find_shape(model: str) -> ModelShape | None:
    """The shape of a model by its name; None of a type whose layers are not known."""
    try:
        return shapes.shape(catalogue.resolve(model))
    except UsageError:
        return None
