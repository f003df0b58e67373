"""How the layers of a drawn model are stored, and how much of all its bytes lies in 4-bit weights."""

from __future__ import annotations

import math
import random
from typing import Any

from drawn_truth import DTYPES, Drawn, Stored, at_least
from torch import nn

from kernels_check.controls.small_run import fourbit

BLOCK, NESTED = 64, 256
"""Weights that share a scale, and scales that share one of their own where they are quantised, too."""


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of the blocks, by name; those that adapters leave alone are left out."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and "lm_head" not in name
    }


def quantise(drawn: Drawn, draw: random.Random) -> None:
    """Store linear layers in fewer bits: all, or all but some."""
    import bitsandbytes as bnb

    dtype = next(name for name in DTYPES if name in drawn.about)
    how = draw.choice(["none", "none", "nf4", "nf4", "fp4", "int8"])
    linears = _linears(drawn.model)
    whole = Stored(bits=32 if dtype == "float32" else 16, compute=dtype)
    drawn.stored = dict.fromkeys(linears, whole)
    drawn.truths["base.bytes_in_4bit"] = at_least(0.0)
    if how == "none":
        return
    kept = _Bytes(drawn.model)
    rows = [name for name, linear in linears.items() if type(linear) is nn.Linear]
    skipped = {name for name in rows if draw.random() < 0.3} if draw.random() < 0.4 else set()
    double, compute = draw.random() < 0.5, draw.choice(list(DTYPES))
    for name in sorted(set(rows) - skipped):
        linear: Any = linears[name]
        small: Any
        if how == "int8":
            small = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
            )
            small.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            drawn.stored[name] = Stored(bits=8, quant="int8", compute=None)
            kept.replace(linear, small=linear.weight.numel() + 4 * linear.out_features)
        else:
            small = fourbit(linear, quant_type=how, double=double, compute=DTYPES[compute])
            drawn.stored[name] = Stored(bits=4, quant=how, double=double, compute=compute)
            kept.replace(linear, four=_four_bits(linear.weight.numel(), double=double))
        small.bias = linear.bias
        parent, _, last = name.rpartition(".")
        setattr(drawn.model.get_submodule(parent), last, small.to("cpu"))
    drawn.about += [how, *(["some layers skipped by the quantiser"] if skipped else [])]
    drawn.truths["base.bytes_in_4bit"] = at_least(*kept.share())


def _four_bits(weights: int, *, double: bool) -> tuple[int, int]:
    """Bytes of so many weights with their scales, without and with the tables of the values that are coded."""
    blocks = math.ceil(weights / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / NESTED) + 4 if double else 4 * blocks
    tables = 4 * 16 + (4 * 256 if double else 0)
    stored = math.ceil(weights / 2) + scales
    return stored, stored + tables


class _Bytes:
    """The bytes of a model as its layers are replaced; the least and the most where the words do not say."""

    def __init__(self, model: nn.Module) -> None:
        held = {value.data_ptr(): value.numel() * value.element_size() for value in model.state_dict().values()}
        self._four, self._others = [0, 0], [sum(held.values())] * 2

    def replace(self, linear: Any, *, small: int = 0, four: tuple[int, int] = (0, 0)) -> None:
        """A layer is stored anew; its bias may be cast by the first forward."""
        gone = linear.weight.numel() * linear.weight.element_size()
        bias = 0 if linear.bias is None else linear.bias.numel()
        own = bias * linear.weight.element_size()
        for end, size in enumerate((2, 4)):
            self._others[end] += small - gone + bias * size - own
            self._four[end] += four[end]

    def share(self) -> tuple[float, float]:
        """The least and the largest share of 4-bit weights."""
        return (
            self._four[0] / (self._four[0] + self._others[1]),
            self._four[1] / (self._four[1] + self._others[0]),
        )
