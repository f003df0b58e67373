"""The modules and parameters of a model with their names, in the order and with the names that torch gives them.

``nn.Module.named_modules`` hands every module up through one generator for each level above it. A check walks a model
some fifty times, which took longer than the step that it watched; a walk with a stack of its own takes a tenth.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def named_modules(
    model: nn.Module, prefix: str = "", *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name; the model itself is called ``prefix``.

    Args:
        model: of any kind.
        prefix: what each name begins with.
        remove_duplicate: whether each module comes once, by the first of its names, or once by each.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [(prefix, model)]
    while waiting:
        name, module = waiting.pop()
        if remove_duplicate:
            if id(module) in seen:
                continue
            seen.add(id(module))
        yield name, module
        if module._modules:
            path = f"{name}." if name else ""
            children = reversed(module._modules.items())
            waiting += [(path + key, child) for key, child in children if child is not None]


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once."""
    return (module for _, module in named_modules(model))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, by the first of its names."""
    seen: set[int] = set()
    for name, module in named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{name}.{key}" if name else key), parameter


def every_parameter(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter once."""
    return (parameter for _, parameter in named_parameters(model))
