"""Requests to workers (for trials and bases), the commands of a trial, and the modes of serving an adapter.

The parent sends the names in `COMMANDS`. The row of a command defines the telemetry that is read around it.

The reference mode of serving a trained adapter is the unmerged adapter on the base on which it was trained. The other
modes merge it, put it on the 16-bit weights, or quantise the base. A 4-bit base allows two merges, and both are
measured: PEFT adds the update to the dequantised weights and quantises the sum again, which loses changes smaller than
a step of the 4-bit grid; or the weights are dequantised permanently and the sum stays in the base's dtype. Two modes
are controls: the reference is served again in another process, which shows the noise, and the base is served without
the adapter, because if the adapter has no effect, a merge proves nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lorameter.measurements.declaration import Command
from lorameter.measurements.metrics import MEASUREMENTS, Measure
from lorameter.records.record import SCHEMA, Interleaving, Role
from lorameter.studies.form import AnyVariant
from lorameter.studies.protocol import Protocol
from lorameter.studies.quantization import SMALLEST
from lorameter.studies.variant import BuiltVariant, LoraVariant, Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The data that a worker needs to measure one trial; paths are absolute and local to the measuring machine."""

    schema: int = SCHEMA
    trial: str
    """Unique in the run, and readable: `r1-nf4-r16`."""
    role: Role
    replicate: int
    seed: int
    """Seed for adapter initialisation, dropout and optimizer; equal for all variants of a replicate."""
    variant: AnyVariant
    workload: Workload
    protocol: Protocol
    interleaving: Interleaving
    measures: tuple[Measure, ...]
    device: str
    threads: int
    tokens_path: str
    scratch: str
    """Folder of this trial, for the saved adapter and compile caches."""
    log_path: str
    allow_fallback: bool = False
    requirements: dict[str, Any] = field(default_factory=dict)
    """Requirements of the study, in addition to those of the variant; by kernels_check path."""
    slowdown_rows: int = 0
    """Rows of an extra matrix product in every adapted layer's forward pass: a slow-down of known cause, which tests
    the power of a protocol. 0 in real measurements."""
    base: str = ""
    """Folder of the prepared base, which is mapped; if empty, the process reads, converts and quantises the base
    itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest(Request):
    """The request of a trial whose variant lorameter builds, as its worker reads it."""

    variant: BuiltVariant


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRequest:
    """The data that a worker needs to prepare a base."""

    workload: Workload
    """Defines the model, and the seed of random weights."""
    variant: BuiltVariant
    """Defines dtype and quantisation; any variant on the base."""
    device: str
    threads: int
    log_path: str


BaseKey = tuple[str, int, str, str, bool]


def base_key(variant: Variant, workload: Workload) -> BaseKey:
    """A key that is equal for trials on the same base: model, seed of random weights, dtype, quantisation, and double
    quantisation. The compute dtype of a 4-bit layer does not affect the stored base."""
    nested = bool(variant.effective("double_quant"))
    return workload.model, workload.data_seed, variant.dtype, variant.quantization, nested


def base_words(variant: Variant, workload: Workload) -> str:
    """A description of the base."""
    quantised = f", {variant.quantization}" if variant.format.is_quantised else ""
    nested = " with double quantisation" if variant.effective("double_quant") else ""
    return f"{workload.model}, {variant.dtype}{quantised}{nested}"


# --- commands of a trial ----------------------------------------------------------------------------------------------


COMMANDS = {
    command.name: command
    for command in (
        # of a process that has no trial
        Command(name="base", label="preparing the base"),
        Command(name="times", label="timing two layers"),
        Command(name="parity", label="serving the adapter"),
        Command(name="prepare", label="starting"),
        # of a trial, around its measurements
        Command(name="build", label="building", cost=lambda work: work.step_s + work.evaluate_s),
        Command(name="verify", label="checking what runs", cost=lambda work: work.step_s),
        Command(name="warm_up", label="warming up", cost=lambda work: work.steps * work.step_s),
        Command(name="close", label="checking the shared base"),
        *(command for measurement in MEASUREMENTS.values() for command in measurement.commands),
        # of a trial that is profiled, which executes the other commands as well
        Command(name="memory_breakdown", label="memory breakdown"),
        Command(name="profile", label="profiling steps", telemetry_phase="train", ends="train"),
        Command(name="peak", label="measuring peak throughput"),
        Command(name="activity", label="recording what runs in a step"),
        Command(name="profile_requests", label="profiling requests", telemetry_phase="generate"),
        Command(name="request_facts", label="tracing a request"),
        Command(name="request_activity", label="recording what runs in a request"),
    )
}
"""By name."""


# --- ways to serve an adapter -----------------------------------------------------------------------------------------

AGAIN = ", asked again"
WITHOUT = "no adapter, "


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMode:
    """One mode of serving an adapter."""

    name: str
    """Description; unique among the modes of a variant."""
    variant: BuiltVariant
    """Defines the base: its dtype, quantisation and attention."""
    merged: bool = False
    adapter: bool = True
    """Whether the adapter is active."""
    dequantised: bool = False
    """Whether the base's quantised weights are first dequantised to its dtype."""

    @property
    def is_control(self) -> bool:
        """Whether it is a control for the other modes."""
        return not self.adapter or self.name.endswith(AGAIN)


def serving_modes(variant: Variant) -> tuple[tuple[ServingMode, ...], ...]:
    """All modes that apply, grouped by the loaded base from which one process serves them; the first is the reference.

    Within a group a merge comes last, because it changes the base.
    """
    own = dataclasses.replace(variant, merge_adapter=False)
    if isinstance(own, LoraVariant):
        own = dataclasses.replace(own, init_lora_weights="default")
    name = own.storage
    reference = ServingMode(name=f"unmerged, {name}", variant=own)
    groups: list[tuple[ServingMode, ...]] = [
        (
            reference,
            dataclasses.replace(reference, name=f"{WITHOUT}{name}", adapter=False),
            *((dataclasses.replace(reference, name=f"merged into {name}", merged=True),) if own.format.merges else ()),
        ),
        (dataclasses.replace(reference, name=f"{reference.name}{AGAIN}"),),
    ]
    if own.format.dequantises:
        groups.append((ServingMode(name=f"merged, {name} dequantised", variant=own, merged=True, dequantised=True),))
    # The 16-bit base and the 4-bit one, except the variant's own. The 16-bit dtype is the variant's if it has one; the
    # 4-bit base is NF4, with the other settings of the variant.
    plain = own.unquantised()
    others = [dataclasses.replace(plain, dtype=own.dtype if own.dtype != "float32" else "bfloat16")]
    smallest = dataclasses.replace(plain, quantization=SMALLEST.name)
    if own.stored_bits > smallest.stored_bits:
        others.append(smallest)
    for other in (one for one in others if one.storage != name):
        unmerged = ServingMode(name=f"unmerged, {other.storage}", variant=other)
        merged = dataclasses.replace(unmerged, name=f"merged into {other.storage}", merged=True)
        groups.append((unmerged, merged))
    return tuple(groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRequest:
    """A request to serve an adapter in the modes of one group."""

    trial: TrialRequest
    """Defines the workload, the prompts, the device and the folder of the reference's logits."""
    adapter: str
    """Folder of the adapter, as saved by PEFT."""
    ways: tuple[ServingMode, ...]
    reference: tuple[tuple[int, ...], ...] = ()
    """The reference's answers, over which logits are compared; empty if the first mode is the reference."""
