"""The layout of 4-bit weights, which bitsandbytes changes in place on some CPUs.

At the first evaluating forward on a CPU with AVX512-BF16 it repacks 4-bit weights and rounds their scales to bfloat16.
After that a backward pass loses its gradient without an error, and merging gives garbage (docs/troubleshooting.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from kernels_check.observe.modules import Modes, without_repacking


def linear4bit_layers(model: Any) -> list[Any]:
    """All bitsandbytes 4-bit layers of a model."""
    import bitsandbytes

    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def is_packed(model: Any) -> bool:
    """Whether 4-bit layers run in bitsandbytes' CPU packing."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states if state is not None)


def unpack_4bit(model: Any) -> None:
    """Bring 4-bit layers back to their stored layout after inference on a CPU; their scales stay rounded to bfloat16.

    `state_dict()` restores the weights. Without double quantisation it leaves the scales transposed
    (`_convert_weight_packed_for_cpu_inverse` in bitsandbytes 0.50.2).
    """
    for layer in linear4bit_layers(model):
        packed = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        layer.state_dict()
        state = layer.weight.quant_state
        if packed and not state.nested and state.absmax.ndim == 2:
            state.absmax = state.absmax.T.reshape(-1).float()


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation between training steps: every module in eval mode, no gradient, no repacking, all as it was after.

    Every Dropout must be off, or a dropout sweep's losses are biased.
    """
    modes = Modes(model)
    model.eval()
    try:
        with without_repacking(model), torch.no_grad():
            yield
    finally:
        modes.restore()
