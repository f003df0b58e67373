"""A profile: what was observed of one trial's steps, as facts. What they mean is computed from them on demand.

A step is watched in two ways that exclude each other. Timed between the borders of its phases, these have true times
and nothing is known of what ran in them. Under the profiler everything that ran is known, and its times are those of a
slower step. So each is a record of its own, and shares of the one are never mixed with
seconds of the other without a word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lorameter.models.costs.peaks import Peak
from lorameter.records.activity import Activity
from lorameter.records.memory_account import MemoryAccount
from lorameter.records.record import TrialRecord
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What a profile holds of a trial whatever was taken apart, its steps or its requests: nothing is an estimate."""

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
    """What the device had free before the trial, or has in all where that is not known."""
    record: TrialRecord
    """Raw times and bytes of the trial, its checks and notices."""
    activity: Activity
    """What ran under the profiler."""
    peaks: dict[str, Peak]
    """What the device does at best, by "product" and "memory"; stated by the vendor, or measured after the trial. One
    is missing where nobody states it and the trial has left no memory to measure it in."""
    measured_peaks: dict[str, Peak] = field(default_factory=dict)
    """The same as measured after the trial, also where the vendor states it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(Watched):
    """All that was observed of one variant's steps."""

    memory: dict[str, MemoryAccount]
    """Of a step, under "train"; profiles of older versions have one of a request as well."""
    estimates: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes by kind as `lorameter.models.costs.memory` expects them from the shape alone, by phase; empty where the
    model's layers are not known."""
