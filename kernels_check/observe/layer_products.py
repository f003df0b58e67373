"""Which layers of the base called which products: attributed by the call of a module, never by counting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kernels_check.observe.calls import Calls
from kernels_check.observe.module_tree import Model, named_modules
from kernels_check.observe.products import Product


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProducts:
    """Products of the forward pass, recomputed ones included, by the layer that called them."""

    by_layer: Mapping[str, tuple[Product, ...]]
    compiled: tuple[Product, ...]
    """Those inside compiled code, of which no layer is known."""
    without: tuple[str, ...] = ()
    """Layers of which some call had no product."""
    passed_by: tuple[str, ...] = ()
    """Layers that were not called where what holds them was, and their like in other blocks were."""

    @property
    def names(self) -> list[str]:
        """All layers that are known by name."""
        return list(dict.fromkeys([*self.by_layer, *self.without, *self.passed_by]))

    @property
    def all(self) -> list[Product]:
        """Every product that is the model's."""
        return [*(product for products in self.by_layer.values() for product in products), *self.compiled]

    def dtypes(self, layer: str) -> list[str]:
        """In which a layer computed; where it called nothing itself, what all compiled code agrees on."""
        if layer in self.by_layer:
            return [product.dtype or "unknown" for product in self.by_layer[layer]]
        agreed = {product.dtype or "unknown" for product in self.compiled}
        return [] if layer in self.without or layer in self.passed_by or len(agreed) != 1 else list(agreed)


def products_of(
    layers: Mapping[str, Sequence[str]],
    model: nn.Module,
    calls: Calls,
    products: Iterable[Product],
) -> LayerProducts:
    """Attribute the products of one step.

    Args:
        layers: by name of the layer, the modules whose calls are its own.
        model: the model.
        calls: of its modules.
        products: all of the step.
    """
    products = list(products)
    within: dict[int, list[Product]] = {}
    for product in products:
        for number in calls.enclosing(product.call):  # what is not relevant is nobody's below: by_name leaves it out
            within.setdefault(number, []).append(product)
    by_layer: dict[str, tuple[Product, ...]] = {}
    without, idle = [], []
    for layer, modules in layers.items():
        numbers = [number for module in modules for number in calls.by_name.get(module, ())]
        if numbers:
            by_layer[layer] = tuple(product for number in numbers for product in within.get(number, ()))
            if any(number not in within and not calls.all[number].in_backward for number in numbers):
                without.append(layer)
        else:
            idle.append(layer)
    like = {_pattern(layer) for layer in by_layer}
    return LayerProducts(
        by_layer={layer: found for layer, found in by_layer.items() if found},
        compiled=tuple(product for product in products if product.call is None and product.compiled),
        without=tuple(without),
        passed_by=tuple(layer for layer in idle if _pattern(layer) in like and calls.ran(layer.rpartition(".")[0])),
    )


def fourbit_layers(model: Model) -> dict[str, tuple[str, ...]]:
    """Linear layers of the model whose own weight is a 4-bit one, each by its name."""
    return {
        name: (name,)
        for name, module in named_modules(model)
        if isinstance(module, nn.Linear) and type(module._parameters.get("weight")).__name__ == "Params4bit"
    }


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
