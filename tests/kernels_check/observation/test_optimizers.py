"""What an optimizer holds is counted by its tensors, each once."""

import torch
from torch import nn

from kernels_check.observation.optimizers import describe, rate_of


def test_memory_counts_as_paged_where_it_is():
    """Whatever the optimizer says of itself; a map that many states share counts once."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight])
    paged, plain = torch.zeros(8), torch.zeros(2)
    paged.is_paged = True
    plain.is_paged = "no"
    optimizer.state[weight] = {"first": paged, "map": plain, "step": 3}
    optimizer.state["other"] = {"map": plain}
    seen = describe(optimizer)
    assert (seen.state_bytes, seen.paged_bytes, seen.claims_paged, seen.on_cpu) == (40, 32, False, True)


def test_a_parameter_elsewhere_is_not_on_the_cpu():
    """One is enough."""
    parameters = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="meta"))]
    assert not describe(torch.optim.SGD(parameters)).on_cpu


def test_a_rate_that_nobody_says_counts_as_one():
    """As of an optimizer that finds it by itself."""
    assert (rate_of({"lr": -0.5}), rate_of({}), rate_of({"lr": None})) == (0.5, 1.0, 1.0)
