"""Predicts whether a variant will fit on a device, and the largest batch and length that fit.

An estimate (`lorameter.models.costs.memory`) has a range in which the peak is expected. A variant is reported as
fitting only if the upper end fits; if only the lower end fits, it may not fit. The largest size is found by bisection,
since an estimate grows with batch and length. On a CPU the estimate decreases once, at the size from which malloc no
longer keeps the memory that a step frees, so the sizes below and above are searched separately.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lorameter.errors import UsageError, require
from lorameter.machine.provenance import Machine
from lorameter.models.costs.lora import element_bytes
from lorameter.models.costs.memory import (
    CUDA_CONTEXT_BYTES,
    estimate_peak,
    mapped_from_tokens,
    peak_range,
)
from lorameter.models.costs.peaks import DRIVER_SHARE, DRIVER_SOURCE, GpuSpec
from lorameter.models.shapes import ModelShape
from lorameter.records.units import format_bytes, format_percent
from lorameter.run.feasibility import check_widths
from lorameter.studies import protocol
from lorameter.studies.quantization import SMALLEST
from lorameter.studies.variant import Variant
from lorameter.studies.workload import MAX_BATCH, MIN_LENGTH, Workload

FitStatus = Literal["fits", "may-not-fit", "does-not-fit"]
SizeKey = Literal["batch_size", "sequence_length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryDevice:
    """The device whose memory is compared with an estimate."""

    name: str
    machine: Machine
    """This machine with that device."""
    total_bytes: int
    usable_bytes: int
    """The part that processes can allocate."""
    source: str
    """The source of `total_bytes`."""
    is_here: bool
    """Whether it is in this machine, so that `usable_bytes` is its free memory now."""
    assumed: tuple[str, ...] = ()
    """Assumptions of the estimate, which were not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The range of the peak memory."""

    expected_bytes: int
    low_bytes: int
    high_bytes: int

    @classmethod
    def of(cls, expected_bytes: int, device: str) -> Needs:
        """The range around an estimate, as wide as the errors of estimates for "cpu" or "cuda"."""
        low, high = peak_range(expected_bytes, device)
        return cls(expected_bytes=expected_bytes, low_bytes=low, high_bytes=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The largest value of one size of the workload for which it and all smaller values fit; the other size is
    unchanged."""

    key: SizeKey
    value: int | None
    """The largest value; None if not even `least` fits."""
    least: int
    bound: Literal["memory", "context", "study"]
    """The limit of the size: the device's memory, the model's context, or the limits of a study."""


_GPU_ASSUMPTIONS = (
    f"CUDA's context and libraries take {format_bytes(CUDA_CONTEXT_BYTES)}, which is in what is needed (400 to 600 MiB "
    "are usual)",
    "torch's allocator loses nothing to fragments",
    "nothing else uses the GPU",
)


def on_gpu(machine: Machine, gpu: GpuSpec) -> MemoryDevice:
    """A listed GPU, treated as if it were in this machine."""
    with_gpu = dataclasses.replace(
        machine, device="cuda", device_name=gpu.device_name, device_memory_bytes=gpu.total_bytes
    )
    return MemoryDevice(
        name=gpu.name, machine=with_gpu, total_bytes=gpu.total_bytes, usable_bytes=gpu.usable_bytes,
        source=gpu.source, is_here=False,
        assumed=(f"the driver keeps {format_percent(DRIVER_SHARE)} of the GPU ({DRIVER_SOURCE})", *_GPU_ASSUMPTIONS),
    )  # fmt: skip


def on_machine(machine: Machine, free_bytes: int | None) -> MemoryDevice:
    """The device of this machine, with its free memory.

    Raises:
        UsageError: NVML does not report the GPU's memory.
    """
    total = machine.device_memory_bytes if machine.device == "cuda" else machine.memory_bytes
    if total is None:
        raise UsageError(f"{machine.device_name}: how much memory it has is not known. Say it, as in --gpu 24GiB.")
    return MemoryDevice(
        name=machine.device_name, machine=machine, total_bytes=total, source="this machine", is_here=True,
        usable_bytes=total if free_bytes is None else min(free_bytes, total),
        assumed=_GPU_ASSUMPTIONS[:2] if machine.device == "cuda" else (),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitter:
    """Estimates of one model on one device."""

    device: MemoryDevice
    shape: ModelShape
    process_bytes: int | None

    def needs(self, variant: Variant, workload: Workload) -> Needs:
        """The memory of the phase with the largest peak. Raises `UnknownLayersError`."""
        expected = estimate_peak(
            variant, workload, self.shape, device=self.device.machine.device,
            repacks=self.device.machine.avx512_bf16, process_bytes=self.process_bytes,
        )  # fmt: skip
        return Needs.of(expected.needed_bytes, self.device.machine.device)

    def status(self, needs: Needs) -> FitStatus:
        """Whether the whole range, a part of it, or none of it fits on the device."""
        if needs.high_bytes <= self.device.usable_bytes:
            return "fits"
        return "may-not-fit" if needs.low_bytes <= self.device.usable_bytes else "does-not-fit"

    def largest(self, variant: Variant, workload: Workload, key: SizeKey) -> Largest:
        """The largest `batch_size` or `sequence_length` for which it and all smaller ones fit, with the other size of
        the workload. A length is limited by the model's context and by the number of tokens that a study may prepare.
        """
        least, most, other = 1, MAX_BATCH, workload.sequence_length
        limit: Literal["context", "study"] = "study"
        if key == "sequence_length":
            sequences = max(workload.train_sequences, workload.held_out_sequences)
            least, most, other = MIN_LENGTH, protocol.MAX_TOKENS // sequences, workload.batch_size
            if self.shape.context <= most:
                most, limit = self.shape.context, "context"

        def exceeds(size: int) -> bool:
            changed: dict[str, Any] = {key: size}
            return self.status(self.needs(variant, dataclasses.replace(workload, **changed))) != "fits"

        pieces = [range(least, most + 1)]
        falls_at = math.ceil(mapped_from_tokens(variant, self.shape) / other)
        if self.device.machine.device == "cpu" and falls_at in pieces[0]:  # an estimate decreases there
            pieces = [range(least, falls_at), range(falls_at, most + 1)]
        best: int | None = None
        for piece in filter(None, pieces):
            fitting = bisect.bisect_left(piece, True, key=exceeds)
            best = piece[fitting - 1] if fitting else best
            if fitting < len(piece):
                break
        return Largest(key=key, value=best, least=least, bound=limit if best == most else "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOption:
    """A change that frees memory."""

    writes: str
    """The line of a study that makes the change."""
    table: Literal["variant", "workload"]
    """The table of the study that has the line."""
    needs: Needs
    """The memory with only this change."""
    freed_bytes: int
    status: FitStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedOption:
    """A change that this variant or device does not support, or that frees no memory."""

    writes: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The memory that a variant needs, the changes that free memory, and those that make it fit."""

    device: MemoryDevice
    needs: Needs
    """The memory without changes, in the phase with the largest peak."""
    status: FitStatus
    options: tuple[MemoryOption, ...]
    """Possible changes, the one that frees most memory first."""
    skipped: tuple[SkippedOption, ...]
    turn: tuple[str, ...] | None
    """The smallest set of lines with which it fits; empty if it fits unchanged, None if all of them do not suffice."""
    largest: tuple[Largest, ...] = ()
    """The largest batch and length, if requested."""


def advise(fitter: Fitter, variant: Variant, workload: Workload, *, with_largest: bool = False) -> Advice:
    """The memory that each change of a variant frees, and the fewest changes that make it fit.

    Args:
        fitter: estimates of the model on the device.
        variant: the variant without changes.
        workload: the workload without changes.
        with_largest: whether to search for the largest batch and length that fit.

    Raises:
        UsageError: the trial has several ranks, for which memory is not estimated.
        UnknownLayersError: the layers of the model type are unknown.
    """
    require(
        workload.ranks == 1,
        f"workload: ranks = {workload.ranks}: the fit is estimated for one process on one device, and the memory "
        "of each rank is not known. Leave --gpu and --max-batch out, or set ranks = 1.",
    )
    before, cpu = fitter.needs(variant, workload), fitter.device.machine.device == "cpu"
    options: dict[_Change, MemoryOption] = {}
    skipped: list[SkippedOption] = []
    for change in _changes(fitter, variant, workload):
        try:
            changed, smaller = change.apply(variant, workload)
            paged = cpu and changed.optimizer.startswith("paged")
            require(not paged, "nothing is paged on a CPU, and its trials would be invalid")
            check_widths(f"variant {variant.name!r}", changed, fitter.shape, fitter.device.machine)
            after = fitter.needs(changed, smaller)
            require(after.expected_bytes < before.expected_bytes, "it frees nothing at the peak")
        except UsageError as error:
            skipped.append(SkippedOption(writes=change.writes, why=str(error).rstrip(".")))
            continue
        options[change] = MemoryOption(
            writes=change.writes, table=change.table, needs=after,
            freed_bytes=before.expected_bytes - after.expected_bytes, status=fitter.status(after),
        )  # fmt: skip
    order = sorted(options, key=lambda change: -options[change].freed_bytes)
    status = fitter.status(before)
    return Advice(
        device=fitter.device,
        needs=before,
        status=status,
        options=tuple(options[change] for change in order),
        skipped=tuple(skipped),
        turn=() if status == "fits" else _find_fewest(fitter, variant, workload, order),
        largest=tuple(fitter.largest(variant, workload, key) for key in get_args(SizeKey)) if with_largest else (),
    )


@dataclass(frozen=True, slots=True)
class _Change:
    """One line of a study with another value."""

    key: str
    value: bool | int | str

    @property
    def writes(self) -> str:
        """The line of TOML."""
        return f"{self.key} = {json.dumps(self.value)}"

    @property
    def table(self) -> Literal["variant", "workload"]:
        """The table of the line."""
        return "workload" if self.key == "batch_size" else "variant"

    def apply(self, variant: Variant, workload: Workload) -> tuple[Variant, Workload]:
        """The variant and the workload with the change. Raises `UsageError` if the variant does not support it."""
        field: dict[str, Any] = {self.key: self.value}
        if self.table == "workload":
            return variant, dataclasses.replace(workload, **field)
        return dataclasses.replace(variant, **field), workload


def _changes(fitter: Fitter, variant: Variant, workload: Workload) -> list[_Change]:
    """Possible changes of the variant, and a smaller batch: the largest that fits, one if none fits, or half of it if
    the workload fits unchanged."""
    possible = (
        (not variant.gradient_checkpointing, _Change("gradient_checkpointing", True)),
        (variant.stored_bits > (SMALLEST.bits or 0), _Change("quantization", SMALLEST.name)),
        (variant.dtype == "float32", _Change("dtype", "bfloat16")),
        # Preparation casts head, embeddings and norms.
        (variant.prepare_for_kbit and element_bytes(variant.dtype) == 2, _Change("prepare_for_kbit", False)),
        (variant.optimizer != "paged_adamw_8bit", _Change("optimizer", "paged_adamw_8bit")),
    )
    changes = [change for applies, change in possible if applies]
    if workload.batch_size > 1:
        most = fitter.largest(variant, workload, "batch_size").value or 1
        smaller = most if most < workload.batch_size else workload.batch_size // 2
        changes.append(_Change("batch_size", smaller))
    return changes


def _find_fewest(
    fitter: Fitter, variant: Variant, workload: Workload, changes: Sequence[_Change]
) -> tuple[str, ...] | None:
    """The smallest set of changes with which it fits; among sets of the same size, one without a smaller batch, then
    the one that frees most."""
    for size in range(1, len(changes) + 1):
        sets = itertools.combinations(changes, size)
        for chosen in sorted(sets, key=lambda some: any(one.table == "workload" for one in some)):
            changed, smaller = variant, workload
            try:
                for one in chosen:
                    changed, smaller = one.apply(changed, smaller)
            except UsageError:  # two changes that exclude each other
                continue
            if fitter.status(fitter.needs(changed, smaller)) != "fits":
                continue
            most = fitter.largest(changed, workload, "batch_size").value or 1  # it can be larger with the other changes
            rows = f"batch_size = {min(most, workload.batch_size - 1)}"
            return tuple(rows if one.table == "workload" else one.writes for one in chosen)
    return None
