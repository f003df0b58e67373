"""What a step can get hold of: models, optimizers and generators that its closure, object and module name.

A step says nothing of what it changes, but it has to hold it. So the variables it closes over, the object it is a
method of, and the global names in its code are followed, through containers and plain objects. What is not found here
is found when it announces itself, as an optimizer does before its update, or not at all.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.object_snapshot import TRAINERS, slot_names

MOST_LOOKED_AT = 5_000
"""Objects; what trains lies near the step, and a data set would go on for ever."""
_MOST_ITEMS = 500
_LEAVES = (str, bytes, int, float, complex, type, types.ModuleType, types.BuiltinFunctionType, type(None))


def reach(step: Any) -> Iterator[tuple[str, Any]]:
    """Name and object of everything near ``step`` that training may change, nearest first.

    Models, optimizers, learning-rate schedulers, gradient scalers, random generators, and tensors that train.
    """
    home = getattr(_function(step), "__globals__", None)
    seen: dict[int, Any] = {}
    waiting = deque([("step", step)])
    while waiting and len(seen) < MOST_LOOKED_AT:
        name, value = waiting.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if value.is_leaf and value.requires_grad:
                yield name, value
            continue
        if isinstance(value, TRAINERS) or _draws(value):
            yield name, value
        waiting += _held(name, value, home)


def _draws(value: Any) -> bool:
    numpy = sys.modules.get("numpy.random")
    kinds = () if numpy is None else (numpy.Generator, numpy.RandomState)
    return isinstance(value, (torch.Generator, random.Random, *kinds))


def _function(step: Any) -> Any:
    while isinstance(step, functools.partial):
        step = step.func
    return getattr(step, "__func__", step)


def _held(name: str, value: Any, home: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.FunctionType):
        yield from _names(name, value, home)
    elif isinstance(value, types.MethodType):
        yield name, value.__self__
        yield name, value.__func__
    elif isinstance(value, functools.partial):
        yield from ((name, one) for one in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.GeneratorType):
        yield from ((key, one) for key, one in (value.gi_frame.f_locals if value.gi_frame else {}).items())
    elif isinstance(value, types.MethodWrapperType):
        yield name, value.__self__
    elif isinstance(value, dict):
        yield from ((f"{name}[{key!r}]" if isinstance(key, str) else name, one) for key, one in _first(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((f"{name}[{place}]", one) for place, one in enumerate(_first(value)))
    else:
        skipped = _covered(value)
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            yield from ((f"{name}.{key}", one) for key, one in _first(attributes.items()) if key not in skipped)
        yield from ((f"{name}.{key}", getattr(value, key)) for key in slot_names(value) if hasattr(value, key))


def _covered(value: Any) -> frozenset[str]:
    """Attributes that are followed whole with what holds them: children of a model, parameters of an optimizer."""
    if isinstance(value, nn.Module):
        return frozenset(vars(nn.Module()))
    return frozenset({"state", "param_groups"}) if isinstance(value, torch.optim.Optimizer) else frozenset()


def _first(items: Any) -> list[Any]:
    return list(islice(items, _MOST_ITEMS))


def _names(name: str, function: types.FunctionType, home: Any) -> Iterator[tuple[str, Any]]:
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield key, cell.cell_contents
        except ValueError:  # the variable is not bound yet
            continue
    yield from ((name, one) for one in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))
    if function.__globals__ is home:
        for key in _global_names(function.__code__):
            if key in function.__globals__:
                yield key, function.__globals__[key]


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
