"""The JSON document of `estimate`, as types, like those of `documents`."""

from __future__ import annotations

import msgspec


class PhaseOf(msgspec.Struct, forbid_unknown_fields=True):
    """One phase: training or generation."""

    kinds: dict[str, int]
    """Bytes by kind; empty where the model's layers are not known."""
    beside: dict[str, int]
    """Bytes that no allocator counts: CUDA's context, and paged optimizer state, which may lie on the host."""
    total_bytes: int | None
    """The peak: of torch's allocator on a GPU, else of the process."""
    measured_bytes: int | None
    """The largest peak of an earlier run of this variant and workload."""
    error: float | None
    """The total over what was measured, less 1."""


class NeedsOf(msgspec.Struct, forbid_unknown_fields=True):
    """What must be free on the device, CUDA's context included, as a range."""

    expected_bytes: int
    low_bytes: int
    high_bytes: int


class DeviceOf(msgspec.Struct, forbid_unknown_fields=True):
    """Where it is to fit."""

    name: str
    total_bytes: int
    usable_bytes: int
    """What counts: of this machine what is free now, of another GPU what its driver leaves, which is assumed."""
    source: str
    """Where the total is from."""
    assumed: list[str]
    """What was measured on no GPU."""


class ErrorOf(msgspec.Struct, forbid_unknown_fields=True):
    """How far a peak may be from its estimate: peak over estimate, less 1."""

    low: float
    high: float
    basis: str
    """The comparison of peaks and estimates that supports it."""


class MemoryOptionOf(msgspec.Struct, forbid_unknown_fields=True):
    """A key of the study with another value."""

    writes: str
    table: str
    """variant or workload: where it is written."""
    freed_bytes: int
    needs: NeedsOf
    """With this change alone."""
    status: str


class SkippedOptionOf(msgspec.Struct, forbid_unknown_fields=True):
    """A change that cannot be had, or that frees nothing."""

    writes: str
    why: str


class LargestOf(msgspec.Struct, forbid_unknown_fields=True):
    """The most of one size that fits, the other as it is."""

    key: str
    """batch_size or sequence_length."""
    value: int | None
    """Null where not even `least` fits."""
    least: int
    bound: str
    """What keeps it from being larger: memory, context (of the model) or study (the most that one may ask for)."""


class FitOf(msgspec.Struct, forbid_unknown_fields=True):
    """Whether it fits."""

    device: DeviceOf
    status: str
    """fits, may-not-fit or does-not-fit: all of the range is within what is usable, a part of it, or nothing."""
    needs: NeedsOf
    """Of the phase that needs most."""
    phases: dict[str, NeedsOf]
    spare_bytes: int
    """Usable less the upper end of what is needed; below zero it is what would lack."""
    error: ErrorOf
    options: list[MemoryOptionOf]
    """What frees most first."""
    skipped: list[SkippedOptionOf]
    turn: list[str] | None
    """The fewest changes with which it fits: empty where it does as it is, null where all are not enough."""
    largest: list[LargestOf]
    """With `--max-batch`."""


class EstimateOf(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`estimate VARIANT --json`; `profile` and `fit` with `--gpu` or `--max-batch` alone."""

    schema: int
    variant: str
    id: str
    model: str
    device: str
    """cpu or cuda."""
    train: PhaseOf
    generate: PhaseOf
    notices: list[str]
    profile: str | None = None
    """Of the study, that the device takes."""
    fit: FitOf | None = None
    """Null where the model's layers are not known."""


DOCUMENTS: tuple[type[msgspec.Struct], ...] = (EstimateOf,)
PARTS: tuple[type[msgspec.Struct], ...] = (
    PhaseOf, FitOf, NeedsOf, DeviceOf, ErrorOf, MemoryOptionOf, SkippedOptionOf, LargestOf,
)  # fmt: skip
