"""Python objects get their contents back and keep their identity; what cannot come back whole is left alone."""

import random
import threading
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal

import numpy as np
import pytest
import torch

from kernels_check.observation.picture import Picture


@dataclass
class Record:
    """An object whose whole state is plain."""

    count: int = 0
    items: list = field(default_factory=list)


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("__secret", "count")

    def __init__(self):
        self.count = 0
        self.__secret = 0

    def change(self):
        del self.count
        self.__secret = 1

    def told(self):
        return self.count, self.__secret


def _restored(value, change):
    picture = Picture()
    picture.add(value, "it", lambda *_: None)
    change(value)
    for _, undo in picture.undos():
        undo()
    return value


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1, [2], {"a": [3]}], lambda x: (x[1].append(5), x[2]["a"].clear(), x.pop(0))),
        ({"a": 1, "b": 2}, lambda x: (x.pop("a"), x.update(c=1))),
        (OrderedDict(a=1, b=2), lambda x: x.move_to_end("a")),
        (defaultdict(list, a=[1]), lambda x: x["b"].append(1)),
        (deque([1, 2], maxlen=2), lambda x: x.append(3)),
        ({1, 2}, lambda x: x.add(3)),
        (bytearray(b"ab"), lambda x: x.extend(b"c")),
        (np.arange(3), lambda x: x.__setitem__(0, 9)),
        ([Record(1, [1])], lambda x: (x[0].items.append(2), setattr(x[0], "count", 2), setattr(x[0], "new", 1))),
        (([1],), lambda x: x[0].append(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_contents_come_back(value, change):
    """Whatever was added, removed, replaced or put in another order, at any depth."""
    before = repr(value)
    assert repr(_restored(value, change)) == before


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (random.Random(1), lambda x: x.random()),
        (np.random.default_rng(1), lambda x: float(x.random())),
        (np.random.RandomState(1), lambda x: float(x.random())),
        (torch.Generator().manual_seed(1), lambda x: float(torch.rand((), generator=x))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_generators_draw_the_same_again(generator, draw):
    """A generator of any of the four libraries."""
    drawn = []
    _restored(generator, lambda x: drawn.append(draw(x)))
    assert draw(generator) == drawn[0]


def test_slots_come_back():
    """Attributes without a dictionary, private ones and deleted ones included."""
    value = Slotted()
    assert _restored(value, Slotted.change).told() == (0, 0)


def test_an_object_that_holds_a_lock_is_left_whole():
    """Half of it would be worse than none, so its counter stays as well."""
    value = Record()
    value.lock = threading.Lock()
    assert _restored(value, lambda x: setattr(x, "count", 3)).count == 3


def test_what_is_as_it_was_is_not_written_to():
    """Compiled code watches dictionaries, and a write alone would have it compiled again."""
    picture = Picture()
    picture.add([{"a": 1}, {}], "it", lambda *_: None)
    assert not list(picture.undos())[1:]  # the list itself is compared when its turn comes


def test_a_chain_longer_than_the_stack_is_followed():
    """Objects that hold objects, a few thousand deep, and back to the first."""
    first = last = Record()
    for _ in range(3000):
        last.next = last = Record()
    last.next = first
    _restored(first, lambda _: setattr(last, "count", 1))
    assert last.count == 0


UNCHANGING = (np.float32(1), np.int64(1), np.bool_(True), np.dtype("int8"), timedelta(1), date(2000, 1, 1), Decimal(1))


@pytest.mark.parametrize("beside", UNCHANGING, ids=lambda value: type(value).__name__)
def test_an_object_that_holds_what_never_changes_comes_back(beside):
    """A mean that is NumPy's and no float, or a time, leaves no object half."""
    record = Record(items=[beside])
    _restored(record, lambda it: setattr(it, "count", 1))
    assert (record.count, record.items) == (0, [beside])
