"""Reads the parts of a base and their number of bits: parameters, buffers, and the state of quantised weights.

A part keeps its name wherever it is stored, since libraries move parts: bitsandbytes moves the scales of LLM.int8 from
the weight to the layer in the first forward pass. Attributes of a layer or tensor prove nothing: a quantised torchao
tensor has the dtype bfloat16. So bits are counted from the actual bytes. Unreadable parts are unknown, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from kernels_check.observe.adapter import is_in_adapter
from kernels_check.observe.modules import NO_MEMORY, ModelTree, has_memory, is_wrapper, plain_parts

Kind: TypeAlias = Literal["parameter", "merged", "buffer", "cache", "quantisation"]
"""``merged``: a parameter with which PEFT merges and unmerges the adapter in each forward pass. ``cache``: a buffer
that is not saved with the model, since a forward pass recomputes it. ``quantisation``: stored in attributes of a
quantised weight or layer."""

WEIGHTS = ("weight", "original")
"""Names of a layer's weight; the second is used in a parametrisation, which unpacks the weight at each access."""
PACKED = ("qweight", "W_q", "weight_packed")
"""Names of packed weights in other libraries: GPTQ and AWQ, HQQ, compressed-tensors."""
_STATE = ("absmax", "code", "offset", "shape", "dtype", "blocksize", "quant_type", "nested")
"""Attributes of bitsandbytes' state of a 4-bit weight; ``state2`` has the same for the scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensor:
    """One plain tensor, or one fact, that belongs to the base."""

    name: str
    owner: str
    """Name of the tensor of which it is a part; its own name for a plain tensor."""
    wrapper: str | None
    """Class of that tensor if it contains other tensors."""
    kind: Kind
    layer: nn.Module
    value: Tensor | str | Exception
    """An exception if the parts of the tensor cannot be read."""


def base_state(tree: ModelTree) -> Iterator[BaseTensor]:
    """Every part of the base; a tensor shared by several layers appears once for each."""
    merged = {id(layer) for _, module in tree.modules for layer in _merged_layers(module)}
    shards = {place: shard for _, module in tree.modules for place, shard in _shards(module)}
    for name, module in tree.modules:
        if is_in_adapter(tree, name):
            continue
        prefix = f"{name}." if name else ""
        held: list[tuple[str, Kind, Any]] = []
        for key, parameter in module._parameters.items():
            # DeepSpeed's ZeRO-3 leaves a placeholder.
            here = shards.get((id(module), key), getattr(parameter, "ds_tensor", parameter))
            held.append((key, "merged" if id(module) in merged and key.endswith("weight") else "parameter", here))
        for key, buffer in module._buffers.items():
            held.append((key, "cache" if key in module._non_persistent_buffers_set else "buffer", buffer))
        held += [(key, "quantisation", value) for key, value in quantisation_parts(module)]
        for key, kind, value in held:
            if value is not None and not is_in_adapter(tree, prefix + key):
                yield from _parts(prefix + key, kind, module, value)


def _shards(module: Any) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """Shards of FSDP2 by the location of their parameter: the unsharded parameter exists only during a forward pass.

    An unsharded parameter left by an evaluation is ignored: the next step first reshards, and trains the shards.
    """
    if not hasattr(type(module), "_get_fsdp_state"):  # looked up on the module, it takes as long as everything else
        return
    with suppress(AttributeError):  # not a public interface of torch
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for shard in (one for group in groups if group is not None for one in group.fsdp_params):
            info = shard._module_info
            modules, names = [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names]
            for place, name in zip(modules, names, strict=True):
                yield (id(place), name), shard.sharded_param


def _merged_layers(module: Any) -> tuple[Any, ...]:
    """Layers whose products PEFT cannot intercept: ``nn.MultiheadAttention``, whose forward calls no layer."""
    base = module._modules.get("base_layer")
    if not isinstance(base, nn.MultiheadAttention):
        return ()
    return (base, getattr(base.out_proj, "base_layer", base.out_proj))


def quant_state(layer: Any, weight: Any) -> Any:
    """The quantisation state of a 4-bit bitsandbytes weight: on the weight, else on its layer or parametrisation."""
    holders = (weight, layer, *(layer if isinstance(layer, ParametrizationList) else ()))
    states = (getattr(holder, "quant_state", None) for holder in holders)
    return next((state for state in states if hasattr(state, "absmax")), None)


def base_weight(layer: Any) -> Any:
    """The weight of a layer, None if it has none of the usual names; avoids properties, which may unpack it."""
    parameters = getattr(layer, "_parameters", {})
    return next((parameters[name] for name in WEIGHTS if parameters.get(name) is not None), None)


def is_packed(state: Any) -> bool:
    """Whether bitsandbytes has repacked a 4-bit weight for a CPU."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def _parts(name: str, kind: Kind, layer: nn.Module, value: Any) -> Iterator[BaseTensor]:
    """The parts of one tensor, or one fact."""
    wrapper = None
    found: list[tuple[str, Tensor | str | Exception]]
    try:
        if is_lazy(value):
            raise ValueError("it has no shape yet")
        found = list(plain_parts(value, name)) if isinstance(value, Tensor) else [(name, str(value))]
        wrapper = type(value).__name__ if isinstance(value, Tensor) and is_wrapper(value) else None
    except Exception as error:  # a tensor class from outside torch
        found = [(name, error)]
    for part, plain in found:
        yield BaseTensor(name=part, owner=name, wrapper=wrapper, kind=kind, layer=layer, value=plain)


def quantisation_parts(layer: Any) -> Iterator[tuple[str, Any]]:
    """State of a quantised weight outside parameters and buffers: tensors and facts."""
    weight = base_weight(layer)
    state = quant_state(layer, weight)
    if state is not None:
        yield from _read_state("quant_state", state)
    elif hasattr(weight, "SCB"):  # LLM.int8
        moved = getattr(layer, "state", None)
        for key, *otherwise in (("SCB",), ("CB", weight)):
            places = (getattr(moved, key, None), getattr(weight, key), *otherwise)
            yield from [(key, found) for found in places if found is not None][:1]
    elif any(name in tensors for tensors in (layer._parameters, layer._buffers) for name in PACKED):
        for key, value in vars(layer).items():
            is_table = isinstance(value, dict) and not key.startswith("_")
            inner = {f"{key}.{name}": one for name, one in value.items()} if is_table else {key: value}
            yield from ((name, one) for name, one in inner.items() if isinstance(one, Tensor))


def _read_state(name: str, state: Any) -> Iterator[tuple[str, Any]]:
    values = ((key, getattr(state, key, None)) for key in _STATE)
    yield from ((f"{name}.{key}", value) for key, value in values if value is not None)
    nested = getattr(state, "state2", None)
    if nested is not None:
        yield from _read_state(f"{name}.state2", nested)


_NESTED_BLOCK = 256
"""Block size of the second quantisation, fixed by bitsandbytes."""


def layout_problem(layer: Any, weight: Tensor, state: Any) -> str | None:
    """Why the layout of a weight differs from that of its state, so that every product with it is wrong; None if it
    agrees.

    bitsandbytes repacks a weight for a CPU in a forward pass in eval mode, and marks the state in place. If the weight
    is gathered again for each forward pass, as with FSDP2, it returns in the old layout, with the new state.
    """
    old = weight.dim() == 2 and weight.shape[1] == 1
    if len(state.shape) != 2 or state.shape[1] <= 2 or is_packed(state) != old:
        return None
    if old:
        return "quant_state was repacked for AVX512, but the weight was not: products with it are wrong"
    return f"the weight has the layout {tuple(weight.shape)} and quant_state that of one column"


def _four_bit_problems(layer: Any, weight: Tensor, state: Any, scales: int) -> Iterator[str]:
    """Contradictions between a state, with its bytes of scales, and the bytes of the weight, its layer or itself."""
    weights = math.prod(state.shape)
    expected = math.ceil(weights / 2)
    if not expected <= weight.nbytes < expected + weight.element_size():
        yield f"{weight.nbytes} bytes for {weights} weights, 4-bit takes {expected}"
    if (problem := layout_problem(layer, weight, state)) is not None:
        yield problem
    blocks = math.ceil(weights / state.blocksize)
    expected = blocks * (2 if is_packed(state) else 1 if state.nested else 4)
    expected += math.ceil(blocks / _NESTED_BLOCK) * 4 if state.nested else 0
    if scales != expected or (state.nested and state.absmax.dtype != torch.uint8):
        yield f"{scales} bytes of {_short(state.absmax.dtype)} scales, expected {expected}"
    other = getattr(layer, "quant_state", state)  # the layer's state counts if the weight is registered again
    one, another = state.absmax, getattr(other, "absmax", state.absmax)
    if one is not another and (one.shape != another.shape or not torch.equal(one.cpu(), another.cpu())):
        yield "the weight and its layer hold different scales"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """The storage of one base layer's weight."""

    bits: int | None
    quant_type: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None
    bits_per_weight: float | None = None
    """Stored bits divided by the number of weights, including scales."""
    packed_for_cpu: bool = False
    problem: str | None = None
    """Why the bytes do not prove the layer's attributes."""
    note: str | None = None


def storage_in(tree: ModelTree, layer: nn.Module, parameter: str = "weight") -> Storage:
    """Read the storage of one parameter of a layer from its tensors, once for each tree; never raises."""
    known: dict[tuple[int, str], Storage] = tree.readings.setdefault(storage_in.__qualname__, {})
    key = id(layer), parameter
    if key not in known:
        try:
            known[key] = _read(layer, parameter)
        except Exception as error:
            problem = f"{type(layer).__name__}.{parameter} cannot be read: {type(error).__name__}: {error}"
            known[key] = _unknown(problem)
    return known[key]


def wrapped_storage(tree: ModelTree, wrapper: Any) -> Storage:
    """The storage of the layer, or of the single parameter, that a PEFT layer wraps."""
    layer = wrapper
    while hasattr(layer, "base_layer"):  # a layer that wraps a parameter may be wrapped for the next one
        layer = layer.base_layer
    return storage_in(tree, layer, getattr(wrapper, "parameter_name", None) or "weight")


def _read(layer: Any, parameter: str) -> Storage:
    unpacks = getattr(layer, "parametrizations", {})
    if parameter in unpacks:  # accessing the parameter itself would unpack it
        return _read(unpacks[parameter], "original")
    weight = getattr(layer, "_parameters", {}).get(parameter)
    weight = getattr(layer, "_buffers", {}).get(parameter) if weight is None else weight
    if weight is None and parameter == "weight" and isinstance(layer, nn.MultiheadAttention):
        return _attention(layer)
    if weight is None and parameter in WEIGHTS:
        weight = vars(layer).get(parameter)  # such as one that PEFT put there during a forward pass
    if not isinstance(weight, Tensor):
        return _storage_of_packed_layer(layer, parameter)
    if is_lazy(weight):
        return _unknown(f"{type(layer).__name__}.{parameter} has no shape yet: call the model once before")
    state = quant_state(layer, weight) if parameter in WEIGHTS else None
    if state is not None and not (weight.is_floating_point() and weight.shape == state.shape):  # otherwise unpacked
        return _four_bit(layer, weight, state)
    if type(weight).__name__ == "Params4bit":
        return _unknown("Params4bit without quant_state: not quantised")
    if weight.is_meta:
        return _unknown(f"{type(layer).__name__}.{parameter} lies on the meta device: its bytes are elsewhere")
    if hasattr(weight, "SCB"):
        return _int8(layer, weight)
    return _read_tensor_storage(weight, f"{type(layer).__name__} with {_short(weight.dtype)} weights is not known")


def _int8(layer: Any, weight: Tensor) -> Storage:
    """LLM.int8 of bitsandbytes: a scale per row, which the first forward pass moves from the weight to the layer."""
    if weight.dtype != torch.int8:
        return _read_tensor_storage(weight, f"Int8Params of {_short(weight.dtype)} are not known")
    scales = next((part for key, part in quantisation_parts(layer) if key == "SCB"), None)
    if scales is None or scales.numel() != weight.shape[0]:
        found = "no scales" if scales is None else f"{scales.numel()} scales"
        return _unknown(f"{found} for {weight.shape[0]} rows of int8")
    return Storage(
        bits=8,
        quant_type="int8",
        double_quant=False,
        note="computes in int8 with a float16 epilogue on CUDA, by dequantising on a CPU",
    )


def _attention(layer: nn.MultiheadAttention) -> Storage:
    """Its query, key and value projections, which are parameters without layers."""
    for name in ("in_proj_weight", "q_proj_weight"):
        if layer._parameters.get(name) is not None:
            return _read(layer, name)
    found = vars(layer).get("in_proj_weight")
    if isinstance(found, Tensor):
        return _read_tensor_storage(found, "MultiheadAttention is not known")
    return _unknown("MultiheadAttention without projections")


def _storage_of_packed_layer(layer: Any, parameter: str) -> Storage:
    """A layer of another library that packs its weight into integers."""
    tensors = {**getattr(layer, "_parameters", {}), **getattr(layer, "_buffers", {})}
    name = next((name for name in PACKED if tensors.get(name) is not None), None)
    if name is None:
        return _unknown(f"{type(layer).__name__} has no tensor {parameter!r}: how it keeps its weight is not known")
    packed = tensors[name]
    facts = vars(layer) | (layer.meta if isinstance(getattr(layer, "meta", None), dict) else {})
    bits = next((int(facts[key]) for key in ("bits", "w_bit", "nbits") if isinstance(facts.get(key), int)), None)
    inputs = facts.get("in_features", facts.get("infeatures"))
    outputs = facts.get("out_features", facts.get("outfeatures"))
    if inputs is None and "shape" in facts:
        inputs, outputs = math.prod(facts["shape"]), 1
    kind = f"{type(layer).__name__}.{name}"
    if bits is None or inputs is None or outputs is None:
        return _unknown(f"{kind} holds integers, but the layer does not say of how many bits and weights")
    stored = 8 * packed.nbytes
    if not bits * inputs * outputs <= stored < (bits + 1) * inputs * outputs:
        return _unknown(f"{kind} holds {stored} bits, but {bits} for each of {inputs} x {outputs} weights are claimed")
    return Storage(bits=bits, quant_type=type(layer).__name__, double_quant=False)


def _read_tensor_storage(weight: Tensor, otherwise: str) -> Storage:
    """A plain tensor, a shard of one, or a tensor that contains a packed tensor and its scales."""
    while type(weight).__name__ == "DTensor":
        weight = weight.to_local()  # type: ignore[attr-defined]
    if is_wrapper(weight):
        return _storage_of_subclass(weight)
    if not has_memory(weight):
        return _unknown(f"{type(weight).__qualname__}: {NO_MEMORY}")
    bits = weight.element_size() * 8
    if weight.dtype in _PLAIN:
        return Storage(bits=bits, quant_type="none", double_quant=False, compute_dtype=_short(weight.dtype))
    if weight.is_floating_point():
        return Storage(bits=bits, quant_type=_short(weight.dtype), double_quant=False)
    return _unknown(otherwise)


def _storage_of_subclass(weight: Tensor) -> Storage:
    """A tensor such as torchao's, whose ``dtype`` is that of the unpacked values."""
    parts = [part for _, part in plain_parts(weight)]
    kind = f"{type(weight).__module__}.{type(weight).__qualname__}"
    if not parts or not weight.numel() or any(part.is_meta for part in parts):
        return _unknown(f"{kind} holds no bytes here")
    main = max(parts, key=lambda part: part.nbytes)
    bits, rest = divmod(8 * main.nbytes, weight.numel())
    if rest or bits > 8 * weight.element_size() or (bits not in (4, 8) and main.dtype not in _PLAIN):
        return _unknown(f"{kind}: its largest part holds {bits} bits and {rest} over for {weight.numel()} weights")
    if main.dtype in _PLAIN:
        return Storage(bits=bits, quant_type="none", double_quant=False, compute_dtype=_short(main.dtype))
    return Storage(
        bits=bits,
        quant_type=_short(main.dtype) if main.is_floating_point() else f"int{bits}",
        double_quant=False,
        compute_dtype=_short(weight.dtype),
        bits_per_weight=8 * sum(part.nbytes for part in parts) / weight.numel(),
        note=f"packed by {kind}",
    )


def _four_bit(layer: Any, weight: Tensor, state: Any) -> Storage:
    packed, nested, weights = is_packed(state), bool(state.nested), math.prod(state.shape)
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
    problem = next(_four_bit_problems(layer, weight, state, scales), None)
    compute = torch.bfloat16 if packed else getattr(layer, "compute_dtype", state.dtype)
    return Storage(
        bits=None if problem else 4,
        quant_type=state.quant_type,
        double_quant=None if packed else nested,
        compute_dtype=None if compute is None else _short(compute),
        bits_per_weight=8 * (weight.nbytes + scales) / weights if weights else None,
        packed_for_cpu=packed,
        problem=problem,
        note=None
        if state.dtype == compute
        else f"backward dequantises to {_short(state.dtype)} first: that is the dtype the base was loaded in, load it "
        "with dtype=torch.bfloat16",
    )


def _unknown(problem: str) -> Storage:
    return Storage(bits=None, problem=problem)
