"""Copies that leave no trace in the memory of the process.

What the C library has given out and got back it keeps, in pieces, for what comes next: a process in which a step was
watched has another heap than one in which none was, and its peaks of memory are others. Measured with an adapter of 80
million parameters on a CPU, a peak of training was 14 % higher after its values had been kept on the heap.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor, nn

LEAST_BYTES = 128 * 1024
"""Smaller ones are left to the heap: from this size on malloc maps its blocks itself, until it has got larger ones back
(mallopt(3), M_MMAP_THRESHOLD)."""
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
"""Pages of this process alone, where that can be asked for: what is shared would be told as another kind of memory."""


def copy_of(tensor: Tensor) -> Tensor:
    """A copy as `Tensor.clone` makes it; of a large plain tensor on a CPU, in pages that are the system's again as soon
    as nobody holds it."""
    if not _is_plain(tensor) or tensor.numel() * tensor.element_size() < LEAST_BYTES:
        return tensor.clone()
    pages = mmap.mmap(-1, tensor.numel() * tensor.element_size(), **_PRIVATE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its elements one after another, and nothing else."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided
    return plain and tensor.is_contiguous() and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
