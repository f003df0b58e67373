"""The repeated blocks of a model: the units in which it is compiled, and recomputed for the backward pass.

A transformer keeps its layers in a numbered list. What is in such a list and is more than one layer of weights is a
block; lists inside a block (the experts of a mixture, the parts of a layer) are its own affair. A model without such a
list is taken apart into the layers of weights that it has.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from kernels_check.observe.module_tree import named_modules


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the blocks, in the order in which the model holds them."""
    lists = [items for items in _lists(model, "") if _of_blocks(items)] or list(_lists(model, ""))
    named = {id(item): name for items in reversed(lists) for name, item in reversed(items)}
    if not named:
        named = {id(module): name for name, module in named_modules(model) if _own_parameters(module)}
        inside = tuple(f"{name}." if name else "" for name in named.values())
        return tuple(name for name in named.values() if not any(name != one and name.startswith(one) for one in inside))
    return tuple(reversed(named.values()))


def block_of(name: str, blocks: frozenset[str]) -> str | None:
    """The block that a module of this name is or lies in."""
    while name not in blocks:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _lists(module: nn.Module, name: str) -> Iterator[list[tuple[str, nn.Module]]]:
    """The outermost lists of blocks."""
    items = _items(module, name)
    if items:
        yield items
        return
    for key, child in module.named_children():
        yield from _lists(child, _path(name, key))


def _of_blocks(items: list[tuple[str, nn.Module]]) -> bool:
    return any(not _is_leaf(item) for _, item in items)


def _items(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """What a list holds that has parameters; empty where it is no list of blocks.

    A sequence whose members are all of different kinds is a model taken apart, not a list of its blocks.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    items = [
        (_path(name, key), child)
        for key, child in module.named_children()
        if any(True for _ in child.parameters()) and key.isdigit()
    ]
    kinds = [_kind(child) for _, child in items]
    repeats = isinstance(module, nn.ModuleList) or len(set(kinds)) < len(kinds)
    return items if repeats else []


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of a block below what wraps it alone: a compiled, parallel or recomputing wrapper."""
    while True:
        children = list(module.children())
        if len(children) != 1 or module._parameters:
            return type(module)
        module = children[0]


def _is_leaf(module: nn.Module) -> bool:
    """Whether it is a single layer of weights; an adapter makes it no more than that."""
    return not module._modules or hasattr(module, "base_layer")


def _own_parameters(module: nn.Module) -> bool:
    return bool(module._parameters) or hasattr(module, "base_layer")
