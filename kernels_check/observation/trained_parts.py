"""The embeddings and the norms of a model, and which of their parameters the steps have updated.

What stands in a place is what is used there: a copy that PEFT trains in its stead (``modules_to_save``, LN tuning), the
factors of an adapter beside it, else the module's own parameters. An embedding whose weight is also the output's counts
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from kernels_check.observation.adapter_layers import adapter_layers, adapters_of
from kernels_check.observation.module_tree import ModelTree
from kernels_check.observation.optimizers import OptimizerSeen

Fate = Literal["updated", "frozen", "without gradient", "not given to an optimizer", "given a rate of 0", "unchanged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSeen:
    """One embedding or norm, and what became of each of its parameters, by name."""

    name: str
    fates: Mapping[str, Fate]

    @property
    def updated(self) -> bool:
        """Whether all of them were updated."""
        return all(fate == "updated" for fate in self.fates.values())


def embeddings(tree: ModelTree) -> dict[str, list[Tensor]]:
    """The parameters of the input and the output embedding, by the name of the module; tied ones once."""
    found: set[int] = set()
    for _, module in tree.modules:
        for ask in ("get_input_embeddings", "get_output_embeddings"):
            with suppress(Exception):  # a model that has none, or says so by an error
                found.add(id(getattr(module, ask)()))
    return _places(tree, lambda module: id(module) in found)


def norms(tree: ModelTree) -> dict[str, list[Tensor]]:
    """The parameters of every norm that has any, by the name of the module; the name of its class tells a norm."""
    return _places(tree, lambda module: "norm" in type(module).__name__.lower() and bool(module._parameters))


def fates_of(
    places: Mapping[str, list[Tensor]],
    tree: ModelTree,
    *,
    changed: Set[str],
    reached: Set[str],
    optimizers: tuple[OptimizerSeen, ...],
) -> list[PartSeen]:
    """What became of the parameters in some places.

    Args:
        places: as ``embeddings`` or ``norms`` give them.
        tree: the model.
        changed: names of parameters that differ from before the first call.
        reached: names of those that a gradient reached.
        optimizers: that stepped.
    """
    names = {id(value): name for name, value in tree.parameters}
    rates: dict[int, float] = {}
    for optimizer in optimizers:
        rate = max(optimizer.learning_rates, default=0.0)
        rates |= {key: max(rate, rates.get(key, 0.0)) for key in optimizer.parameters}

    def fate(value: Tensor) -> Fate:
        name = names.get(id(value), "")
        if not value.requires_grad:
            return "frozen"
        if name in changed:
            return "updated"
        if name not in reached:
            return "without gradient"
        if id(value) not in rates:
            return "not given to an optimizer"
        return "unchanged" if rates[id(value)] else "given a rate of 0"

    return [
        PartSeen(name=name, fates={names.get(id(value), "?"): fate(value) for value in values})
        for name, values in places.items()
    ]


def _places(tree: ModelTree, is_one: Callable[[nn.Module], bool]) -> dict[str, list[Tensor]]:
    """Parameters of the modules in question, each once, by the name of the place."""
    layers = {layer.name: layer for layer in adapter_layers(tree)}
    own = adapters_of(tree)
    seen: set[int] = set()
    places: dict[str, list[Tensor]] = {}
    for name, module in tree.modules:
        if own[name] or not is_one(module):
            continue
        place = next((one for one in _around(name) if one in layers), name)
        values = [value for _, value in layers[place].weights()] if place in layers else list(module.parameters(False))
        fresh = [value for value in values if id(value) not in seen]
        seen.update(map(id, values))
        if fresh and place not in places:
            places[place] = fresh
    return places


def _around(name: str) -> Iterator[str]:
    """The module itself, and what holds it as the one that it stands for."""
    yield name
    holder, _, attribute = name.rpartition(".")
    if attribute in ("original_module", "base_layer"):
        yield holder
