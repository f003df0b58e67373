"""The parts of a model that a configuration names: whether each is present, and the fate of embeddings and norms.

PEFT raises an error if none of the listed targets matches. If one matches, PEFT ignores the others silently. For models
whose experts are one parameter in transformers 5, PEFT replaces the names of their projections by names of that
parameter, in the configuration itself.

A changed value does not prove training: weight decay changes parameters with a zero gradient. So embeddings and norms
also need a gradient, and the parameters used in their place (a copy that PEFT trains, adapter factors, single tokens)
are judged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor, nn

from kernels_check.observe.adapter import AdapterLayer, adapter_layers, adapter_roles, is_in_adapter, token_parameters
from kernels_check.observe.modules import ModelTree, find_enclosing

if TYPE_CHECKING:
    from kernels_check.observe.observation import Observation


_HEADS = frozenset({"classifier", "score", "qa_outputs"})
"""Names that PEFT itself adds to ``modules_to_save`` for a task; a model has one of them."""
_WRAPPERS = ("base_layer", "token_adapter", "_orig_mod", "_fsdp_wrapped_module")
_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def unmatched_names(tree: ModelTree) -> list[str]:
    """Each name in the configuration of an active adapter that matched nothing, as ``target_modules 'qurey'``.

    Raises:
        Exception: raised by PEFT if its matching fails; the result is then unknown.
    """
    layers = adapter_layers(tree)
    used = {adapter for layer in layers for adapter in layer.held}
    tables = [(path, module, vars(module).get("peft_config")) for path, module in tree.modules]
    # Several wrappers may share one table; the outermost comes first.
    once = {id(table): (path, module, table) for path, module, table in reversed(tables) if isinstance(table, dict)}
    found = [
        _find_unmatched(configuration, _Places(path, module, layers))
        for path, module, table in reversed(once.values())
        for adapter, configuration in table.items()
        if adapter in used
    ]
    return list(dict.fromkeys(name for names in found for name in names))


class _Places:
    """Positions of adapters, by names as PEFT matches them: relative to the model that was wrapped."""

    def __init__(self, path: str, module: nn.Module, layers: Iterable[AdapterLayer]) -> None:
        inner = module._modules.get("model")
        self.tuner = module if hasattr(module, "targeted_module_names") and inner is not None else None
        prefix = f"{path}.model." if self.tuner is not None else f"{path}."
        prefix = prefix.removeprefix(".")
        near = [(layer, layer.name.removeprefix(prefix)) for layer in layers if layer.name.startswith(prefix)]
        paths = [name for name, _ in module.named_modules(prefix=path)]
        self.modules = {_unwrapped_name(name.removeprefix(prefix)) for name in paths if name.startswith(prefix)}
        """All modules of the wrapped model, adapted or not."""
        self.copies = {_unwrapped_name(name) for layer, name in near if layer.copied or name.endswith(".token_adapter")}
        self.parameters = {
            f"{_unwrapped_name(name)}.{layer.module.parameter_name}"
            for layer, name in near
            if "parameter" in adapter_roles(layer.module)
        }
        self.of_experts = _read_expert_names(inner if self.tuner is not None else module)
        adapted = {layer.name for layer, _ in near}
        self.bare = [name for name in paths if find_enclosing(name, adapted) is None]
        """Modules outside every adapted module."""


def _find_unmatched(configuration: Any, places: _Places) -> Iterator[str]:
    if not _by_default(configuration, places):
        for field in ("target_modules", "feedforward_modules"):
            missing = (
                name
                for name in _read_targets(configuration, field)
                if not _matches(configuration, name, places.modules)
            )
            yield from (f"{field} {name!r}" for name in missing)
    yield from _unmatched_parameters(_read_targets(configuration, "target_parameters"), places)
    task = str(getattr(configuration, "task_type", ""))
    added = _HEADS if any(one in task for one in _TASKS) else frozenset()
    tokens = getattr(configuration, "trainable_token_indices", None)
    saved = [("modules_to_save", name) for name in _read_targets(configuration, "modules_to_save") if name not in added]
    saved += [("trainable_token_indices", name) for name in (tokens if isinstance(tokens, dict) else ())]
    for field, name in saved:
        if not any(place.endswith(name) for place in places.copies):  # PEFT also matches this inside a word
            yield f"{field} {name!r}"


def _unmatched_parameters(requested: Collection[str], places: _Places) -> Iterator[str]:
    """Unmatched parameter names; names that PEFT has derived are replaced by the user's."""
    words = {name.rpartition(".")[2] for name in places.bare}
    by_all_linear = bool(places.of_experts) and places.of_experts.keys() <= set(requested)
    for name in (one for one in requested if not any(_ends_with(place, one) for place in places.parameters)):
        layers = sorted(places.of_experts.get(name, frozenset()) & words)
        if layers:
            made = " and ".join(map(repr, layers))
            yield f"target_modules {made} (PEFT converts them into target_parameters {name!r} in models of this type)"
        elif not (by_all_linear and name in places.of_experts):
            yield f"target_parameters {name!r}"


def _read_expert_names(model: Any) -> dict[str, frozenset[str]]:
    """The expert parameters of a model type, each with the layer names that PEFT converts into it."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    with suppress(ImportError, AttributeError):  # with transformers 4; the PEFT function is not public
        from peft.utils import transformers_weight_conversion as conversion

        pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind)
        if conversion._MOE_FUSED_TARGETS.get(pattern):
            table = conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {})
            return {new: frozenset(old for old in table if table[old] == new) for new in table.values()}
    return {}


def _read_targets(configuration: Any, field: str) -> list[str]:
    requested = getattr(configuration, field, None)
    if isinstance(requested, str):
        return [requested]
    return sorted(map(str, requested)) if isinstance(requested, Collection) else []


def _by_default(configuration: Any, places: _Places) -> bool:
    """Whether PEFT chose the targets by model type, instead of the user by name."""
    tables = getattr(places.tuner, "target_module_mapping", None) or {}
    requested: Any = getattr(configuration, "target_modules", None)
    is_listed = isinstance(requested, Collection) and not isinstance(requested, str)
    return is_listed and any(set(requested) == set(table) for table in tables.values())


def _matches(configuration: Any, name: str, modules: Iterable[str]) -> bool:
    """Whether PEFT finds a module by this name, even if the configuration excludes the module again."""
    is_pattern = isinstance(configuration.target_modules, str)
    is_special = name == "all-linear" or "dummy-target-modules" in name  # PEFT's name for an adapter without any
    return is_special or any(re.fullmatch(name, one) if is_pattern else _ends_with(one, name) for one in modules)


def _ends_with(place: str, name: str) -> bool:
    return place == name or place.endswith(f".{name}")


def _unwrapped_name(name: str) -> str:
    """The name before anything was wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


Fate = Literal[
    "updated",
    "frozen",
    "without gradient",
    "gradient zero",
    "moved without a gradient",
    "changed, no gradient seen",
    "its tokens are not in the batches",
    "not given to an optimizer",
    "learning rate 0",
    "undone after an update",
    "unchanged",
]
_OPEN: frozenset[Fate] = frozenset({"gradient zero", "moved without a gradient"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterStatus:
    """One embedding or norm, with the fate of each of its parameters, by name."""

    name: str
    fates: Mapping[str, Fate]
    tokens: tuple[int, int] | None = None
    """Number of tokens that train and of all tokens; None if the whole vocabulary trains."""

    @property
    def updated(self) -> bool:
        """Whether all parameters were updated."""
        return all(fate == "updated" for fate in self.fates.values())

    @property
    def open(self) -> bool:
        """Whether a further step may be conclusive: one factor's gradient is zero while the other factor is zero."""
        return not _OPEN.isdisjoint(self.fates.values())


TrainedModule: TypeAlias = tuple[list[Tensor], tuple[int, int] | None]
"""The parameters that train in place of one embedding or norm, and its ``ParameterStatus.tokens``."""


def embedding_modules(tree: ModelTree) -> dict[str, TrainedModule]:
    """Parameters that train for the input and output embeddings, by module name; tied embeddings appear once."""
    names = ("get_input_embeddings", "get_output_embeddings")
    found: set[int] = set()
    for module, name in ((module, name) for _, module in tree.modules for name in names if hasattr(type(module), name)):
        with suppress(NotImplementedError, AttributeError):  # a model without embeddings
            found.add(id(getattr(module, name)()))
    return _places(tree, lambda module: id(module) in found)


def norm_modules(tree: ModelTree) -> dict[str, TrainedModule]:
    """Parameters that train for every norm with parameters, by module name.

    A norm is recognised by "norm" in the name of its class or a base class. An output head that normalises its weight
    also has such a name, but is a linear layer.
    """

    def is_norm(module: nn.Module) -> bool:
        named = any("norm" in one.__name__.lower() for one in type(module).__mro__)
        return named and bool(module._parameters) and not isinstance(module, nn.Linear)

    return _places(tree, is_norm)


def parameter_statuses(places: Mapping[str, TrainedModule], observation: Observation) -> list[ParameterStatus]:
    """Fates of the given parameters, as ``embedding_modules`` or ``norm_modules`` return them."""
    names = {id(value): name for name, value in observation.tree.parameters}
    rates: dict[int, float] = {}
    for optimizer in observation.optimizers:
        rate = max(optimizer.learning_rates, default=0.0)
        rates |= {key: max(rate, rates.get(key, 0.0)) for key in optimizer.parameters}
    rare = token_parameters(observation.tree)

    def fate(value: Tensor) -> Fate:
        name = names.get(id(value), "")
        return _fate(name, observation, rates.get(id(value)), rare) if value.requires_grad else "frozen"

    return [
        ParameterStatus(name=name, fates={names.get(id(value), "?"): fate(value) for value in values}, tokens=tokens)
        for name, (values, tokens) in places.items()
    ]


def _fate(name: str, observation: Observation, rate: float | None, rare: Set[str]) -> Fate:
    """The fate of a parameter that requires gradients."""
    gradient, changed, known = (
        observation.gradients.get(name),
        name in observation.changed,
        observation.updates.get(name),
    )
    is_zero = gradient is None or not gradient.nonzero
    fates: list[tuple[bool, Fate]] = [
        (gradient is None, "changed, no gradient seen" if changed else "without gradient"),
        (is_zero and name in rare, "its tokens are not in the batches"),
        (is_zero, "moved without a gradient" if changed else "gradient zero"),
    ]
    if known is not None and known.updates and known.unreadable is None:
        without_gradient: Fate = "moved without a gradient" if known.moved else "gradient zero"
        fates += [
            (known.is_reverted, "undone after an update"),
            (known.rate > 0 and not known.updates_with_gradient, without_gradient),
            (known.learnt > 0 or known.rounded_away > 0, "updated"),
            (known.ineffective > 0, "unchanged"),
        ]
    fates += [(changed, "updated"), (rate is None, "not given to an optimizer"), (rate == 0, "learning rate 0")]
    return next((fate for applies, fate in fates if applies), "unchanged")


def _places(tree: ModelTree, is_one: Callable[[nn.Module], bool]) -> dict[str, TrainedModule]:
    """Parameters of the selected modules, each once, by module name."""
    layers = {layer.name: layer for layer in adapter_layers(tree)}
    places_of: dict[str, tuple[list[AdapterLayer], nn.Module]] = {}
    for name, module in tree.modules:
        if is_one(module) and not is_in_adapter(tree, name):
            place, acting = _find_acting_layers(name, layers)
            places_of.setdefault(place, (acting, module))
    # The layer to which an output is added may itself hold the weights of another place.
    bases = (layer.base for acting, _ in places_of.values() for layer in acting if isinstance(layer.base, nn.Module))
    known = {id(value) for base in bases for value in base.parameters()}
    places: dict[str, TrainedModule] = {}
    for name, (acting, module) in places_of.items():
        weights = [value for layer in acting for _, value in layer.weights()]
        values = weights if acting else list(module.parameters(False))
        fresh = {id(value): value for value in values if id(value) not in known}
        known.update(fresh)
        if fresh:
            places[name] = list(fresh.values()), _tokens(acting)
    return places


def _find_acting_layers(name: str, layers: Mapping[str, AdapterLayer]) -> tuple[str, list[AdapterLayer]]:
    """The module name, and the adapter layers that act on it: one around the module, else those inside."""
    wrappers = (name, name.removesuffix(".original_module"), name.removesuffix(".base_layer"))
    around = next((one for one in wrappers if one in layers), None)
    if around is not None:
        return around, [layers[around]]
    return name, [layer for inside, layer in layers.items() if inside.startswith(f"{name}.")]


def _tokens(acting: list[AdapterLayer]) -> tuple[int, int] | None:
    """The number of tokens that train and of all tokens, if only some train."""
    for layer in acting:
        indices: Any = getattr(layer.module, "token_indices", None)
        weight = getattr(layer.base, "weight", None)
        if isinstance(indices, dict) and isinstance(weight, Tensor):
            return len({index for name in layer.held for index in indices.get(name, ())}), weight.shape[0]
    return None
