"""The embeddings and the norms of a model, and which of their parameters the steps have updated.

What stands in a place is what is used there: a copy that PEFT trains in its stead (``modules_to_save``, LN tuning), the
factors of an adapter beside it, the tokens that it trains alone, else the module's own parameters. An embedding whose
weight is also the output's counts once.

A value that differs is no proof of training: weight decay moves what has a gradient of zero. So each needs a gradient,
and of an adapter's parameters what its updates have made of them is known (``adapter_updates``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from kernels_check.observe.adapter_kinds import AdapterLayer
from kernels_check.observe.adapter_layers import adapter_layers, adapters_of, token_parameters
from kernels_check.observe.adapter_updates import ParameterUpdates
from kernels_check.observe.gradients import GradientSeen
from kernels_check.observe.module_tree import ModelTree, every_parameter
from kernels_check.observe.optimizers import OptimizerSeen

Fate = Literal[
    "updated",
    "frozen",
    "without gradient",
    "gradient zero",
    "moved without a gradient",
    "changed, no gradient seen",
    "none of its tokens in the batches",
    "not given to an optimizer",
    "given a rate of 0",
    "undone after an update",
    "unchanged",
]
_OPEN: frozenset[Fate] = frozenset({"gradient zero", "moved without a gradient"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterStatus:
    """One embedding or norm, and what became of each of its parameters, by name."""

    name: str
    fates: Mapping[str, Fate]
    tokens: tuple[int, int] | None = None
    """How many tokens train alone, of how many; None where the whole vocabulary does."""

    @property
    def updated(self) -> bool:
        """Whether all of them were updated."""
        return all(fate == "updated" for fate in self.fates.values())

    @property
    def open(self) -> bool:
        """Whether a further step may show more: a gradient is zero as long as the factor beside is."""
        return not _OPEN.isdisjoint(self.fates.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModule:
    """What stands for one embedding or norm."""

    values: list[Tensor]
    tokens: tuple[int, int] | None = None
    """As in ``ParameterStatus``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSeen:
    """What the steps have shown of parameters, by name."""

    changed: Set[str]
    """Those that differ from before the first call."""
    gradients: Mapping[str, GradientSeen]
    """Those that a gradient reached."""
    updates: Mapping[str, ParameterUpdates]
    """Those of an adapter."""
    optimizers: tuple[OptimizerSeen, ...]
    """All that stepped."""


def embeddings(tree: ModelTree) -> dict[str, TrainedModule]:
    """What stands for the input and the output embedding, by the name of the module; tied ones once."""
    found: set[int] = set()
    for _, module in tree.modules:
        for ask in ("get_input_embeddings", "get_output_embeddings"):
            with suppress(Exception):  # a model that has none, or says so by an error
                found.add(id(getattr(module, ask)()))
    return _places(tree, lambda module: id(module) in found)


def norms(tree: ModelTree) -> dict[str, TrainedModule]:
    """What stands for every norm that has parameters, by the name of the module.

    The names of its classes tell a norm: those of a library or of one's own build on one that is called so. A head that
    normalises its weight first is called so, too, and is a linear layer.
    """
    return _places(
        tree,
        lambda module: bool(module._parameters) and not isinstance(module, nn.Linear) and _is_norm(type(module)),
    )


def fates_of(places: Mapping[str, TrainedModule], tree: ModelTree, evidence: TrainingSeen) -> list[ParameterStatus]:
    """What became of the parameters in some places.

    Args:
        places: as ``embeddings`` or ``norms`` give them.
        tree: the model.
        evidence: what the steps have shown of them.
    """
    names = {id(value): name for name, value in tree.parameters}
    rates: dict[int, float] = {}
    for optimizer in evidence.optimizers:
        rate = max(optimizer.learning_rates, default=0.0)
        rates |= {key: max(rate, rates.get(key, 0.0)) for key in optimizer.parameters}
    rare = token_parameters(tree)

    def fate(value: Tensor) -> Fate:
        name = names.get(id(value), "")
        if not value.requires_grad:
            return "frozen"
        ungiven = _without_gradient(name, evidence, rare)
        return ungiven or _updated(name, evidence, rates.get(id(value)))

    return [
        ParameterStatus(
            name=name, fates={names.get(id(value), "?"): fate(value) for value in place.values}, tokens=place.tokens
        )
        for name, place in places.items()
    ]


def _without_gradient(name: str, evidence: TrainingSeen, rare: Set[str]) -> Fate | None:
    """What became of a parameter that no gradient reached, or only ones of zero; None of any other."""
    gradient = evidence.gradients.get(name)
    if gradient is None:
        return "changed, no gradient seen" if name in evidence.changed else "without gradient"
    if gradient.nonzero:
        return None
    if name in rare:
        return "none of its tokens in the batches"
    return "moved without a gradient" if name in evidence.changed else "gradient zero"


def _updated(name: str, evidence: TrainingSeen, rate: float | None) -> Fate:
    """What became of a parameter that a gradient reached."""
    known = evidence.updates.get(name)
    if known is not None and known.updates and known.unreadable is None:
        if known.lost:
            return "undone after an update"
        if known.rate and not known.fed:
            return "moved without a gradient" if known.moved else "gradient zero"
        if known.learnt or known.faint:
            return "updated"
        if known.stuck:
            return "unchanged"
    if name in evidence.changed:
        return "updated"
    if rate is None:
        return "not given to an optimizer"
    return "unchanged" if rate else "given a rate of 0"


def _is_norm(kind: type) -> bool:
    return any("norm" in one.__name__.lower() for one in kind.__mro__)


def _places(tree: ModelTree, is_one: Callable[[nn.Module], bool]) -> dict[str, TrainedModule]:
    """Parameters of the modules in question, each once, by the name of the place."""
    layers = {layer.name: layer for layer in adapter_layers(tree)}
    own = adapters_of(tree)
    standing: dict[str, tuple[list[AdapterLayer], nn.Module]] = {}
    for name, module in tree.modules:
        if not own[name] and is_one(module):
            place, acting = _acting(name, layers)
            standing.setdefault(place, (acting, module))
    seen = {id(value) for acting, _ in standing.values() for layer in acting for value in _beside(layer)}
    places: dict[str, TrainedModule] = {}
    for name, (acting, module) in standing.items():
        weights = [value for layer in acting for _, value in layer.weights()]
        values = weights if acting else list(module.parameters(False))
        fresh = {id(value): value for value in values if id(value) not in seen}
        seen.update(fresh)
        if fresh:
            places[name] = TrainedModule(values=list(fresh.values()), tokens=_tokens(acting))
    return places


def _acting(name: str, layers: Mapping[str, AdapterLayer]) -> tuple[str, list[AdapterLayer]]:
    """The name of a place, and the layers of an adapter that act there: one around the module, else those inside."""
    around = next((one for one in _around(name) if one in layers), None)
    if around is not None:
        return around, [layers[around]]
    return name, [layer for inside, layer in layers.items() if inside.startswith(f"{name}.")]


def _around(name: str) -> Iterator[str]:
    """The module itself, and what holds it as the one that it stands for."""
    yield name
    holder, _, attribute = name.rpartition(".")
    if attribute in ("original_module", "base_layer"):
        yield holder


def _beside(layer: AdapterLayer) -> Iterator[Tensor]:
    """The weights that the layer adds to, which may be those of another place, too."""
    if isinstance(layer.base, nn.Module):
        yield from every_parameter(layer.base)


def _tokens(acting: list[AdapterLayer]) -> tuple[int, int] | None:
    """How many tokens train, of how many, where only some do."""
    for layer in acting:
        indices: Any = getattr(layer.module, "token_indices", None)
        weight = getattr(layer.base, "weight", None)
        if isinstance(indices, dict) and isinstance(weight, Tensor):
            return len({index for name in layer.held for index in indices.get(name, ())}), weight.shape[0]
    return None
