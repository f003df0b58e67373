"""Attributes the attention and the matrix products of a step to the layers of the model that called them.

Attention layers are found from the step: a module that ran an attention implementation is an attention layer, and so
are modules in the same position of other blocks, or of the same class. Every call of these must have run a known
implementation. A block of another kind (a recurrent or convolutional layer of a hybrid, a feed-forward layer in a flat
sequence) is recognised by the model's configuration, its library, or the operators that it ran; otherwise it is
unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from kernels_check.observe.adapter import adapter_attributes, adapter_roles
from kernels_check.observe.calls import Calls
from kernels_check.observe.modules import (
    ModelTree,
    block_names,
    cache_in_tree,
    find_enclosing,
    modules_by_name,
    outermost,
)
from kernels_check.observe.operators import AttentionCall, Product
from kernels_check.observe.profile import StepProfile

_ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid")
_LIBRARY = "transformers."
_ADAPTERS = "peft."
"""Modules of this library compute adapters; attention over a learned prompt in them is not the model's own."""
_HEADS = ("num_heads", "num_attention_heads", "attention_heads", "n_heads", "n_head", "heads")
"""Attribute names for the number of heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayers:
    """The attention of a model over the calls that count (``Calls.relevant``)."""

    forward: Mapping[str, tuple[AttentionCall, ...]]
    """Calls of known implementations in the forward pass, including recomputed ones, by layer name."""
    unknown: Mapping[str, int]
    """Calls of layers in which no known implementation ran, by layer name."""
    doubtful: bool = False
    """Whether none of these is known to be attention: each may be a block of another kind."""
    compiled: tuple[AttentionCall, ...]
    """Calls in the forward pass in code compiled for many layers at once: the layer is unknown."""
    elsewhere: tuple[AttentionCall, ...]
    """Calls in the forward pass outside the model: in another model, in a copy, in a user-defined function."""
    without_training: tuple[AttentionCall, ...]
    """Calls of the model that train nothing: for a reference, an evaluation or a generation inside the step."""
    partial: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Layers in which known implementations ran for some heads only: their features and all features, by layer name."""
    unused: tuple[str, ...] = ()
    """Layers that train, and through whose attention no gradient came back: its result was dropped."""
    failed: tuple[AttentionCall, ...] = ()
    """Calls of the model that raised, and calls inside them."""
    expected: int | None = None
    """Number of attention layers in the configuration, for compiled code."""
    entries: tuple[int, ...] = ()
    """Number of first calls of an implementation in each call of a compiled module."""
    regions: tuple[int, ...] = ()
    """The same by compiled region, for code outside all module calls of the model."""

    @property
    def calls(self) -> list[AttentionCall]:
        """All calls of known implementations that belong to the model."""
        return [*(call for calls in self.forward.values() for call in calls), *self.compiled]

    @property
    def names(self) -> list[str]:
        """The layers that are known by name."""
        return [*self.forward, *(name for name in self.unknown if name not in self.forward)]


def attention_layers(
    tree: ModelTree,
    calls: Calls,
    profile: StepProfile,
) -> AttentionLayers:
    """Attribute the attention of one step.

    Args:
        tree: the model.
        calls: calls of its modules.
        profile: operators of the step.
    """
    forward = [call for call in profile.attention if call.direction == "forward"]
    inside = [call for call in forward if call.call is not None and call.call in calls.relevant]
    modules, blocks = modules_by_name(tree), _announced_blocks(tree)
    compiled = [call for call in forward if call.compiled and (call.call is None or call in inside)]
    compiled = [call for call in compiled if call.call is None or _holds(calls.all[call.call].name, blocks)]
    ran: dict[str, list[AttentionCall]] = {}
    for call in inside:
        name = calls.all[call.call or 0].name
        if call not in compiled and not _computes_adapter(name, tree):
            ran.setdefault(name, []).append(call)
    missing = _AttentionSearch(tree, calls, ran, profile.mixing, blocks).missing() if ran else {}
    certain = {name: count for name, (count, is_sure) in missing.items() if is_sure}
    reduced = calls.around(profile.reductions)
    uncertain = {name: count for name, (count, _) in missing.items() if not reduced.isdisjoint(calls.called(name))}
    found = uncertain | certain
    unknown = {name: found[name] for name in outermost(found)}
    return AttentionLayers(
        forward={name: tuple(found) for name, found in ran.items()},
        unknown=unknown,
        doubtful=bool(unknown) and certain.keys().isdisjoint(unknown),
        partial={name: part for name, found in ran.items() if (part := _part(modules[name], found))},
        unused=tuple(name for name, found in ran.items() if _is_unused(found, tree, calls, profile)),
        compiled=tuple(compiled),
        elsewhere=tuple(call for call in forward if call.call is None and not call.compiled),
        without_training=tuple(
            call for call in forward if call.call is not None and call.call not in calls.relevant | calls.failed
        ),
        failed=tuple(call for call in forward if call.call in calls.failed),
        expected=_announced_layers(tree) if compiled else None,
        entries=_entries(calls, compiled),
        regions=tuple(Counter(call.region for call in compiled if call.call is None and not call.recomputed).values()),
    )


def _computes_adapter(name: str, tree: ModelTree) -> bool:
    """Whether a module computes an adapter, such as the gate of X-LoRA."""
    gated = ((place, module) for place, module in tree.modules if "gate" in adapter_roles(module))
    own = type(modules_by_name(tree)[name]).__module__.startswith(_ADAPTERS)
    return own or find_enclosing(name, adapter_attributes(gated)) is not None


def _is_unused(found: Sequence[AttentionCall], tree: ModelTree, calls: Calls, profile: StepProfile) -> bool:
    """Whether a layer trains and no gradient came back through its attention.

    It trains if a gradient came back to what it computed before the attention, or to its block where its own inputs
    take a gradient. Only torch's fused operators are judged: others need not have a backward operator of their own.
    """
    backward = [one.node for one in profile.attention if one.direction == "backward"]
    names, expected = block_names(tree), False
    for one in found:
        call = calls.all[one.call or 0]
        is_fused = one.op.startswith("aten::_scaled") and one.backend != "math"
        if not is_fused or any(node in call.nodes for node in backward):
            return False
        around = (calls.all[number] for number in calls.enclosing(one.call))
        block = next((outer for outer in around if not names.keys().isdisjoint(outer.names)), call)
        expected |= profile.reached(range(call.nodes.start, one.node))
        expected |= call.takes_gradient and profile.reached(block.nodes)
    return expected


def _part(module: nn.Module, found: Sequence[AttentionCall]) -> tuple[int, int] | None:
    """The features that attention returned in a call of a layer, and the features taken next, if those are more.

    The next weight layer may take more features than attention returns, for example also those of the feed-forward
    layer, so nothing is missing if the number of heads agrees with the layer's attribute.
    """
    judged = [one for one in found if not one.recomputed and not one.compiled]
    config = getattr(module, "config", None)
    claimed = {getattr(module, name, None) for name in _HEADS} | {getattr(config, "num_attention_heads", None)}
    for number in dict.fromkeys(one.call for one in judged):
        calls = [one for one in judged if one.call == number]
        widths, taken = [one.width for one in calls if one.width is not None], calls[-1].taken
        heads = sum(one.heads or 0 for one in calls)
        if len(widths) == len(calls) and taken is not None and sum(widths) < taken and heads not in claimed:
            return sum(widths), taken
    return None


def _announced_blocks(tree: ModelTree) -> str | None:
    """Name of the largest module list whose length is the number of layers in the configuration."""
    count = getattr(_text_config(tree), "num_hidden_layers", None)
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in tree.modules
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == count
    }
    return max(lists, key=lambda name: lists[name], default=None)


def _holds(name: str, blocks: str | None) -> bool:
    """Whether a module holds all the blocks; unless they are known, this is the model itself."""
    return not name or (blocks is not None and f"{blocks}.".startswith(f"{name}."))


def _entries(calls: Calls, compiled: Sequence[AttentionCall]) -> tuple[int, ...]:
    first = Counter(call.call for call in compiled if call.call is not None and not call.recomputed)
    entered = {name for number in first for name in calls.all[number].names}
    return tuple(first[number] for number in sorted({number for name in entered for number in calls.called(name)}))


def _announced_layers(tree: ModelTree) -> int | None:
    """Number of softmax-attention layers in the model's configuration; None if it has none."""
    kinds = _announced_kinds(tree)
    count = getattr(_text_config(tree), "num_hidden_layers", None)
    if kinds:
        return sum(kind in _ATTENTION_KINDS for kind in kinds)
    return count if isinstance(count, int) else None


@cache_in_tree
def _text_config(tree: ModelTree) -> Any:
    config: Any = next((part.config for _, part in tree.modules if getattr(part, "config", None) is not None), None)
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


def _announced_kinds(tree: ModelTree) -> list[str]:
    """The kind of each layer in the model's configuration; empty if it has none."""
    listed = (getattr(_text_config(tree), name, None) for name in ("layer_types", "layers_block_type"))
    of_names = (one for one in listed if isinstance(one, list | tuple) and all(isinstance(kind, str) for kind in one))
    return list(next(of_names, ()))


class _AttentionSearch:
    """Finds calls in which attention should have run but no known implementation did.

    Args:
        tree: the model.
        calls: calls of its modules.
        ran: calls of known implementations by the name of the layer; at least one.
        mixing: numbers of the module calls with the operators of eager attention.
        announced: name of the list of blocks in the configuration.
    """

    def __init__(
        self,
        tree: ModelTree,
        calls: Calls,
        ran: Mapping[str, Sequence[AttentionCall]],
        mixing: Collection[int],
        announced: str | None,
    ) -> None:
        self._modules, self._kinds = modules_by_name(tree), _announced_kinds(tree)
        self._calls, self._layers, self._announced = calls, ran.keys(), announced
        self._covered = calls.around(call.call for found in ran.values() for call in found)
        self._mixed = calls.around(mixing)
        self._like: dict[str, list[str]] = {}
        """Names of modules by their pattern."""
        for name in self._modules:
            self._like.setdefault(_pattern(name), []).append(name)

    def missing(self) -> dict[str, tuple[int, bool]]:
        """Number of such calls by layer name, and whether the layer is certainly attention."""
        is_sure: dict[str, bool] = {}
        for name, sure in self._candidates():
            is_sure[name] = sure or is_sure.get(name, False)
        counts = {name: sum(one not in self._covered for one in self._calls.called(name)) for name in is_sure}
        return {name: (count, is_sure[name]) for name, count in counts.items() if count}

    def _candidates(self) -> Iterator[tuple[str, bool]]:
        """Modules in which attention should have run, and whether that is certain; else only if they mix tokens."""
        yield from ((layer, True) for layer in self._layers)
        slots = {_pattern(layer) for layer in self._layers}
        kinds = {self._kind(layer) for layer in self._layers if layer}
        for pattern, names in self._like.items():
            siblings = [self._kind(name) for name in names if name in self._layers]
            for name in names:
                same = self._kind(name) in kinds
                if name in self._layers or not (same or pattern in slots) or self._is_of_another_kind(name, siblings):
                    continue
                in_sequence = not same and name.rpartition(".")[2].isdigit()
                yield name, not in_sequence or self._mixes_tokens(name)
        yield from self._find_configured_blocks()
        for block, inside in self._blocks():
            for name in self._like[_pattern(block)]:
                if name != block and self._may_have_to_attend(name, block, inside):
                    passes_by = self._kind(name) is self._kind(block) and f"{name}.{inside}" in self._modules
                    yield name, passes_by or self._mixes_tokens(name)

    def _find_configured_blocks(self) -> Iterator[tuple[str, bool]]:
        """Blocks in the configuration, if attention ran outside all of them.

        It then ran in a head, or in the tower of another modality. But if a model holds the parts of its blocks in
        separate lists, as XLM does, these may be the other part.
        """
        if not self._announced or any(layer.startswith(f"{self._announced}.") for layer in self._layers):
            return
        parent, _, own = self._announced.rpartition(".")
        blocks = self._modules[self._announced]._modules
        parts = [
            f"{parent}.{key}.".lstrip(".")
            for key, module in self._modules[parent].named_children()
            if key != own and isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == len(blocks)
        ]
        parted = any(layer.startswith(tuple(parts)) for layer in self._layers)
        for name in (f"{self._announced}.{key}" for key in blocks):
            if not self._is_of_another_kind(name, []):
                yield name, not parted or self._mixes_tokens(name)

    def _blocks(self) -> Iterator[tuple[str, str]]:
        """Each numbered block around a layer, and the layer's path inside it; one of each pattern."""
        split = (
            (".".join(parts[:index]), ".".join(parts[index:]))
            for parts in (layer.split(".") for layer in sorted(self._layers))
            for index, part in enumerate(parts[:-1], start=1)
            if part.isdigit()
        )
        found: dict[tuple[str, str], tuple[str, str]] = {}
        for block, inside in split:
            found.setdefault((_pattern(block), _pattern(inside)), (block, inside))
        yield from found.values()

    def _may_have_to_attend(self, name: str, block: str, inside: str) -> bool:
        """Whether a block in the same list as a block with attention may also have needed attention."""
        attends = any(layer.startswith(f"{name}.") for layer in self._layers)
        ran = self._calls.ran(f"{name}.{inside}")  # the module that ran instead of attention is judged separately
        return not attends and not ran and not self._is_of_another_kind(name, [self._kind(block)])

    def _is_of_another_kind(self, name: str, siblings: Sequence[type]) -> bool:
        """Whether the configuration or the library shows that this is not attention."""
        parts = name.split(".")
        for place, part in enumerate(parts):
            holder = self._modules.get(".".join(parts[:place]))
            if part.isdigit() and int(part) < len(self._kinds) == len(getattr(holder, "_modules", ())):
                return self._kinds[int(part)] not in _ATTENTION_KINDS
        kind = self._kind(name)
        return (
            bool(siblings)
            and kind not in siblings
            and kind.__module__.startswith(_LIBRARY)
            and all(other.__module__ == kind.__module__ for other in siblings)
        )

    def _kind(self, name: str) -> type[nn.Module]:
        return type(self._modules[name])

    def _mixes_tokens(self, name: str) -> bool:
        """Whether a block ran the operators of eager attention."""
        return not self._mixed.isdisjoint(self._calls.called(name))


@cache
def _pattern(name: str) -> str:
    """A name without its numbers, equal for the same position in other blocks."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProducts:
    """Products of the forward pass, including recomputed ones, by the layer that called them."""

    by_layer: Mapping[str, tuple[Product, ...]]
    compiled: tuple[Product, ...]
    """Products inside compiled code: the layer is unknown."""
    without: tuple[str, ...] = ()
    """Layers with a call without a product."""
    bypassed: tuple[str, ...] = ()
    """Layers that were not called although their parents were, and their counterparts in other blocks were."""

    @property
    def names(self) -> list[str]:
        """All layers known by name."""
        return list(dict.fromkeys([*self.by_layer, *self.without, *self.bypassed]))

    @property
    def all(self) -> list[Product]:
        """All products that belong to the model."""
        return [*(product for products in self.by_layer.values() for product in products), *self.compiled]

    def dtypes(self, layer: str) -> list[str]:
        """Dtypes in which a layer computed; if it called nothing itself, the common dtype of all compiled code."""
        if layer in self.by_layer:
            return [product.dtype or "unknown" for product in self.by_layer[layer]]
        agreed = {product.dtype or "unknown" for product in self.compiled}
        return [] if layer in self.without or layer in self.bypassed or len(agreed) != 1 else list(agreed)


def match_products(layers: Mapping[str, str], calls: Calls, products: Sequence[Product]) -> LayerProducts:
    """Attribute the products of one step.

    Args:
        layers: by layer name, the module whose calls count for the layer.
        calls: calls of the model's modules.
        products: all products of the step.
    """
    within: dict[int, list[Product]] = {}
    for product in products:
        for number in calls.enclosing(product.call):  # by_name below omits irrelevant calls
            within.setdefault(number, []).append(product)
    numbers = {layer: calls.by_name.get(module, []) for layer, module in layers.items()}
    by_layer = {
        layer: tuple(product for number in own for product in within.get(number, ())) for layer, own in numbers.items()
    }
    like = {_pattern(layer) for layer, own in numbers.items() if own}
    return LayerProducts(
        by_layer={layer: found for layer, found in by_layer.items() if found},
        compiled=tuple(product for product in products if product.call is None and product.compiled),
        without=tuple(
            layer
            for layer, own in numbers.items()
            if any(number not in within and not calls.all[number].in_backward for number in own)
        ),
        bypassed=tuple(
            layer
            for layer, own in numbers.items()
            if not own and _pattern(layer) in like and calls.ran(layer.rpartition(".")[0])
        ),
    )


def fourbit_layers(tree: ModelTree) -> dict[str, str]:
    """Linear layers of the model whose own weight is 4-bit, each with itself as in ``match_products``."""
    return {
        name: name
        for name, module in tree.modules
        if isinstance(module, nn.Linear) and type(module._parameters.get("weight")).__name__ == "Params4bit"
    }
