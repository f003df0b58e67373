"""Forwards that leave 4-bit weights as they lie, on CPUs where bitsandbytes would rearrange them for good.

On a CPU with AVX512-BF16 the first evaluating forward rewrites the weights in place. After that a backward pass loses
its gradient without an error, and merging gives garbage. The switch is an attribute of each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_SWITCH = "support_avx512bf16_for_cpu"


@contextmanager
def without_repacking(model: nn.Module) -> Iterator[None]:
    """Keep the layout in which 4-bit weights are stored, whatever is called inside the block."""
    layers = [(module, getattr(module, _SWITCH)) for module in model.modules() if _SWITCH in vars(module)]
    try:
        for layer, _ in layers:
            setattr(layer, _SWITCH, False)
        yield
    finally:
        for layer, repacks in layers:
            setattr(layer, _SWITCH, repacks)
