"""What a worker is asked: all that it needs to measure one trial, or to prepare the base of several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorameter.records.record import SCHEMA, Interleaving, Measure, Role
from lorameter.studies.protocol import Protocol
from lorameter.studies.variant import ScriptVariant, Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the trials of all variants need; paths are absolute and local to the machine that measures."""

    schema: int = SCHEMA
    trial: str
    """Unique within the run, readable: `r1-nf4-r16`."""
    role: Role
    replicate: int
    seed: int
    """Seeds adapter initialisation, dropout and optimizer; equal for all variants of a replicate."""
    workload: Workload
    protocol: Protocol
    interleaving: Interleaving
    measures: tuple[Measure, ...]
    device: str
    threads: int
    tokens_path: str
    scratch: str
    """Folder of this trial: saved adapter, compile caches."""
    log_path: str
    allow_fallback: bool = False
    requirements: dict[str, Any] = field(default_factory=dict)
    """Requirements of the study, in addition to those that follow from the variant; paths as in kernels_check."""
    slowdown_rows: int = 0
    """Rows of an extra matrix product in every adapted layer's forward: a real slow-down of known cause, which shows
    what a protocol can see. 0 in every measurement of a variant."""
    base: str = ""
    """Folder of the prepared base, to be mapped; without one the process reads, converts and quantises it itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest(Request):
    """All that a worker needs to measure one trial of a variant that lorameter builds."""

    variant: Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptRequest(Request):
    """All that a worker needs to measure one trial of a script."""

    variant: ScriptVariant


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRequest:
    """All that a worker needs to prepare a base."""

    workload: Workload
    """Says the model, and the seed of random weights."""
    variant: Variant
    """Says the form; any of those that stand on the base."""
    device: str
    threads: int
    log_path: str

    @property
    def key(self) -> BaseKey:
        """Equal for requests of one base."""
        return base_key(self.variant, self.workload)


BaseKey = tuple[str, int, str, str, bool]


def base_key(variant: Variant, workload: Workload) -> BaseKey:
    """Equal for trials that stand on one base: model and seed of its random weights, type, quantisation, and whether
    its constants are quantised too. The type that a 4-bit layer multiplies in is no part of what it stores."""
    nested = variant.is_4bit and variant.double_quant
    return workload.model, workload.data_seed, variant.dtype, variant.quantization, nested


def base_words(variant: Variant, workload: Workload) -> str:
    """The same for people."""
    quantised = "" if variant.quantization == "none" else f", {variant.quantization}"
    nested = " with double quantisation" if variant.is_4bit and variant.double_quant else ""
    return f"{workload.model}, {variant.dtype}{quantised}{nested}"
