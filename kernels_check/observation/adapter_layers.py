"""What of a model is an adapter's, asked of the places that hold it (``adapter_kinds``) and never of a name.

Whatever else a model holds is its base, however it is called: a model kept as ``self.lora_model`` has no adapter by
that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import accumulate

from torch import Tensor, nn

from kernels_check.observation.adapter_biases import biases_of_adapters
from kernels_check.observation.adapter_kinds import AdapterLayer, holders_in, in_use, is_a, is_tuner, layers_at
from kernels_check.observation.module_tree import every_module, named_modules, named_parameters
from kernels_check.observation.tensor_copy import is_wrapper, plain_parts


def adapter_layers(model: nn.Module) -> list[AdapterLayer]:
    """Every place at which an adapter that is in use (``in_use``) acts.

    A layer that holds one of them belongs here also if it is inactive in that layer: a layer that was left out is a
    fault. Where no adapter is active at all, every layer counts with everything it holds.
    """
    found = [layer for name, module in named_modules(model) for layer in layers_at(name, module)]
    wanted = in_use(model, found)
    layers = [_restrict(layer, wanted) for layer in found]
    return [layer for layer in layers if layer.held]


def trained_parameters(model: nn.Module, layers: list[AdapterLayer]) -> dict[str, Tensor]:
    """Parameters that have to learn, by their name in the model, each once: layers may share one.

    Those that the methods in use train, biases of the base that they were asked for, and whatever else of the adapter
    requires a gradient.
    """
    names = {id(value): name for name, value in named_parameters(model)}
    trained = {names.get(id(value), name): value for layer in layers for name, value in layer.weights()}
    trained |= {names.get(id(value), name): value for name, value in _biases(model)}
    own = adapter_parameters(model)
    resting = {id(value) for layer in _resting(model, layers) for _, value in layer.weights()}
    for name, value in named_parameters(model):
        if name in own and value.requires_grad and id(value) not in resting:
            trained.setdefault(name, value)
    left_alone, unread = _frozen_by_design(model), _never_read(model)
    return {
        name: value
        for name, value in trained.items()
        if (value.requires_grad or id(value) not in left_alone) and id(value) not in unread and _is_here(value)
    }


def _biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name in biases_of_adapters(model):
        place, _, key = name.rpartition(".")
        yield name, getattr(model.get_submodule(place), key)


def _is_here(value: Tensor) -> bool:
    """Whether any part of a parameter lies on this rank."""
    return not is_wrapper(value) or any(part.numel() for _, part in plain_parts(value.detach()))


def token_parameters(model: nn.Module) -> frozenset[str]:
    """Names of parameters that act on a few tokens only: a batch without these tokens gives them no gradient."""
    held = {
        id(value) for layer in adapter_layers(model) if "token_indices" in layer.others for _, value in layer.weights()
    }
    return frozenset(name for name, value in named_parameters(model) if id(value) in held)


def written_by_method(model: nn.Module) -> frozenset[int]:
    """Parameters that a method itself writes to between updates: AdaLoRA sets the ranks that it takes away to zero."""
    written: set[int] = set()
    for module in every_module(model):
        if "rankallocator" in vars(module) and is_tuner(module):
            for layer in module.modules():
                held = layer._modules.get("lora_E")
                written |= set(map(id, held.parameters())) if held is not None else set()
    return frozenset(written)


def adapter_paths(model: nn.Module) -> frozenset[str]:
    """Qualified names of what is an adapter's: attributes, with whatever they hold, and biases of the base."""
    held = (
        f"{name}.{holder}" if name else holder for name, module in named_modules(model) for holder in holders_in(module)
    )
    return frozenset([*held, *biases_of_adapters(model)])


def is_below(name: str, paths: frozenset[str]) -> bool:
    """Whether a qualified name is one of these paths or below one."""
    return not paths.isdisjoint(_paths_to(name))


def adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are an adapter's: of any method of PEFT, and what is trained beside it."""
    paths = adapter_paths(model)
    return frozenset(name for name, _ in named_parameters(model) if is_below(name, paths))


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every other parameter, by name."""
    adapter = adapter_parameters(model)
    return {name: value for name, value in named_parameters(model) if name not in adapter}


def _restrict(layer: AdapterLayer, wanted: Collection[str]) -> AdapterLayer:
    held = tuple(name for name in layer.held if name in wanted or name == "")
    return AdapterLayer(**{key: getattr(layer, key) for key in AdapterLayer.__slots__} | {"held": held})


def _resting(model: nn.Module, layers: list[AdapterLayer]) -> Iterator[AdapterLayer]:
    """The same places with the adapters that are not in use."""
    used = {layer.name: set(layer.held) for layer in layers}
    for name, module in named_modules(model):
        for layer in layers_at(name, module):
            yield _restrict(layer, {adapter for adapter in layer.held if adapter not in used.get(layer.name, set())})


def _frozen_by_design(model: nn.Module) -> set[int]:
    """Parameters of methods that freeze the layers they build on: X-LoRA trains a router over frozen adapters."""
    frozen: set[int] = set()
    for module in every_module(model):
        configuration = vars(module).get("xlora_config")
        if configuration is not None and not getattr(configuration, "use_trainable_adapters", True):
            frozen |= {id(value) for value in module.parameters()}
    return frozen


def _never_read(model: nn.Module) -> set[int]:
    """Parameters that a method makes and no forward reads.

    ShadowPEFT carries a state from layer to layer and drops what the last of them has made of it.
    """
    tuners = (module for module in model.modules() if is_a(module, "peft.tuners.shadow.model", "ShadowModel"))
    last = [layer for tuner in tuners for layer in vars(tuner).get("_boundary_layers", ())[-1:]]
    return {
        id(value)
        for layer in last
        for holder in ("shadow_update_transform", "shadow_update_gate")
        for value in layer.get_submodule(holder).parameters()
    }


def _paths_to(name: str) -> Iterator[str]:
    """``a``, ``a.b``, ``a.b.c`` of ``a.b.c``."""
    return accumulate(name.split("."), lambda path, part: f"{path}.{part}")
