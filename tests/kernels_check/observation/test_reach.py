"""What a step can get hold of is found, and the search ends."""

import functools
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernels_check.observation.reach import MOST_LOOKED_AT, reach

GLOBAL = nn.Linear(1, 1)


def _uses_global():
    return GLOBAL


def _calls_another():
    return [_uses_global() for _ in range(1)]


@dataclass(slots=True)
class Trainer:
    """Somebody's trainer."""

    model: Any
    rest: Any = None

    def step(self):
        return self.model

    def __call__(self):
        return self.model


def _found(step):
    return [value for _, value in reach(step)]


def test_variables_objects_arguments_and_globals_are_followed():
    """A closure, a method, an object that is called, a partial, a generator, a global of the step's own module."""
    model = nn.Linear(1, 1)
    running = (model for _ in range(3))
    next(running)

    def take(one=None):
        return one

    steps = [lambda: model, Trainer(model).step, Trainer(model), functools.partial(take, model), running.__next__]
    assert all(model in _found(step) for step in steps)
    assert GLOBAL in _found(_uses_global)
    assert GLOBAL in _found(_calls_another)


def test_all_that_trains_is_found_under_its_name():
    """Optimizers, schedulers, generators and loose tensors, in containers and behind other objects."""
    weight = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    held = {"schedule": [schedule], "draws": (random.Random(1), torch.Generator())}
    found = dict(reach(Trainer(None, held).step))
    assert found["step.rest['schedule'][0]"] is schedule
    assert found["step.rest['schedule'][0].optimizer"] is optimizer
    assert {"step.rest['draws'][0]", "step.rest['draws'][1]"} <= found.keys()
    assert any(value is weight for value in _found(lambda: weight))


def test_a_data_set_ends_the_search():
    """Only so many objects are looked at, whatever the step holds."""
    data = [[{"row": [row]} for row in range(400)] for _ in range(400)]
    assert _found(lambda: data) == []
    assert MOST_LOOKED_AT < 400 * 400


def test_a_variable_that_is_not_bound_yet_is_no_error():
    """A step may be handed over before all it names exists."""

    def step():
        return later

    assert _found(step) == []
    later = 1


class Private:
    """A trainer whose model is nobody else's business."""

    __slots__ = ("__model",)

    def __init__(self, model):
        self.__model = model

    def step(self):
        return self.__model


def test_a_private_slot_is_followed():
    """By the name under which it is stored."""
    model = nn.Linear(1, 1)
    assert any(value is model for _, value in reach(Private(model).step))
