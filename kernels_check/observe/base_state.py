"""Everything a base holds that training on it later depends on, by name.

That is what of a model is no adapter's: parameters, buffers, and what a quantised layer keeps beside its weight, in
attributes of the weight or of the layer: scales and their scales, codes, offsets, block sizes. The same thing has the
same name wherever it is kept, since libraries move it: bitsandbytes hands the scales of LLM.int8 from the weight to the
layer in the first forward, and gives a 4-bit weight that was registered anew the state that its layer has kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from kernels_check.observe.adapter_layers import adapters_of
from kernels_check.observe.module_tree import Model, ModelTree
from kernels_check.observe.tensor_copy import is_wrapper, plain_parts

Kind: TypeAlias = Literal["parameter", "merged", "buffer", "cache", "beside"]
"""``merged``: a parameter that PEFT merges the adapter into and out of in each forward. ``cache``: a buffer that is not
saved with the model, since a forward makes it anew. ``beside``: kept in attributes of a quantised weight or layer."""

WEIGHTS = ("weight", "original")
"""Names of the weight of a layer; the second in a parametrisation, which unpacks it at each access."""
PACKED = ("qweight", "W_q", "weight_packed")
"""Names that other libraries give to a packed weight: GPTQ and AWQ, HQQ, compressed-tensors."""
_STATE = ("absmax", "code", "offset", "shape", "dtype", "blocksize", "quant_type", "nested")
"""What bitsandbytes keeps of a 4-bit weight; ``state2`` is the same for the scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensor:
    """One tensor without structure, or one fact, that belongs to the base."""

    name: str
    owner: str
    """Name of the tensor that it is a part of: its own where that has no structure."""
    wrapper: str | None
    """Class of that tensor where it is made of others."""
    kind: Kind
    layer: nn.Module
    value: Tensor | str | Exception
    """The last where its tensor cannot be taken apart."""


def base_state(model: Model) -> Iterator[BaseTensor]:
    """Every part of the base; a tensor that several layers share comes once for each."""
    tree = ModelTree.of(model)
    adapter, modules = adapters_of(tree), tree.modules
    merged = {id(layer) for _, module in modules for layer in _merged_layers(module)}
    shards = {place: shard for _, module in modules for place, shard in _shards(module)}
    for name, module in modules:
        if adapter[name]:
            continue
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None and not adapter[prefix + key]:
                kind: Kind = "merged" if id(module) in merged and key.endswith("weight") else "parameter"
                here = shards.get(
                    (id(module), key), getattr(parameter, "ds_tensor", parameter)
                )  # of DeepSpeed's ZeRO-3
                yield from _tensor(prefix + key, kind, module, here)
        for key, buffer in module._buffers.items():
            if buffer is not None and not adapter[prefix + key]:
                saved = key not in module._non_persistent_buffers_set
                yield from _tensor(prefix + key, "buffer" if saved else "cache", module, buffer)
        for key, value in beside(module):
            if isinstance(value, Tensor):
                yield from _tensor(prefix + key, "beside", module, value)
            else:
                yield _part(prefix + key, "beside", module, str(value))


def _shards(module: Any) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """What FSDP2 keeps of the parameters of a module, by their place: the whole is there for a forward only.

    A whole that an evaluation has left is of no account: the next step shards first, and trains what was sharded.
    """
    if not hasattr(type(module), "_get_fsdp_state"):  # asked of a module, it takes as long as all the rest
        return
    with suppress(AttributeError):  # torch calls none of this its interface
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for kept in (one for group in groups if group is not None for one in group.fsdp_params):
            info = kept._module_info
            modules, names = [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names]
            for place, name in zip(modules, names, strict=True):
                yield (id(place), name), kept.sharded_param


def _merged_layers(module: Any) -> tuple[Any, ...]:
    """Layers whose products PEFT cannot reach: ``nn.MultiheadAttention``, whose forward calls no layer."""
    base = vars(module).get("_modules", {}).get("base_layer")
    if not isinstance(base, nn.MultiheadAttention):
        return ()
    projection = base._modules["out_proj"]
    return (base, getattr(projection, "base_layer", projection))


def quant_state(layer: Any, weight: Any) -> Any:
    """What bitsandbytes keeps of a 4-bit weight: on the weight, else where its layer or parametrisation keeps it."""
    for holder in (weight, layer, *(layer if isinstance(layer, ParametrizationList) else ())):
        state = getattr(holder, "quant_state", None)
        if hasattr(state, "absmax"):
            return state
    return None


def base_weight(layer: Any) -> Any:
    """The weight of a layer, None where it has none of the usual names; asks no property, which may unpack it."""
    held = getattr(layer, "_parameters", {})
    return next((held[name] for name in WEIGHTS if held.get(name) is not None), None)


def is_packed(state: Any) -> bool:
    """Whether bitsandbytes has laid out a 4-bit weight anew for a CPU."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def _tensor(name: str, kind: Kind, layer: nn.Module, tensor: Tensor) -> Iterator[BaseTensor]:
    if is_lazy(tensor):
        yield _part(name, kind, layer, ValueError("it has no shape yet"))
        return
    wrapper = type(tensor).__name__ if is_wrapper(tensor) else None
    try:
        parts = list(plain_parts(tensor, name))
    except Exception as error:  # a class of tensors that somebody wrote
        yield _part(name, kind, layer, error)
        return
    for part, plain in parts:
        yield BaseTensor(name=part, owner=name, wrapper=wrapper, kind=kind, layer=layer, value=plain)


def _part(name: str, kind: Kind, layer: nn.Module, value: str | Exception) -> BaseTensor:
    return BaseTensor(name=name, owner=name, wrapper=None, kind=kind, layer=layer, value=value)


def beside(layer: Any) -> Iterator[tuple[str, Any]]:
    """What a quantised layer keeps of its weight beside parameters and buffers: tensors, and facts."""
    weight = base_weight(layer)
    state = quant_state(layer, weight)
    if state is not None:
        yield from _of_state("quant_state", state)
    elif hasattr(weight, "SCB"):  # LLM.int8
        moved = getattr(layer, "state", None)
        for key, otherwise in (("SCB", None), ("CB", weight)):
            found = next(
                (one for one in (getattr(moved, key, None), getattr(weight, key)) if one is not None), otherwise
            )
            if found is not None:
                yield key, found
    elif any(name in held for held in (layer._parameters, layer._buffers) for name in PACKED):
        for key, value in vars(layer).items():
            if isinstance(value, Tensor):
                yield key, value
            elif isinstance(value, dict) and not key.startswith("_"):
                yield from ((f"{key}.{name}", one) for name, one in value.items() if isinstance(one, Tensor))


def _of_state(name: str, state: Any) -> Iterator[tuple[str, Any]]:
    for key in _STATE:
        value = getattr(state, key, None)
        if value is not None:
            yield f"{name}.{key}", value
    nested = getattr(state, "state2", None)
    if nested is not None:
        yield from _of_state(f"{name}.state2", nested)
