"""What of a model is an adapter's, asked of the places that hold it (``adapter_kinds``) and never of a name.

Whatever else a model holds is its base, however it is called: a model kept as ``self.lora_model`` has no adapter by
that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from torch import Tensor, nn

from kernels_check.observe.adapter_biases import biases_of_adapters
from kernels_check.observe.adapter_kinds import AdapterLayer, holders_in, in_use, is_a, is_tuner, layers_at
from kernels_check.observe.module_tree import Model, ModelTree, every_module, reading
from kernels_check.observe.tensor_copy import is_wrapper, plain_parts


@reading
def adapter_layers(model: ModelTree) -> list[AdapterLayer]:
    """Every place at which an adapter that is in use (``in_use``) acts.

    A layer that holds one of them belongs here also if it is inactive in that layer: a layer that was left out is a
    fault. Where no adapter is active at all, every layer counts with everything it holds.
    """
    found = _every_layer(model)
    wanted = in_use(model, found)
    layers = [_restrict(layer, wanted) for layer in found]
    return [layer for layer in layers if layer.held]


@reading
def _every_layer(model: ModelTree) -> list[AdapterLayer]:
    """Those of adapters that are not in use, too."""
    return [layer for name, module in model.modules for layer in layers_at(name, module)]


@reading
def trained_parameters(model: ModelTree) -> dict[str, Tensor]:
    """Parameters that have to learn, by their name in the model, each once: layers may share one.

    Those that the methods in use train, biases of the base that they were asked for, and whatever else of the adapter
    requires a gradient.
    """
    layers = adapter_layers(model)
    names = {id(value): name for name, value in model.parameters}
    trained = {names.get(id(value), name): value for layer in layers for name, value in layer.weights()}
    trained |= {names.get(id(value), name): value for name, value in _biases(model)}
    own = adapter_parameters(model)
    resting = {id(value) for layer in _resting(model, layers) for _, value in layer.weights()}
    for name, value in model.parameters:
        if name in own and value.requires_grad and id(value) not in resting:
            trained.setdefault(name, value)
    left_alone, unread = _frozen_by_design(model), _never_read(model)
    return {
        name: value
        for name, value in trained.items()
        if (value.requires_grad or id(value) not in left_alone) and id(value) not in unread and _is_here(value)
    }


def _biases(model: ModelTree) -> Iterator[tuple[str, Tensor]]:
    for name in biases_of_adapters(model):
        place, _, key = name.rpartition(".")
        yield name, getattr(model.model.get_submodule(place), key)


def _is_here(value: Tensor) -> bool:
    """Whether any part of a parameter lies on this rank."""
    return not is_wrapper(value) or any(part.numel() for _, part in plain_parts(value.detach()))


@reading
def token_parameters(model: ModelTree) -> frozenset[str]:
    """Names of parameters that act on a few tokens only: a batch without these tokens gives them no gradient."""
    held = {
        id(value) for layer in adapter_layers(model) if "token_indices" in layer.others for _, value in layer.weights()
    }
    return frozenset(name for name, value in model.parameters if id(value) in held)


def written_by_method(model: Model) -> frozenset[int]:
    """Parameters that a method itself writes to between updates: AdaLoRA sets the ranks that it takes away to zero."""
    written: set[int] = set()
    for module in every_module(model):
        if "rankallocator" in vars(module) and is_tuner(module):
            for layer in module.modules():
                held = layer._modules.get("lora_E")
                written |= set(map(id, held.parameters())) if held is not None else set()
    return frozenset(written)


class Below(dict[str, bool]):
    """Whether a qualified name is one of some paths or below one, each found out once.

    Args:
        paths: qualified names.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        self._paths = frozenset(paths)

    def __missing__(self, name: str) -> bool:
        above, dot, _ = name.rpartition(".")
        self[name] = found = name in self._paths or (bool(dot) and self[above])
        return found


@reading
def adapters_of(model: ModelTree) -> Below:
    """What is an adapter's: attributes, with whatever they hold, and biases of the base."""
    held = (f"{name}.{holder}" if name else holder for name, module in model.modules for holder in holders_in(module))
    return Below([*held, *biases_of_adapters(model)])


@reading
def adapter_parameters(model: ModelTree) -> frozenset[str]:
    """Names of the parameters that are an adapter's: of any method of PEFT, and what is trained beside it."""
    own = adapters_of(model)
    return frozenset(name for name, _ in model.parameters if own[name])


@reading
def base_parameters(model: ModelTree) -> dict[str, nn.Parameter]:
    """Every other parameter, by name."""
    adapter = adapter_parameters(model)
    return {name: value for name, value in model.parameters if name not in adapter}


def _restrict(layer: AdapterLayer, wanted: Collection[str]) -> AdapterLayer:
    held = tuple(name for name in layer.held if name in wanted or name == "")
    return layer if held == layer.held else replace(layer, held=held)


def _resting(model: ModelTree, layers: list[AdapterLayer]) -> Iterator[AdapterLayer]:
    """The same places with the adapters that are not in use."""
    used = {layer.name: set(layer.held) for layer in layers}
    for layer in _every_layer(model):
        yield _restrict(layer, {adapter for adapter in layer.held if adapter not in used.get(layer.name, set())})


def _frozen_by_design(model: ModelTree) -> set[int]:
    """Parameters of methods that freeze the layers they build on: X-LoRA trains a router over frozen adapters."""
    frozen: set[int] = set()
    for module in every_module(model):
        configuration = vars(module).get("xlora_config")
        if configuration is not None and not getattr(configuration, "use_trainable_adapters", True):
            frozen |= {id(value) for value in module.parameters()}
    return frozen


def _never_read(model: ModelTree) -> set[int]:
    """Parameters that a method makes and no forward reads.

    ShadowPEFT carries a state from layer to layer and drops what the last of them has made of it.
    """
    tuners = (module for _, module in model.modules if is_a(module, "peft.tuners.shadow.model", "ShadowModel"))
    last = [layer for tuner in tuners for layer in vars(tuner).get("_boundary_layers", ())[-1:]]
    return {
        id(value)
        for layer in last
        for holder in ("shadow_update_transform", "shadow_update_gate")
        for value in layer.get_submodule(holder).parameters()
    }
