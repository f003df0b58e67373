"""The memory breakdown of a trial: kinds, the measured peak, and the unexplained remainder.

A sum of parts is informative only if it is independent of the total. So each kind is measured separately, the peak is
measured in another way, and the remainder is a separate line, which may be negative.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import msgspec

MemoryPhase = Literal["train", "generate"]
MEMORY_PHASES: tuple[MemoryPhase, ...] = ("train", "generate")

MEMORY_KINDS: Mapping[str, str] = {
    "process": "process baseline",
    "library_code": "library code paged in since",
    "generated_code": "code that libraries generate",
    "library_heap": "kept by libraries on the heap",
    "interpreter": "arenas of the interpreter",
    "checkpoint_pages": "mapped checkpoint beyond its tensors",
    "linear_weights": "linear layers of the base",
    "quantization_state": "constants of quantisation",
    "embeddings": "embeddings and head",
    "norms": "norms",
    "buffers": "buffers",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "paged_optimizer_state": "optimizer state, paged",
    "activations": "activations kept for backward",
    "logits": "logits, and the loss's copies of them",
    "temporaries": "other temporary tensors",
    "operator_scratch": "inside the operator at the peak",
    "kv_cache": "keys and values of the context",
    "blas_workspace": "workspace of cuBLAS",
    "rounding": "rounded up by the allocator",
    "heap_slack": "free, and kept by malloc",
    "heap_growth": "grown when less was alive",
}
"""Kinds in display order, with their titles. Embeddings, norms and buffers are distinguished by dtype: their kind is
followed by the name of the dtype ("norms_float32")."""
BY_TYPE = ("embeddings", "norms", "buffers")


def title_of(kind: str) -> str:
    """The title of a kind in a table."""
    stem, _, dtype = kind.partition("_")
    return f"{MEMORY_KINDS[stem]}, {dtype}" if stem in BY_TYPE else MEMORY_KINDS[kind]


def in_order(kinds: Mapping[str, int], *, named: Collection[str] = ()) -> dict[str, int]:
    """The kinds with nonzero sizes, and those in `named` in any case, in display order."""
    order = {stem: place for place, stem in enumerate(MEMORY_KINDS)}

    def place(kind: str) -> int:
        stem = kind.partition("_")[0]
        return order[stem if stem in BY_TYPE else kind]

    every = dict.fromkeys(named, 0) | dict(kinds)
    return {kind: every[kind] for kind in sorted(every, key=place) if every[kind] or kind in named}


class MemoryAccount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resident memory at the peak of one phase, in bytes by kind, and the measured peak.

    On CUDA it is device memory, and the peak is the allocator's; else it is the peak resident set of the process.
    """

    phase: MemoryPhase
    kinds: dict[str, int]
    """Bytes by kind (`MEMORY_KINDS`), each measured separately."""
    peak_bytes: int
    outside_allocator: dict[str, int] = msgspec.field(default_factory=dict)
    """Bytes that are not in CUDA's allocated peak: `fragmentation`, which is reserved but not allocated, and
    `paged_optimizer_state`, which is managed memory. Empty on a CPU."""

    @property
    def explained_bytes(self) -> int:
        """The sum of all kinds."""
        return sum(self.kinds.values())

    @property
    def unexplained_bytes(self) -> int:
        """The part of the peak that no kind explains; negative if the kinds exceed the peak."""
        return self.peak_bytes - self.explained_bytes

    @property
    def share(self) -> float:
        """The unexplained part of the peak."""
        return self.unexplained_bytes / self.peak_bytes
