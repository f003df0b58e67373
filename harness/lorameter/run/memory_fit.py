"""Whether a variant will fit on a device, and the most of it that does.

An estimate (`lorameter.models.costs.memory`) has a range in which the peak is expected. Only what fits at its upper end
is reported as fitting; what fits at the lower end alone may not. The most that fits is found by halving, since an
estimate grows with batch and length; but on a CPU it falls once, where malloc no longer keeps what a step gives back,
and either side of that is searched by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorameter.errors import UsageError
from lorameter.machine.provenance import Machine
from lorameter.models.costs.cards import DRIVER_SHARE, DRIVER_SOURCE, GpuSpec
from lorameter.models.costs.memory import (
    CUDA_CONTEXT_BYTES,
    estimate_peak,
    mapped_from_tokens,
    peak_range,
)
from lorameter.models.shapes import ModelShape
from lorameter.records.units import format_bytes, format_percent
from lorameter.studies import limits
from lorameter.studies.variant import Variant
from lorameter.studies.workload import LEAST_LENGTH, MOST_BATCH, Workload

FitStatus = Literal["fits", "may-not-fit", "does-not-fit"]
Bound = Literal["memory", "context", "study"]
"""What keeps a size from being larger: the device's memory, the model's context, or what a study may ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryDevice:
    """Where something is to fit."""

    name: str
    machine: Machine
    """As it would be with that device."""
    total_bytes: int
    usable_bytes: int
    """What of it processes can have."""
    source: str
    """Where the total is from."""
    is_here: bool
    """Whether it is this machine's, so that `usable_bytes` is what is free now."""
    assumed: tuple[str, ...] = ()
    """What is counted on, or left out, without having been measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What is needed of a device at the peak, as a range."""

    expected_bytes: int
    low_bytes: int
    high_bytes: int

    @classmethod
    def of(cls, expected_bytes: int, device: str) -> Needs:
        """Around an estimate, as wide as estimates for a "cpu" or for "cuda" are off."""
        low, high = peak_range(expected_bytes, device)
        return cls(expected_bytes=expected_bytes, low_bytes=low, high_bytes=high)

    def status_in(self, usable_bytes: int) -> FitStatus:
        """Whether all of the range is within these bytes, a part of it, or nothing."""
        if self.high_bytes <= usable_bytes:
            return "fits"
        return "may-not-fit" if self.low_bytes <= usable_bytes else "does-not-fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The most of one size of the workload with which it and all that is smaller fits, the other size as it is."""

    key: Literal["batch_size", "sequence_length"]
    value: int | None
    """None where not even `least` fits."""
    least: int
    bound: Bound


_OF_CARDS = (
    f"CUDA's context and libraries take {format_bytes(CUDA_CONTEXT_BYTES)}, which is in what is needed (400 to 600 MiB "
    "are usual)",
    "torch's allocator loses nothing to fragments",
    "nothing else uses the GPU",
)


def on_card(machine: Machine, card: GpuSpec) -> MemoryDevice:
    """The GPU, as if it was in this machine."""
    with_card = dataclasses.replace(
        machine, device="cuda", device_name=card.device_name, device_memory_bytes=card.total_bytes
    )
    return MemoryDevice(
        name=card.name, machine=with_card, total_bytes=card.total_bytes, usable_bytes=card.usable_bytes,
        source=card.source, is_here=False,
        assumed=(f"the driver keeps {format_percent(DRIVER_SHARE)} of the GPU ({DRIVER_SOURCE})", *_OF_CARDS),
    )  # fmt: skip


def on_machine(machine: Machine, free_bytes: int | None) -> MemoryDevice:
    """The device of this machine, with what is free of it now.

    Raises:
        UsageError: of a GPU whose memory NVML does not tell.
    """
    total = machine.device_memory_bytes if machine.device == "cuda" else machine.memory_bytes
    if total is None:
        raise UsageError(f"{machine.device_name}: how much memory it has is not known. Say it, as in --gpu 24GiB.")
    return MemoryDevice(
        name=machine.device_name, machine=machine, total_bytes=total, source="this machine", is_here=True,
        usable_bytes=total if free_bytes is None else min(free_bytes, total),
        assumed=_OF_CARDS[:2] if machine.device == "cuda" else (),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitter:
    """Estimates of one model on one device."""

    device: MemoryDevice
    shape: ModelShape
    process_bytes: int | None

    def needs(self, variant: Variant, workload: Workload) -> Needs:
        """Of the phase that needs most. Raises `UnknownLayersError`."""
        expected = estimate_peak(
            variant, workload, self.shape, device=self.device.machine.device,
            repacks=self.device.machine.avx512_bf16, process_bytes=self.process_bytes,
        )  # fmt: skip
        return Needs.of(expected.needed_bytes, self.device.machine.device)

    def status(self, needs: Needs) -> FitStatus:
        """Whether that fits."""
        return needs.status_in(self.device.usable_bytes)

    def _fits(self, variant: Variant, workload: Workload) -> bool:
        return self.status(self.needs(variant, workload)) == "fits"

    def largest_batch(self, variant: Variant, workload: Workload) -> Largest:
        """The largest `batch_size` at the workload's length, such that it fits and each smaller one does."""
        value = self._largest(
            lambda rows: self._fits(variant, dataclasses.replace(workload, batch_size=rows)),
            range(1, MOST_BATCH + 1),
            falls_at=-(-mapped_from_tokens(variant, self.shape) // workload.sequence_length),
        )
        bound: Bound = "study" if value == MOST_BATCH else "memory"
        return Largest(key="batch_size", value=value, least=1, bound=bound)

    def largest_length(self, variant: Variant, workload: Workload) -> Largest:
        """The largest `sequence_length` at the workload's batch; the model's context bounds it, and so does the number
        of tokens that a study may prepare."""
        sequences = max(workload.train_sequences, workload.held_out_sequences)
        most = min(self.shape.context, limits.MOST_TOKENS // sequences)
        value = self._largest(
            lambda length: self._fits(variant, dataclasses.replace(workload, sequence_length=length)),
            range(LEAST_LENGTH, most + 1),
            falls_at=-(-mapped_from_tokens(variant, self.shape) // workload.batch_size),
        )
        bound: Bound = "memory" if value != most else "context" if most == self.shape.context else "study"
        return Largest(key="sequence_length", value=value, least=LEAST_LENGTH, bound=bound)

    def _largest(self, fits: Callable[[int], bool], sizes: range, *, falls_at: int) -> int | None:
        """The last of sizes up to which all fit. An estimate grows with the size, but on a CPU falls once."""
        pieces = [sizes]
        if self.device.machine.device == "cpu" and falls_at in sizes:
            pieces = [range(sizes.start, falls_at), range(falls_at, sizes.stop)]
        best: int | None = None
        for piece in filter(None, pieces):
            found = _last(fits, piece)
            best = best if found is None else found
            if found != piece[-1]:
                break
        return best


def _last(fits: Callable[[int], bool], sizes: range) -> int | None:
    """The last size that fits, where none does after one that does not; None where the first does not."""
    if not fits(sizes[0]):
        return None
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low]
