"""Whether what bitsandbytes keeps beside a 4-bit weight can be that weight's."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels_check.observe.base_state import is_packed

_NESTED_BLOCK = 256
"""Block size of the second quantisation, fixed by bitsandbytes."""
_CODES = 16


def four_bit_problem(layer: Any, weight: Tensor, state: Any) -> str | None:
    """Say what of a state contradicts the bytes of the weight, its layer or itself; None where nothing does."""
    checks = (
        *(_of_the_layer, _of_the_bytes, layout_problem),
        *(_of_the_scales, _of_the_codes, _of_the_offset, _of_two_states),
    )
    return next((problem for check in checks if (problem := check(layer, weight, state)) is not None), None)


def _of_the_layer(layer: Any, weight: Tensor, state: Any) -> str | None:
    weights = math.prod(state.shape)
    for sides in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if all(hasattr(layer, side) for side in sides):
            expected = tuple(getattr(layer, side) for side in sides)
            if weights != math.prod(expected):
                return f"quant_state describes {weights} weights, the layer has {math.prod(expected)}"
            if tuple(state.shape) != expected:
                return f"quant_state is of shape {tuple(state.shape)}, the layer of {expected}"
    return None


def layout_problem(layer: Any, weight: Tensor, state: Any) -> str | None:
    """Say where a weight lies otherwise than its state says, so that every product with it is wrong.

    bitsandbytes lays a weight out anew for a CPU in a forward in eval mode, and marks the state in place. Where the
    weight is gathered anew for each forward, as by FSDP2, it is the old layout that comes back, to the new state.
    """
    if len(state.shape) != 2 or state.shape[1] <= 2:
        return None
    old = weight.dim() == 2 and weight.shape[1] == 1
    if is_packed(state) and old:
        return "quant_state is laid out anew for AVX512 and the weight is not: products with it are wrong"
    if not is_packed(state) and not old:
        return f"the weight has the layout {tuple(weight.shape)} and quant_state that of one column"
    return None


def _of_the_bytes(layer: Any, weight: Tensor, state: Any) -> str | None:
    weights, stored = math.prod(state.shape), weight.numel() * weight.element_size()
    expected = math.ceil(weights / 2)
    if not expected <= stored < expected + weight.element_size():
        return f"{stored} bytes for {weights} weights, 4-bit takes {expected}"
    return None


def _of_the_scales(layer: Any, weight: Tensor, state: Any) -> str | None:
    blocks = math.ceil(math.prod(state.shape) / state.blocksize)
    expected = blocks * (2 if is_packed(state) else 1 if state.nested else 4)
    scales = state.absmax.numel() * state.absmax.element_size()
    if state.nested:
        scales += state.state2.absmax.numel() * state.state2.absmax.element_size()
        expected += math.ceil(blocks / _NESTED_BLOCK) * 4
    if scales != expected or (state.nested and state.absmax.dtype != torch.uint8):
        return f"{scales} bytes of {_short(state.absmax.dtype)} scales, expected {expected}"
    if state.nested and state.state2.blocksize != _NESTED_BLOCK:
        return f"the scales are quantised in blocks of {state.state2.blocksize}, bitsandbytes takes {_NESTED_BLOCK}"
    claimed = getattr(weight, "blocksize", state.blocksize)
    if claimed != state.blocksize:
        return f"quant_state has blocks of {state.blocksize}, the weight was quantised in blocks of {claimed}"
    return None


def _of_the_codes(layer: Any, weight: Tensor, state: Any) -> str | None:
    claimed = getattr(weight, "quant_type", state.quant_type)
    if claimed != state.quant_type:
        return f"quant_state is of {state.quant_type}, the weight of {claimed}"
    if state.code is None or state.code.numel() != _CODES:
        return "quant_state has no code of 16 values"
    if not torch.allclose(state.code.detach().float().cpu(), _known_code(state.quant_type)):
        return f"the code of quant_state is not that of {state.quant_type}"
    return None


@cache
def _known_code(quant_type: str) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    code: Tensor = get_4bit_type(quant_type, device="cpu")
    return code.float()


def _of_the_offset(layer: Any, weight: Tensor, state: Any) -> str | None:
    """Scales are sizes: below nothing they are another weight's."""
    if not state.nested:
        lowest = float(state.absmax.min()) if state.absmax.numel() else 0.0
    else:
        if not isinstance(state.offset, Tensor) or state.offset.numel() != 1:
            return f"the offset of the scales is {state.offset}, where double quantisation keeps one number"
        sizes = state.state2.absmax.detach().float()
        codes = state.absmax.detach().reshape(-1)
        rest = -codes.numel() % _NESTED_BLOCK
        lowest_codes = pad(codes, (0, rest), value=255).view(-1, _NESTED_BLOCK).amin(-1)  # the codes are in order
        # Rounding to one of 256 codes leaves up to a hundredth of the largest.
        scales = (state.state2.code.detach().float()[lowest_codes.long()] + 0.02) * sizes + float(state.offset)
        lowest = float(scales.min()) if scales.numel() else 0.0
    if not math.isfinite(lowest) or lowest < 0:
        return f"the offset of the scales is not theirs: with it a scale is {lowest:.4g}"
    return None


def _of_two_states(layer: Any, weight: Tensor, state: Any) -> str | None:
    """A weight and its layer each keep it, and the layer's counts where the weight is registered anew."""
    other = getattr(layer, "quant_state", None)
    if other is None or other is state:
        return None
    for name in ("shape", "blocksize", "quant_type", "dtype"):
        if getattr(other, name, None) != getattr(state, name, None):
            return f"the weight and its layer hold states of another {name}"
    if other.absmax.shape != state.absmax.shape or not torch.equal(other.absmax.cpu(), state.absmax.cpu()):
        return "the weight and its layer hold different scales"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
