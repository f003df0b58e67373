"""The modules and parameters of a model with their names, in the order and with the names that torch gives them.

``nn.Module.named_modules`` hands every module up through one generator for each level above it; a walk with a stack of
its own takes a tenth. A check asks for them some fifty times, and for what of them is an adapter's: at a moment when
nothing else runs, such as before the first call and after the last, they are read once for all who ask (``ModelTree``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeAlias, TypeVar

from torch import nn

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTree:
    """A model as it is at one moment, and what has been read of it then.

    Whoever keeps one sees to it that nothing runs meanwhile that adds a module, or switches an adapter.
    """

    model: nn.Module
    modules: tuple[tuple[str, nn.Module], ...]
    parameters: tuple[tuple[str, nn.Parameter], ...]
    readings: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """By the name of the function, see ``reading``."""

    @classmethod
    def of(cls, model: Model) -> ModelTree:
        """Read a model; one that has been read stays as it was."""
        if isinstance(model, ModelTree):
            return model
        modules = tuple(named_modules(model))
        return cls(model=model, modules=modules, parameters=tuple(_parameters(modules)))


Model: TypeAlias = nn.Module | ModelTree


def reading(read: Callable[[ModelTree], _T]) -> Callable[[Model], _T]:
    """What is read of a model, and of a tree only once."""

    @wraps(read)
    def kept(model: Model) -> _T:
        tree = ModelTree.of(model)
        if read.__qualname__ not in tree.readings:
            tree.readings[read.__qualname__] = read(tree)
        found: _T = tree.readings[read.__qualname__]
        return found

    return kept


def attribute(module: nn.Module, name: str) -> Any:
    """An attribute, None where there is none; torch words an exception for each module that has none."""
    kind: Any = type(module)
    if kind.__getattr__ is not nn.Module.__getattr__ or hasattr(kind, name):
        return getattr(module, name, None)
    for held in (vars(module), module._parameters, module._buffers, module._modules):
        if name in held:
            return held[name]
    return None


def named_modules(model: Model, prefix: str = "", *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name; the model itself is called ``prefix``.

    Args:
        model: of any kind.
        prefix: what each name begins with.
        remove_duplicate: whether each module comes once, by the first of its names, or once by each.
    """
    if isinstance(model, ModelTree):
        if remove_duplicate and not prefix:
            yield from model.modules
            return
        model = model.model
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


def every_module(model: Model) -> Iterator[nn.Module]:
    """Every module once."""
    return (module for _, module in named_modules(model))


def named_parameters(model: Model, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, by the first of its names, which begins with ``prefix``."""
    if isinstance(model, ModelTree) and not prefix:
        return iter(model.parameters)
    return _parameters(named_modules(model, prefix))


def _parameters(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[int] = set()
    for name, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{name}.{key}" if name else key), parameter


def every_parameter(model: Model) -> Iterator[nn.Parameter]:
    """Every parameter once."""
    return (parameter for _, parameter in named_parameters(model))
