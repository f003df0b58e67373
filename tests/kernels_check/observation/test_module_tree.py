"""The walk gives what torch's own gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernels_check.observation.module_tree import (
    ModelTree,
    attribute,
    every_module,
    every_parameter,
    named_modules,
    named_parameters,
    reading,
)


def tree() -> nn.Module:
    """Shared modules and weights, a slot that is empty, and a parameter on the model itself."""
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({
        "first": nn.Sequential(shared, nn.ModuleList([nn.LayerNorm(2), nn.Linear(2, 2, bias=False)])),
        "second": nn.Sequential(nn.Identity(), shared),
        "tied": nn.Linear(2, 2),
    })  # fmt: skip
    model["tied"].weight = shared.weight
    model.register_module("empty", None)
    model.register_parameter("own", nn.Parameter(torch.zeros(1)))
    return model


def same(found, expected):
    found, expected = list(found), list(expected)
    return [name for name, _ in found] == [name for name, _ in expected] and all(
        one is other for (_, one), (_, other) in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("prefix", ["", "base.model"])
@pytest.mark.parametrize("once", [True, False])
def test_modules_come_with_the_names_and_in_the_order_of_torch(prefix, once):
    """Shared modules by their first name or by each, empty slots not at all."""
    model = tree()
    found = named_modules(model, prefix, remove_duplicate=once)
    assert same(found, model.named_modules(prefix=prefix, remove_duplicate=once))
    assert list(every_module(model)) == list(model.modules())


def test_parameters_come_with_the_names_and_in_the_order_of_torch():
    """A tied weight once, by its first name."""
    model = tree()
    assert same(named_parameters(model), model.named_parameters())
    assert [*map(id, every_parameter(model))] == [*map(id, model.parameters())]


def test_modules_of_torchscript_are_walked():
    """They hold what they hold in dictionaries of their own."""
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 1))))
    assert [name for name, _ in named_modules(model)] == [name for name, _ in model.named_modules()]
    assert [name for name, _ in named_parameters(model)] == [name for name, _ in model.named_parameters()]


def test_a_tree_stays_as_the_model_was_when_it_was_read():
    """It gives what the model gave then, and to itself nothing anew."""
    model = tree()
    read = ModelTree.of(model)
    then = list(named_modules(model)), list(named_parameters(model))
    model.late = nn.Linear(2, 2)
    assert (list(named_modules(read)), list(named_parameters(read))) == then
    assert ModelTree.of(read) is read
    assert len(list(named_modules(model))) == len(then[0]) + 1


def test_a_reading_is_taken_of_a_tree_once_and_of_a_model_each_time():
    """What is asked of a model is asked of it as it is now."""
    taken = []

    @reading
    def count(of):
        taken.append(of.model)
        return len(of.modules)

    model = tree()
    read = ModelTree.of(model)
    assert count(read) == count(read) == count(model)
    assert len(taken) == 2
    model.late = nn.Linear(2, 2)
    assert count(model) == count(read) + 1


class _Forwarding(nn.Module):
    """Answers for what it wraps."""

    def __getattr__(self, name):
        return "forwarded" if name == "config" else super().__getattr__(name)


class _Property(nn.Module):
    @property
    def config(self):
        return "computed"


def test_an_attribute_is_what_getattr_gives():
    """Of an instance, a class, a property, a wrapper, and of what torch keeps in dictionaries of its own."""
    held = nn.Module()
    held.config = nn.Linear(1, 1)
    plain = nn.Module()
    plain.config = 3
    buffered = nn.Module()
    buffered.register_buffer("config", None)
    for module in (held, plain, buffered, _Forwarding(), _Property(), nn.Module()):
        assert attribute(module, "config") is getattr(module, "config", None)
