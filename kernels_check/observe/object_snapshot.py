"""What the Python objects of a training run hold, slot by slot, and writing back the slots that differ.

Containers keep their identity and get their contents back, so that everyone who holds one sees it, and entries that are
as they were are not touched, because compiled code watches some of these dictionaries.

An object of somebody's own class is entered only if all that can be reached from it can be put back. One that holds
an iterator, a lock or a file would come back half, its counter reset and its file not, which is worse than not at all:
such an object stays as the step left it, and only the slot that held it is put back.
"""

from __future__ import annotations

import array
import datetime
import enum
import random
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache, partial
from operator import is_
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Undo = tuple[str, Callable[[], None]]
"""What is put back, in words, and the call that does it; calling it again does no harm."""

TRAINERS: tuple[type, ...] = (nn.Module, Optimizer, LRScheduler, GradScaler)
"""Objects that training changes, whatever else they hold."""
MOST_NODES, MOST_NODES_OF_ALL = 10_000, 200_000
"""An object from which more can be reached is taken for one that cannot be put back, and so is any after so many."""
_PLAIN: frozenset[type] = frozenset({
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type(...), re.Pattern),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    *(type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
})  # fmt: skip
_UNCHANGING = (
    *(enum.Enum, PurePath, type, str, bytes, int, float, complex, Decimal),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo),
)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_BARE: frozenset[type] = frozenset({*_CONTAINERS, OrderedDict, defaultdict, Counter})
"""Containers that hold nothing beside their items; a subclass may."""
_EMPTIED: frozenset[type] = frozenset({dict, OrderedDict, list, set})
_HEAP_TYPE = 1 << 9
"""``Py_TPFLAGS_HEAPTYPE`` of CPython: the class was not written as a static one in C."""


class Kind(enum.Enum):
    """How objects of a class are kept."""

    PLAIN = enum.auto()
    """They never change."""
    FOUND = enum.auto()
    """Somebody else is told."""
    CONTAINER = enum.auto()
    STATEFUL = enum.auto()
    """They hide their state in C, and have a door to it."""
    PYTHON = enum.auto()
    """All that they hold lies in attributes."""
    OPAQUE = enum.auto()


class _Kinds(dict[type, Kind]):
    """Kinds of the classes that were met, each found out once."""

    def __missing__(self, of: type) -> Kind:
        self[of] = kind = _kind(of)
        return kind


class _Columns:
    """Rows kept by column: forty thousand tuples would make the garbage collector walk all of a process."""

    def __init__(self) -> None:
        self._columns: tuple[list[Any], ...] = ()

    def add(self, *row: Any) -> None:
        self._columns = self._columns or tuple([] for _ in row)
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self._columns, strict=True)


class ObjectSnapshot:
    """The slots of what was added, as they were then."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}
        self._dictionaries = _Columns()
        """Those of a thousand modules are the most of all that is kept, and hardly one changes."""
        self._empty = _Columns()
        """Containers that held nothing, such as the dozen places for hooks of every module."""
        self._undos: list[Undo] = []
        self._open: dict[int, Any] = {}
        """Objects that cannot be put back whole."""
        self._whole: dict[int, Any] = {}
        """What was reached from those that can."""
        self._looked_at = 0
        self._kinds = _Kinds()

    def add(self, value: Any, name: str, found: Callable[[Any, str], None]) -> None:
        """Keep what a value holds.

        Args:
            value: anything.
            name: for messages.
            found: is called with every tensor and every one of ``TRAINERS`` on the way, and its name; neither is
                entered here.
        """
        waiting = [(value, name)]
        while waiting:
            self._look(*waiting.pop(), found, waiting)

    def add_names(self, value: dict[Any, Any], name: str) -> None:
        """Keep which object is under which key, and nothing of the objects."""
        if not value:
            self._empty.add(name, value)
        elif id(value) not in self._held:
            self._held[id(value)] = value
            self._dictionaries.add(name, value, dict(value))

    def add_slots(self, value: Any, name: str, found: Callable[[Any, str], None]) -> None:
        """Keep the attributes of an object, whatever they are; those that cannot be entered are kept by reference."""
        waiting: list[tuple[Any, str]] = []
        if id(value) not in self._held:
            self._keep_slots(value, name, waiting)
        while waiting:
            self._look(*waiting.pop(), found, waiting)

    def _look(self, value: Any, name: str, found: Callable[[Any, str], None], waiting: list[tuple[Any, str]]) -> None:
        if id(value) in self._held:
            return
        kind = self._kinds[type(value)]
        if kind is Kind.FOUND:
            found(value, name)
        elif kind is Kind.CONTAINER:
            self._held[id(value)] = value
            if isinstance(value, dict):
                self._dictionaries.add(name, value, dict(value))
            elif (undo := _container(value)) is not None:
                self._undos.append((name, undo))
            kinds, plain = self._kinds, Kind.PLAIN
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if kinds[type(item)] is not plain:
                    waiting.append((item, f"{name}[{_spell(key)}]"))
            if type(value) not in _BARE and hasattr(value, "__dict__"):
                self._keep_slots(value, name, waiting)
        elif kind is Kind.STATEFUL:
            self._held[id(value)] = value
            self._undos.append((name, _stateful(value)))
        elif kind is Kind.PYTHON and id(value) not in self._open and self._closed(value):
            self._keep_slots(value, name, waiting)

    def _keep_slots(self, value: Any, name: str, waiting: list[tuple[Any, str]]) -> None:
        self._held[id(value)] = value
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._held[id(attributes)] = attributes
            self._dictionaries.add(name, attributes, dict(attributes))
            kinds, held, empty, plain, container = self._kinds, self._held, self._empty, Kind.PLAIN, Kind.CONTAINER
            for key, item in attributes.items():
                kind = kinds[type(item)]
                if kind is plain:
                    continue
                if kind is container and not item and type(item) in _EMPTIED:
                    empty.add(name, item)
                elif id(item) not in held:
                    waiting.append((item, f"{name}.{key}"))
        slots = {key: getattr(value, key) for key in slot_names(value) if hasattr(value, key)}
        if slots:
            self._undos.append((name, lambda: _set_slots(value, slots)))
            waiting += [(item, f"{name}.{key}") for key, item in slots.items()]

    def holds(self, value: Any) -> bool:
        """Whether a value is kept."""
        return id(value) in self._held

    def undos(self) -> Iterator[Undo]:
        """How to put back what differs, in any order."""
        for name, empty in self._empty.rows():
            if empty:
                yield name, empty.clear
        for name, value, kept in self._dictionaries.rows():
            if not _same(value, kept):
                yield name, partial(_fill_dictionary, value, kept)
        yield from self._undos

    def _closed(self, value: Any) -> bool:
        """Whether everything that can be reached from an object can be put back."""
        if id(value) in self._whole:
            return True
        seen: dict[int, Any] = {}
        waiting = [value]
        while waiting:
            one = waiting.pop()
            kind = self._kinds[type(one)]
            if kind is Kind.PLAIN or id(one) in seen or id(one) in self._held or id(one) in self._whole:
                continue
            seen[id(one)] = one
            self._looked_at += 1
            if kind in (Kind.FOUND, Kind.STATEFUL):
                continue
            if (
                kind is Kind.OPAQUE
                or id(one) in self._open
                or len(seen) > MOST_NODES
                or self._looked_at > MOST_NODES_OF_ALL
            ):
                break
            if kind is Kind.CONTAINER:
                waiting += one.values() if isinstance(one, dict) else one
            waiting += getattr(one, "__dict__", {}).values()
            waiting += [getattr(one, key) for key in slot_names(one) if hasattr(one, key)]
        else:
            self._whole |= seen
            return True
        self._open[id(value)] = value
        return False


def _spell(key: object) -> str:
    return repr(key) if isinstance(key, (str, int)) else "..."


def _container(value: Any) -> Callable[[], None] | None:
    if isinstance(value, (list, deque)):
        return _sequence(value)
    if isinstance(value, set):
        members = set(value)
        return lambda: None if value == members else _refill(value, value.update, members)
    return None


def _sequence(value: Any) -> Callable[[], None]:
    kept = list(value)

    def undo() -> None:
        if len(value) != len(kept) or any(now is not before for now, before in zip(value, kept, strict=True)):
            _refill(value, value.extend, kept)

    return undo


def _same(value: dict[Any, Any], kept: dict[Any, Any]) -> bool:
    """Whether two dictionaries hold the same objects under the same keys in the same order."""
    return len(value) == len(kept) and all(map(is_, value, kept)) and all(map(is_, value.values(), kept.values()))


def _fill_dictionary(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    if len(value) == len(kept) and all(map(is_, value, kept)):
        for key, item in kept.items():
            if value[key] is not item:
                value[key] = item
    else:
        _refill(value, value.update, kept)


def _refill(value: Any, fill: Callable[[Any], None], kept: Any) -> None:
    value.clear()
    fill(kept)


def _kind(of: type) -> Kind:
    if of in _PLAIN or issubclass(of, _UNCHANGING):
        return Kind.PLAIN
    if issubclass(of, (Tensor, *TRAINERS)):
        return Kind.FOUND
    if issubclass(of, _CONTAINERS):
        return Kind.CONTAINER
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and issubclass(of, (numpy.number, numpy.bool_, numpy.character, numpy.dtype)):
        return Kind.PLAIN
    arrays = () if numpy is None else (numpy.ndarray, numpy.random.Generator, numpy.random.RandomState)
    if issubclass(of, (torch.Generator, random.Random, bytearray, array.array, *arrays)):
        return Kind.STATEFUL
    written_in_python = all(kind.__flags__ & _HEAP_TYPE and not _made_in_c(kind) for kind in of.__mro__[:-1])
    slotted = any("__slots__" in vars(kind) for kind in of.__mro__)
    return Kind.PYTHON if written_in_python and (of.__dictoffset__ or slotted) else Kind.OPAQUE


def _stateful(value: Any) -> Callable[[], None]:
    """How to put back an object that hides its state in C and has a door to it."""
    if isinstance(value, torch.Generator):
        words = value.get_state()
        return lambda: None if torch.equal(value.get_state(), words) else _ignore(value.set_state(words))
    if isinstance(value, random.Random):
        numbers = value.getstate()
        return lambda: value.setstate(numbers)
    if isinstance(value, (bytearray, array.array)):
        items: Any = value[:]
        return lambda: value.__setitem__(slice(None), items)
    if hasattr(value, "bit_generator"):
        state = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", state)
    if hasattr(value, "set_state"):
        legacy = value.get_state()
        return lambda: _ignore(value.set_state(legacy))
    elements = value.copy()
    return lambda: value.__setitem__(..., elements) if value.flags.writeable else None


def _ignore(_: object) -> None:
    return None


def _made_in_c(kind: type) -> bool:
    return isinstance(vars(kind).get("__new__"), types.BuiltinMethodType)


def slot_names(value: Any) -> tuple[str, ...]:
    """Names of the slots that the classes of an object declare, private ones as they are stored."""
    kind: Any = type(value)
    return _slots_of(kind)


@cache
def _slots_of(of: Any) -> tuple[str, ...]:
    names: list[str] = []
    for kind in of.__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{kind.__name__.lstrip('_')}{name}" if private else name)
    return tuple(names)


def _set_slots(value: Any, slots: dict[str, Any]) -> None:
    for name in slot_names(value):
        now = getattr(value, name, slots)
        if name not in slots and now is not slots:
            object.__delattr__(value, name)
        elif name in slots and now is not slots[name]:
            object.__setattr__(value, name, slots[name])
