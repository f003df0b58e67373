"""The walk gives what torch's own gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernels_check.observation.module_tree import every_module, every_parameter, named_modules, named_parameters


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
