"""What lies in the tensors of a base layer.

What a layer or a tensor says of itself proves nothing: a quantised tensor of torchao calls itself bfloat16. So bits are
counted from the bytes that are there. Whatever cannot be read is unknown, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kernels_check.observe.base_state import PACKED, WEIGHTS, beside, is_packed, quant_state
from kernels_check.observe.fingerprint import NO_MEMORY, has_memory
from kernels_check.observe.fourbit import four_bit_problem
from kernels_check.observe.module_tree import ModelTree
from kernels_check.observe.tensor_copy import is_wrapper, plain_parts

_ORIGIN = "that is the dtype the base was loaded in, load it with dtype=torch.bfloat16"
_INT8_NOTE = "computes in int8 with a float16 epilogue on CUDA, by dequantising on a CPU"
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SAYS_BITS = ("bits", "w_bit", "nbits")


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


def read_storage(layer: Any, parameter: str = "weight") -> Storage:
    """Read the storage of one base layer from its tensors; never raises.

    Args:
        layer: the layer.
        parameter: which of its parameters.
    """
    try:
        return _read(layer, parameter)
    except Exception as error:
        return _unknown(f"{type(layer).__name__}.{parameter} cannot be read: {type(error).__name__}: {error}")


def storage_in(tree: ModelTree, layer: nn.Module, parameter: str = "weight") -> Storage:
    """The same of a layer of a model that was read, which several ask for."""
    known: dict[tuple[int, str], Storage] = tree.readings.setdefault(storage_in.__qualname__, {})
    key = id(layer), parameter
    if key not in known:
        known[key] = read_storage(layer, parameter)
    return known[key]


def read_wrapped(wrapper: Any, read: Callable[[Any, str], Storage] = read_storage) -> Storage:
    """Read the storage of what a layer of PEFT's wraps: a layer, or one parameter of a layer."""
    layer = wrapper
    while hasattr(layer, "base_layer"):  # one that wraps a parameter may be wrapped for the next
        layer = layer.base_layer
    return read(layer, getattr(wrapper, "parameter_name", None) or "weight")


def _read(layer: Any, parameter: str) -> Storage:
    unpacks = getattr(layer, "parametrizations", {})
    if parameter in unpacks:  # asking for the parameter itself would unpack it
        return _read(unpacks[parameter], "original")
    weight = getattr(layer, "_parameters", {}).get(parameter)
    weight = getattr(layer, "_buffers", {}).get(parameter) if weight is None else weight
    if weight is None and parameter == "weight" and isinstance(layer, nn.MultiheadAttention):
        return _attention(layer)
    if weight is None and parameter in WEIGHTS:
        weight = _assigned(layer, parameter)
    if weight is None:
        return _named_otherwise(layer, parameter)
    if is_lazy(weight):
        return _unknown(f"{type(layer).__name__}.{parameter} has no shape yet: call the model once before")
    state = quant_state(layer, weight) if parameter in WEIGHTS else None
    if state is not None and not _is_unpacked(weight, state):
        return _four_bit(layer, weight, state)
    if type(weight).__name__ == "Params4bit":
        return _unknown("Params4bit without quant_state: not quantised")
    if weight.is_meta:
        return _unknown(f"{type(layer).__name__}.{parameter} lies on the meta device: its bytes are elsewhere")
    if hasattr(weight, "SCB"):
        return _int8(layer, weight)
    return _of_tensor(weight, f"{type(layer).__name__} with {_short(weight.dtype)} weights is not known")


def _int8(layer: Any, weight: Tensor) -> Storage:
    """LLM.int8 of bitsandbytes: a scale a row, which the first forward hands from the weight to the layer."""
    if weight.dtype != torch.int8:
        return _of_tensor(weight, f"Int8Params of {_short(weight.dtype)} are not known")
    scales = next((part for key, part in beside(layer) if key == "SCB"), None)
    if scales is None or scales.numel() != weight.shape[0]:
        found = "no scales" if scales is None else f"{scales.numel()} scales"
        return _unknown(f"{found} for {weight.shape[0]} rows of int8")
    return Storage(bits=8, quant_type="int8", double_quant=False, note=_INT8_NOTE)


def _assigned(layer: Any, parameter: str) -> Tensor | None:
    """A weight that is no parameter of the layer, such as one that PEFT put there for the time of a forward."""
    found = getattr(layer, "__dict__", {}).get(parameter)
    return found if isinstance(found, Tensor) else None


def _is_unpacked(weight: Tensor, state: Any) -> bool:
    return weight.is_floating_point() and tuple(weight.shape) == tuple(state.shape)


def _attention(layer: nn.MultiheadAttention) -> Storage:
    """Its projections of queries, keys and values, which are parameters without layers."""
    names = [name for name in ("in_proj_weight", "q_proj_weight") if layer._parameters.get(name) is not None]
    if names:
        return _read(layer, names[0])
    found = vars(layer).get("in_proj_weight")
    if isinstance(found, Tensor):
        return _of_tensor(found, "MultiheadAttention is not known")
    return _unknown("MultiheadAttention without projections")


def _named_otherwise(layer: Any, parameter: str) -> Storage:
    """A layer that packs its weight in integers under a name of its own."""
    held = {**getattr(layer, "_parameters", {}), **getattr(layer, "_buffers", {})}
    name = next((name for name in PACKED if held.get(name) is not None), None)
    if name is None:
        return _unknown(f"{type(layer).__name__} has no tensor {parameter!r}: how it keeps its weight is not known")
    packed = held[name]
    facts = vars(layer) | (layer.meta if isinstance(getattr(layer, "meta", None), dict) else {})
    bits = next((int(facts[key]) for key in _SAYS_BITS if isinstance(facts.get(key), int)), None)
    inputs = facts.get("in_features", facts.get("infeatures"))
    outputs = facts.get("out_features", facts.get("outfeatures"))
    if inputs is None and "shape" in facts:
        inputs, outputs = math.prod(facts["shape"]), 1
    kind = f"{type(layer).__name__}.{name}"
    if bits is None or inputs is None or outputs is None:
        return _unknown(f"{kind} holds integers, but the layer does not say of how many bits and weights")
    stored = 8 * packed.numel() * packed.element_size()
    if not bits * inputs * outputs <= stored < (bits + 1) * inputs * outputs:
        return _unknown(f"{kind} holds {stored} bits, but {bits} for each of {inputs} x {outputs} weights are claimed")
    return Storage(bits=bits, quant_type=type(layer).__name__, double_quant=False)


def _of_tensor(weight: Tensor, otherwise: str) -> Storage:
    """A plain tensor, a shard of one, or one made of a packed tensor and its scales."""
    while type(weight).__name__ == "DTensor":
        weight = weight._local_tensor  # type: ignore[attr-defined]
    if is_wrapper(weight):
        return _made_of_others(weight)
    if not has_memory(weight):
        return _unknown(f"{type(weight).__qualname__}: {NO_MEMORY}")
    bits = weight.element_size() * 8
    if weight.dtype in _PLAIN:
        return Storage(bits=bits, quant_type="none", double_quant=False, compute_dtype=_short(weight.dtype))
    if weight.is_floating_point():
        return Storage(bits=bits, quant_type=_short(weight.dtype), double_quant=False)
    return _unknown(otherwise)


def _made_of_others(weight: Tensor) -> Storage:
    """A tensor of torchao's kind: what it calls its dtype is what it unpacks to."""
    parts = [part for _, part in plain_parts(weight)]
    kind = f"{type(weight).__module__}.{type(weight).__qualname__}"
    if not parts or not weight.numel() or any(part.is_meta for part in parts):
        return _unknown(f"{kind} holds no bytes here")
    main = max(parts, key=lambda part: part.numel() * part.element_size())
    bits, rest = divmod(8 * main.numel() * main.element_size(), weight.numel())
    if rest or bits > 8 * weight.element_size() or (bits not in (4, 8) and main.dtype not in _PLAIN):
        return _unknown(f"{kind}: its largest part holds {bits} bits and {rest} over for {weight.numel()} weights")
    if main.dtype in _PLAIN:
        return Storage(bits=bits, quant_type="none", double_quant=False, compute_dtype=_short(main.dtype))
    stored = sum(part.numel() * part.element_size() for part in parts)
    return Storage(
        bits=bits,
        quant_type=_short(main.dtype) if main.is_floating_point() else f"int{bits}",
        double_quant=False,
        compute_dtype=_short(weight.dtype),
        bits_per_weight=8 * stored / weight.numel(),
        note=f"packed by {kind}",
    )


def _four_bit(layer: Any, weight: Tensor, state: Any) -> Storage:
    packed, nested = is_packed(state), bool(state.nested)
    weights, stored = math.prod(state.shape), weight.numel() * weight.element_size()
    scales = state.absmax.numel() * state.absmax.element_size()
    if nested:
        scales += state.state2.absmax.numel() * state.state2.absmax.element_size()
    problem = four_bit_problem(layer, weight, state)
    compute = torch.bfloat16 if packed else getattr(layer, "compute_dtype", state.dtype)
    return Storage(
        bits=None if problem else 4,
        quant_type=state.quant_type,
        double_quant=None if packed else nested,
        compute_dtype=None if compute is None else _short(compute),
        bits_per_weight=8 * (stored + scales) / weights if weights else None,
        packed_for_cpu=packed,
        problem=problem,
        note=f"backward dequantises to {_short(state.dtype)} first: {_ORIGIN}" if state.dtype != compute else None,
    )


def _unknown(problem: str) -> Storage:
    return Storage(bits=None, problem=problem)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
