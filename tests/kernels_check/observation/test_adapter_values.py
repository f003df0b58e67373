"""What an update made of a value, and whether that was undone, by every comparison that decides it."""

import math

import pytest
import torch
from torch import nn

from kernels_check.observation.adapter_values import KeptValue

EPS = torch.finfo(torch.float32).eps


def parameter(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def write(value, *values):
    value.tensor.data.copy_(torch.tensor(values))


def updated(*before, to):
    value = KeptValue(parameter(*before))
    write(value, *to)
    assert value.settle()
    return value


def test_a_write_before_any_update_undoes_none():
    """Such as weights that are loaded before the first step."""
    value = KeptValue(parameter(1.0, 2.0))
    write(value, 0.0, 0.0)
    assert value.written() == (True, False)
    assert value.written() == (False, False)


def test_a_write_of_the_same_value_is_one():
    """Autograd counts it; nothing is written where nothing was touched."""
    value = KeptValue(parameter(1.0))
    assert value.written() == (False, False)
    with torch.no_grad():
        value.tensor.mul_(1.0)
    assert value.written() == (True, False)
    assert value.written() == (False, False)


@pytest.mark.parametrize(
    ("left", "undone"),
    [
        ((0.0, 0.0), True),
        ((5.0, 5.0), True),
        ((1.0, 0.9), False),
        ((1.0, -9.0), False),
        ((0.5, 0.5), False),
    ],
)
def test_a_write_undoes_an_update_that_goes_as_far_and_over_most_of_it(left, undone):
    """One that leaves half of what had moved, or moves everything by less, projects."""
    value = updated(0.0, 0.0, to=(1.0, 1.0))
    write(value, *left)
    assert value.written() == (True, undone)


def test_an_update_beyond_all_bounds_is_undone_by_the_state_before():
    """As far as infinity and back."""
    value = updated(0.0, to=(math.inf,))
    write(value, 0.0)
    assert value.written() == (True, True)


@pytest.mark.parametrize(("rate", "faint"), [(EPS / 2, True), (EPS, False), (1.0, False)])
def test_an_update_is_faint_below_what_the_dtype_can_show(rate, faint):
    """Of the largest element; a parameter without a gradient has no update."""
    value = KeptValue(parameter(1.0, 0.5))
    assert not value.is_faint(rate)
    value.tensor.grad = torch.tensor([1.0, 0.0])
    assert value.is_faint(rate) is faint


def stuck(moved, gradient, dtype=torch.bfloat16):
    count = len(gradient)
    value = KeptValue(nn.Parameter(torch.ones(count, dtype=dtype)))
    value.tensor.data[:moved] = 2.0
    assert value.settle()
    value.tensor.grad = gradient.to(dtype)
    return value.is_stuck()


def test_an_update_is_stuck_that_leaves_nearly_all_in_a_narrow_dtype():
    """More than nine tenths of what had a gradient; float32 shows what it was given."""
    assert stuck(1, torch.ones(20))
    assert not stuck(1, torch.ones(20), torch.float32)
    assert not stuck(1, torch.ones(10))
    assert not stuck(20, torch.ones(20))


def test_only_what_had_a_gradient_can_be_stuck():
    """An embedding of which few rows were read moves in these; of a sparse gradient nothing is said."""
    gradient = torch.zeros(20)
    gradient[:2] = 1.0
    assert not stuck(2, gradient)
    assert not stuck(1, torch.ones(20).to_sparse())
    value = KeptValue(parameter(1.0, 1.0, dtype=torch.bfloat16))
    value.tensor.data[0] = 2.0
    assert value.settle()
    assert not value.is_stuck()
