"""Finds the parts of a model that belong to an adapter, from the modules that hold them and never from names.

PEFT wraps each target in a class for the method and quantisation backend. The class lists in ``adapter_layer_names``
the attributes with trained parameters and in ``other_param_names`` other attributes of the adapter; trained copies
(``modules_to_save``, trainable tokens) do the same. PEFT is used only if it is loaded. A user-defined class is an
adapter layer if it has the wrapped layer as ``base_layer`` together with ``lora_A`` and ``lora_B``.

Biases of the base belong to the adapter if ``bias`` in its configuration selects them: they must learn.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from kernels_check.observe.modules import (
    ModelTree,
    cache_in_tree,
    find_enclosing,
    is_wrapper,
    plain_parts,
)

_PREFIX = "lora_"
"""Prefix of the attributes of a user-defined class."""
_FACTORS = ("lora_A", "lora_embedding_A")
_DRAWN_INSIDE = ("rank_dropout", "module_dropout")
"""Probabilities that LyCORIS methods store as numbers and apply inside the product."""
_DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    nn.Identity,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayer:
    """One place where an adapter acts: a wrapped layer, a trained copy, or a prompt encoder."""

    name: str
    module: nn.Module
    held: tuple[str, ...]
    """Active adapters for which this layer has weights; an unnamed one is ``""``."""
    trains: tuple[str, ...]
    """Attributes that hold trained parameters."""
    others: tuple[str, ...] = ()
    """Attributes that hold other parts of the adapter."""
    base: Any = None
    """The wrapped layer, if the method wraps a layer and adds to it."""
    copied: bool = False
    """Whether it trains a copy of a part of the base."""
    partly: bool = False
    """Whether the method trains only a part of the listed parameters, and marks it only by ``requires_grad``."""
    detached: bool = False
    """Whether the method has removed it from the model, as with disabled adaption prompts."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters in ``held`` that are active now; a user-defined class without this information uses all of
        them."""
        is_model = "model" in adapter_roles(self.module)
        active: Any = (
            vars(self.module).get("active_adapter") if is_model else getattr(self.module, "active_adapters", None)
        )
        if active is None:
            return self.held
        named = {active} if isinstance(active, str) else {*active}
        return tuple(name for name in self.held if name in named or (not name and named))

    @property
    def disabled(self) -> bool:
        """Whether the layer skips its adapters now; for a model with a prompt, whether the model does."""
        name = "_adapters_disabled" if "model" in adapter_roles(self.module) else "disable_adapters"
        return self.detached or bool(getattr(self.module, name, False))

    @property
    def merged(self) -> tuple[str, ...]:
        """Adapters that are merged into the base weight."""
        return tuple(getattr(self.module, "merged_adapters", ()))

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Qualified name and module of every called part of the adapter, including dropouts."""
        entries = self._entries(*self.trains, *self.others)
        return ((name, part) for _, name, part, _ in entries if isinstance(part, nn.Module))

    def factors(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts that hold trained parameters."""
        modules = ((name, part) for _, name, part, _ in self._entries(*self.trains) if isinstance(part, nn.Module))
        return ((name, part) for name, part in modules if any(True for _ in part.parameters()))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name (relative to this layer) and tensor of every parameter that the method trains, without frozen ones.

        Some methods freeze some of their weights by design and list them (``frozen_peft_weight_names``); a prompt
        encoder may also hold frozen tables.
        """
        listed = list(self._listed())
        trained = [(name, value) for name, value in listed if value.requires_grad]
        yield from trained if self.partly and trained else listed

    def _listed(self) -> Iterator[tuple[str, Tensor]]:
        frozen: Mapping[str, tuple[str, ...]] = getattr(self.module, "frozen_peft_weight_names", None) or {}
        for holder, name, part, adapter in self._entries(*self.trains):
            trained = holder not in frozen.get(adapter, ())
            if trained and isinstance(part, nn.Module):
                yield from part.named_parameters(prefix=name)
            elif trained and isinstance(part, Tensor):
                yield name, part

    def dropouts(self) -> Iterator[tuple[str, nn.Module]]:
        """Qualified name and module of every dropout of the adapter; a disabled one is an ``Identity``."""
        for name, part in self.parts():
            # A method may have its own dropout class, with a probability and no trained parameters.
            is_own = isinstance(getattr(part, "p", None), float) and not any(True for _ in part.parameters())
            if isinstance(part, _DROPOUTS) or is_own:
                yield name, part

    def unseen_dropouts(self) -> Iterator[tuple[str, float]]:
        """Name and probability of dropouts that are not modules and leave no trace when they are applied."""
        entries = self._entries(*(name for name in _DRAWN_INSIDE if name in self.others))
        return ((name, float(part)) for _, name, part, _ in entries if isinstance(part, int | float) and part)

    def _entries(self, *holders: str) -> Iterator[tuple[str, str, Any, str]]:
        """Attribute, name, object and adapter of the contents of some attributes, for the adapters in use."""
        for holder in holders:
            held: Any = self.module
            for part in holder.split("."):
                held = getattr(held, part, None)
            path = f"{self.name}.{holder}" if self.name else holder
            if _is_keyed(held):
                yield from ((holder, f"{path}.{name}", held[name], name) for name in self.held if name in held)
            elif isinstance(held, nn.Module | Tensor):
                yield holder, path, held, ""


def layers_at(name: str, module: nn.Module) -> Iterator[AdapterLayer]:
    """The places that a module is or contains, with all adapters there."""
    roles = adapter_roles(module)
    if not roles and "base_layer" not in module._modules:
        return
    listed: tuple[str, ...] = tuple(getattr(module, "adapter_layer_names", ())) if "layer" in roles else ()
    trains = listed or tuple(_own_holders(module))
    if trains:
        if not any("." in holder for holder in trains):  # otherwise it points into a layer that counts separately
            yield AdapterLayer(
                name=name,
                module=module,
                held=_read_adapter_names(module, trains),
                trains=trains,
                others=tuple(getattr(module, "other_param_names", ())) if listed else (),
                base=module._modules.get("base_layer"),
                copied="copy" in roles,
            )
    elif "attention" in roles:
        yield AdapterLayer(name=name, module=module, held=("",), trains=tuple(module._parameters))
    elif "model" in roles and isinstance(encoders := module._modules.get("prompt_encoder"), nn.ModuleDict):
        yield AdapterLayer(name=name, module=module, held=tuple(encoders), trains=("prompt_encoder",), partly=True)
    elif "tuner" in roles:
        yield from (
            AdapterLayer(
                name=f"{name}._cached_adapters.{adapter}.{place}",
                module=one,
                held=("",),
                trains=tuple(one._parameters),
                detached=True,
            )
            for adapter, cached in vars(module).get("_cached_adapters", {}).items()  # adaption prompts
            for place, one in enumerate(cached)
        )


def holders_in(module: nn.Module) -> Iterator[str]:
    """Attributes of one module that belong to an adapter."""
    roles = adapter_roles(module)
    if "layer" in roles:
        yield from getattr(module, "adapter_layer_names", ())
        yield from getattr(module, "other_param_names", ())
    elif "tuner" in roles:
        # X-LoRA holds a LoRA tuner, and the model in it.
        yield from (
            key for key, held in module._modules.items() if key != "model" and "tuner" not in adapter_roles(held)
        )
        yield from module._parameters
    elif "attention" in roles:
        yield from module._parameters
    elif "model" in roles:
        yield "prompt_encoder"
    yield from _own_holders(module)  # also if a user-defined class lists nothing


def _own_holders(module: nn.Module) -> list[str]:
    """Attributes with the adapter of a user-defined class; empty for other classes."""
    held = [*module._modules, *module._parameters]
    is_own = "base_layer" in module._modules and not set(_FACTORS).isdisjoint(held)
    return [name for name in held if name.startswith(_PREFIX)] if is_own else []


_ROLES = (
    ("model", "peft.peft_model", "PeftModel"),
    ("tuner", "peft.tuners.tuners_utils", "BaseTuner"),
    ("tuner", "peft.tuners.adaption_prompt.model", "AdaptionPromptModel"),
    ("gate", "peft.tuners.xlora.model", "XLoraModel"),
    ("attention", "peft.tuners.adaption_prompt.layer", "_BaseAdaptedAttention"),
    ("attention", "peft.tuners.adaption_prompt.layer", "AdaptedAttention"),
    ("copy", "peft.utils.other", "AuxiliaryTrainingWrapper"),
    ("parameter", "peft.tuners.lora.layer", "ParamWrapper"),
)


def adapter_roles(module: object) -> frozenset[str]:
    """Roles of a module in an adapter, by its class: an instance may forward attributes of the module that it wraps."""
    kind: Any = type(module)
    return _roles(kind)


@cache
def _roles(of: Any) -> frozenset[str]:
    roles = {role for role, module_name, name in _ROLES if issubclass(of, _find_class(module_name, name))}
    return frozenset(roles | ({"layer"} if isinstance(getattr(of, "adapter_layer_names", None), tuple) else set()))


def _find_class(module_name: str, name: str) -> Any:
    """A class of a module that may not be loaded; () if it is not."""
    kind = getattr(sys.modules.get(module_name), name, None)
    return kind if isinstance(kind, type) else ()


def _read_adapter_names(module: nn.Module, holders: tuple[str, ...]) -> tuple[str, ...]:
    held: list[Any] = [getattr(module, holder, None) for holder in holders]
    names: set[str] = set().union(*(one.keys() for one in held if _is_keyed(one)))
    is_unnamed = any(isinstance(one, nn.Module | Tensor) and not _is_keyed(one) for one in held)
    return tuple(sorted(names | ({""} if is_unnamed else set())))


def _is_keyed(held: Any) -> bool:
    """Whether there is an entry per adapter: in a dictionary of PyTorch, PEFT's buffer dictionary, or a plain one."""
    return hasattr(held, "keys") and hasattr(held, "__getitem__")


@cache_in_tree
def biases_of_adapters(tree: ModelTree) -> dict[str, str]:
    """Biases of the base that an active adapter trains: by qualified name, with the setting, as ``bias='all'``.

    A tensor shared by several modules has one name for each.
    """
    used = {adapter for layer in adapter_layers(tree) for adapter in layer.held}
    selected: dict[int, str] = {}
    for _, holder in tree.modules:  # a tuner, or a model that contains only PEFT's layers
        configurations = vars(holder).get("peft_config")
        for adapter, configuration in configurations.items() if isinstance(configurations, dict) else ():
            setting = str(getattr(configuration, "bias", "none"))
            if adapter in used and setting != "none":
                selected |= {id(bias): f"bias={setting!r}" for bias in _find_trained_biases(holder, setting)}
    return {
        f"{name}.{key}" if name else key: selected[id(value)]
        for name, module in tree.modules
        for key, value in (*module._parameters.items(), *module._buffers.items())  # GPTQ stores a bias as a buffer
        if id(value) in selected
    }


def _find_trained_biases(holder: nn.Module, setting: str) -> Iterator[Tensor]:
    """Biases that PEFT trains: for ``all`` those outside of adapters and copies, else those of adapted layers."""
    modules = dict(holder.named_modules())
    copies = [name for name, module in modules.items() if "copy" in adapter_roles(module)]
    if setting == "all":
        own = {*adapter_attributes(modules.items()), *copies}
        biases: Iterable[Any] = (
            value
            for name, value in holder.named_parameters()
            if name.rpartition(".")[2] == "bias" and find_enclosing(name, own) is None
        )
    else:
        layers = (module for name, module in modules.items() if "layer" in adapter_roles(module) and name not in copies)
        biases = (getattr(layer, "bias", None) for layer in layers)
    yield from (bias for bias in biases if isinstance(bias, Tensor))


def adapter_attributes(modules: Iterable[tuple[str, nn.Module]]) -> set[str]:
    """Qualified names of the attributes of modules that belong to an adapter."""
    return {f"{name}.{holder}".removeprefix(".") for name, module in modules for holder in holders_in(module)}


@cache_in_tree
def adapter_layers(tree: ModelTree) -> list[AdapterLayer]:
    """Every place where an adapter in use acts.

    These are the adapters that the tuner calls active, if at least one layer agrees, else those active in any layer,
    else all. A layer that holds such an adapter is included even if it is inactive in that layer, which is a fault.
    """
    found = _every_layer(tree)
    calls = (getattr(module, "active_adapters", ()) for _, module in tree.modules if "tuner" in adapter_roles(module))
    named = {adapter for names in calls for adapter in ([names] if isinstance(names, str) else names)}
    active = {adapter for layer in found for adapter in layer.adapters}
    names = active & named or active or {adapter for layer in found for adapter in layer.held}
    layers = [_restrict(layer, names) for layer in found]
    return [layer for layer in layers if layer.held]


@cache_in_tree
def _every_layer(tree: ModelTree) -> list[AdapterLayer]:
    """All layers, including those of inactive adapters."""
    return [layer for name, module in tree.modules for layer in layers_at(name, module)]


@cache_in_tree
def trained_parameters(tree: ModelTree) -> dict[str, Tensor]:
    """Parameters that must learn, by their name in the model, each once, since layers may share a parameter.

    These are the parameters that the active methods train, the selected biases of the base, and all other parameters of
    the adapter that require a gradient.
    """
    layers, idle = adapter_layers(tree), _idle_by_design(tree)
    names = {id(value): name for name, value in tree.parameters}
    weights = ((name, value) for layer in layers for name, value in layer.weights() if id(value) not in idle)
    trained = {names.get(id(value), name): value for name, value in weights}
    for name in biases_of_adapters(tree):
        place, _, key = name.rpartition(".")
        value = getattr(tree.model.get_submodule(place), key)
        trained[names.get(id(value), name)] = value
    own = adapter_parameters(tree)
    used = {layer.name: set(layer.held) for layer in layers}
    unused = (_restrict(one, set(one.held) - used.get(one.name, set())) for one in _every_layer(tree))
    unused_parameters = idle | {id(value) for layer in unused for _, value in layer.weights()}
    for name, value in tree.parameters:
        if name in own and value.requires_grad and id(value) not in unused_parameters:
            trained.setdefault(name, value)
    # This rank may hold no part of a sharded parameter.
    return {
        name: value
        for name, value in trained.items()
        if not is_wrapper(value) or any(part.numel() for _, part in plain_parts(value.detach()))
    }


_UPDATES = ("shadow_update_transform", "shadow_update_gate")
"""Attributes with which a layer of SHADOW updates the state for the next layer."""


def _idle_by_design(tree: ModelTree) -> frozenset[int]:
    """Parameters that a method holds without training them: the experts of X-LoRA, of which it trains only the gate,
    and the update in the last layer of SHADOW, whose state no further layer reads."""
    gated = tuple(f"{name}." for name, module in tree.modules if "gate" in adapter_roles(module))
    layers = adapter_layers(tree)
    experts = (value for layer in layers if layer.name.startswith(gated) for _, value in layer.weights())
    updates = [replace(layer, trains=_UPDATES) for layer in layers if set(_UPDATES) <= {*layer.trains}]
    last = (value for layer in updates[-1:] for _, value in layer.weights())
    return frozenset({id(value) for value in experts if not value.requires_grad} | set(map(id, last)))


@cache_in_tree
def token_parameters(tree: ModelTree) -> frozenset[str]:
    """Names of parameters that affect only a few tokens: a batch without these tokens gives them no gradient."""
    held = {
        id(value) for layer in adapter_layers(tree) if "token_indices" in layer.others for _, value in layer.weights()
    }
    return frozenset(name for name, value in tree.parameters if id(value) in held)


def written_by_method(tree: ModelTree) -> frozenset[int]:
    """Parameters to which a method itself writes between updates: AdaLoRA sets removed ranks to zero."""
    tuners = (
        module for _, module in tree.modules if "rankallocator" in vars(module) and "tuner" in adapter_roles(module)
    )
    held = (layer._modules.get("lora_E") for tuner in tuners for layer in tuner.modules())
    return frozenset(id(value) for ranks in held if ranks is not None for value in ranks.parameters())


@cache_in_tree
def adapter_names(tree: ModelTree) -> frozenset[str]:
    """Names that belong to an adapter with everything below them: its attributes, and biases of the base."""
    return frozenset({*adapter_attributes(tree.modules), *biases_of_adapters(tree)})


def is_in_adapter(tree: ModelTree, name: str) -> bool:
    """Whether a module, parameter or buffer belongs to an adapter."""
    return find_enclosing(name, adapter_names(tree)) is not None


@cache_in_tree
def adapter_parameters(tree: ModelTree) -> frozenset[str]:
    """Names of the parameters of adapters, for any PEFT method, and of those that train with them."""
    return frozenset(name for name, _ in tree.parameters if is_in_adapter(tree, name))


@cache_in_tree
def base_parameters(tree: ModelTree) -> dict[str, nn.Parameter]:
    """All other parameters, by name."""
    adapter = adapter_parameters(tree)
    return {name: value for name, value in tree.parameters if name not in adapter}


def _restrict(layer: AdapterLayer, names: Collection[str]) -> AdapterLayer:
    held = tuple(name for name in layer.held if name in names or name == "")
    return layer if held == layer.held else replace(layer, held=held)
