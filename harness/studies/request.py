"""What a worker is asked: all that it needs to measure one trial."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.records.record import SCHEMA, Instrument, Interleaving, Measure, Role
from harness.studies.protocol import Protocol
from harness.studies.variant import Variant
from harness.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """All that a worker needs to measure one trial; paths are absolute and local to the machine that measures."""

    schema: int = SCHEMA
    trial: str
    """Unique within the run, readable: `r1-nf4-r16`."""
    variant: Variant
    role: Role
    replicate: int
    seed: int
    """Seeds adapter initialisation, dropout and optimizer; equal for all variants of a replicate."""
    workload: Workload
    protocol: Protocol
    interleaving: Interleaving
    measures: tuple[Measure, ...]
    instrument: Instrument = "profile"
    device: str
    threads: int
    tokens_path: str
    scratch: str
    """Folder of this trial: saved adapter, compile caches."""
    log_path: str
    allow_fallback: bool = False
    requirements: dict[str, Any] = field(default_factory=dict)
    """Requirements of the study beside those that follow from the variant; paths as in kernels_check."""
    injected_rows: int = 0
    """Rows of an extra matrix product in every adapted layer's forward: a real slow-down of known cause, which shows
    what a protocol can see. 0 in every measurement of a variant."""
