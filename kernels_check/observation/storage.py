"""What lies in the tensors of a base layer, and whether it has changed."""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observation.adapter_layers import base_parameters, lora_layers
from kernels_check.observation.tensor_copy import plain_parts

HASHED_BYTES = 64 * 2**20
"""How much of the base is hashed; larger bases are sampled in evenly spaced pages."""
_PAGE_BYTES = 4096


_ORIGIN = "that is the dtype the base was loaded in, load it with dtype=torch.bfloat16"
_NESTED_BLOCK = 256
"""Block size of the second quantisation, fixed by bitsandbytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How one base layer keeps its weight."""

    bits: int | None
    quant_type: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None
    bits_per_weight: float | None = None
    """Stored bits divided by weights, scales included."""
    packed_for_cpu: bool = False
    problem: str | None = None
    """Why the bytes do not prove what the layer claims."""
    note: str | None = None


def read_storage(layer: Any) -> Storage:
    """Read the storage of one base layer from its tensors."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return Storage(bits=None, problem=f"{type(layer).__name__} has no weight tensor this version knows")
    if type(weight).__name__ == "Params4bit":
        return _four_bit(layer, weight)
    if weight.dtype == torch.int8 and hasattr(layer, "state"):
        note = "computes in int8 with a float16 epilogue on CUDA, by dequantising on a CPU"
        return Storage(bits=8, quant_type="int8", double_quant=False, note=note)
    if weight.is_floating_point():
        bits = weight.element_size() * 8
        return Storage(bits=bits, quant_type="none", double_quant=False, compute_dtype=_short(weight.dtype))
    return Storage(bits=None, problem=f"{type(layer).__name__} with {_short(weight.dtype)} weights is not known")


def _four_bit(layer: Any, weight: Any) -> Storage:
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        return Storage(bits=None, problem="Params4bit without quant_state: not quantised")
    weights, stored = math.prod(state.shape), weight.numel() * weight.element_size()
    packed = bool(getattr(state, "packing_format_for_cpu", False))
    nested = bool(state.nested)
    blocks = math.ceil(weights / state.blocksize)
    scales = state.absmax.numel() * state.absmax.element_size()
    expected = blocks * (2 if packed else 1 if nested else 4)
    if nested:
        scales += state.state2.absmax.numel() * state.state2.absmax.element_size()
        expected += math.ceil(blocks / _NESTED_BLOCK) * 4
    problem = None
    if weights != layer.in_features * layer.out_features:
        problem = f"quant_state describes {weights} weights, the layer has {layer.in_features * layer.out_features}"
    elif stored != math.ceil(weights / 2):
        problem = f"{stored} bytes for {weights} weights, 4-bit takes {math.ceil(weights / 2)}"
    elif scales != expected or (nested and state.absmax.dtype != torch.uint8):
        problem = f"{scales} bytes of {_short(state.absmax.dtype)} scales, expected {expected}"
    compute = torch.bfloat16 if packed else layer.compute_dtype
    return Storage(
        bits=None if problem else 4,
        quant_type=state.quant_type,
        double_quant=None if packed else nested,
        compute_dtype=None if compute is None else _short(compute),
        bits_per_weight=8 * (stored + scales) / weights,
        packed_for_cpu=packed,
        problem=problem,
        note=f"backward dequantises to {_short(state.dtype)} first: {_ORIGIN}" if state.dtype != compute else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """A fingerprint of the base weights' raw bytes."""

    tensors: Mapping[str, tuple[str, str]]
    """dtype and sha256 of every tensor, by name."""
    hashed_bytes: int
    total_bytes: int
    packed: bool
    """Whether any 4-bit weight was in the packed CPU layout."""


def digest(model: nn.Module) -> Digest:
    """Hash the base: parameters that are no adapter's, and the scales of quantised ones."""
    parts = (part for name, tensor in _base_tensors(model) for part in plain_parts(tensor, name))
    tensors = {name: tensor.detach() for name, tensor in parts}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    stride = math.ceil(total / HASHED_BYTES) or 1
    hashes, hashed = {}, 0
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        if stride > 1 and raw.numel() > _PAGE_BYTES:
            raw = raw[: raw.numel() // _PAGE_BYTES * _PAGE_BYTES].view(-1, _PAGE_BYTES)[::stride].contiguous()
        hashes[name] = (_short(tensor.dtype), hashlib.sha256(_bytes(raw.cpu())).hexdigest())
        hashed += raw.numel()
    packed = any(read_storage(layer.base).packed_for_cpu for layer in lora_layers(model) if layer.base is not None)
    return Digest(tensors=hashes, hashed_bytes=hashed, total_bytes=total, packed=packed)


def _bytes(raw: Tensor) -> bytes:
    """Not by way of numpy: memory that it has seen can never be resized again, which some trainers do."""
    return ctypes.string_at(raw.data_ptr(), raw.numel()) if raw.numel() else b""


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in base_parameters(model).items():
        if not parameter.is_meta:
            yield name, parameter.data
    for name, module in model.named_modules():
        # The scales of LLM.int8 move from the weight to the module in the first forward. A layer that wraps another
        # shows the weight of the other as its own, and not where the scales have moved to.
        weight, moved = module._parameters.get("weight"), getattr(getattr(module, "state", None), "SCB", None)
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        for label, scales in (
            ("absmax", getattr(state, "absmax", None)),
            ("nested_absmax", getattr(getattr(state, "state2", None), "absmax", None)),
            ("SCB", getattr(weight, "SCB", None) if moved is None else moved),
        ):
            if isinstance(scales, Tensor):
                yield f"{name}.{label}", scales


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
