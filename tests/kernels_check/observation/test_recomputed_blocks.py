"""A block is computed again where each call of it that a gradient comes back to is."""

import pytest
from torch import nn

from kernels_check.observation.calls import Calls, ModuleCall
from kernels_check.observation.recomputed_blocks import ran_without_gradient, recomputed_blocks

ZERO, ONE = "layers.0", "layers.1"


class Expert(nn.Module):
    """One of several in a block."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(2, 2)


class Block(nn.Module):
    """A layer of weights and experts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.experts = nn.ModuleList(Expert() for _ in range(3))


class Stack(nn.Module):
    """Two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(2, 2)


def calls(*made, again=(), without=()):
    """Calls by name and caller, and names of those of the backward pass; ``without``: no gradient comes to them."""
    entry = {"training": True, "with_grad": True, "thread": 0}
    every = [ModuleCall(names=(name,), caller=caller, in_backward=False, **entry) for name, caller in made]
    differentiable = frozenset(range(len(every))) - set(without)
    every += [ModuleCall(names=(name,), caller=None, in_backward=True, **entry) for name in again]
    return Calls(all=tuple(every), thread=0, differentiable=differentiable)


def told(logged, block=ZERO):
    (found,) = [one for one in recomputed_blocks(Stack(), logged) if one.name == block]
    return found.calls, found.again, found.modules, found.repeated, found.split, found.whole


TWICE = [("", None), (ZERO, 0), (f"{ZERO}.first", 1), (ZERO, 0), (f"{ZERO}.first", 3), ("head", 0)]


@pytest.mark.parametrize(
    ("again", "found"),
    [
        ([], (2, 0, 1, 0, (), False)),
        ([ZERO, f"{ZERO}.first"], (2, 1, 1, 0, (), False)),
        ([f"{ZERO}.first"] * 2, (2, 2, 1, 1, (), True)),
        ([f"{ZERO}.first"] * 3, (2, 2, 1, 1, (), True)),
        ([ZERO] * 2, (2, 2, 1, 0, (), True)),
        (["head"] * 2, (2, 0, 1, 0, (), False)),
        ([f"{ONE}.first"] * 2, (2, 0, 1, 0, (), False)),
    ],
)
def test_each_call_has_to_be_matched(again, found):
    """By the module in the block that was computed again most; the head is none of a block."""
    assert told(calls(*TWICE, again=again)) == found


def test_a_call_that_no_gradient_comes_back_to_needs_nothing():
    """What ran before the first adapter keeps nothing; a block of which no call needs it is not judged."""
    assert told(calls(*TWICE, without=(1,), again=[ZERO]))[:2] == (1, 1)
    logged = calls(*TWICE, (ONE, 0), without=(1, 3))
    judged = recomputed_blocks(Stack(), logged)
    assert [one.name for one in judged] == [ONE]
    assert ran_without_gradient(Stack(), logged, judged) == (ZERO,)
    assert ran_without_gradient(Stack(), calls(("", None)), ()) == ()


def test_a_block_that_calls_no_hook_is_told_by_its_modules():
    """Each call of the busiest stands for one of the block."""
    logged = calls(("", None), (f"{ZERO}.first", 0), (f"{ZERO}.first", 0), (f"{ZERO}.experts.0.up", 0))
    assert told(logged) == (2, 0, 2, 0, (), False)


def test_a_module_that_a_block_calls_twice_is_matched_by_both():
    """One of two is half of the block's call, which is none."""
    within = [(f"{ZERO}.first", 1)] * 2
    logged = [("", None), (ZERO, 0), *within]
    assert told(calls(*logged, again=[f"{ZERO}.first"]))[:2] == (1, 0)
    assert told(calls(*logged, again=[f"{ZERO}.first"] * 2))[:2] == (1, 1)


EXPERTS = [("", None), (ZERO, 0), (f"{ZERO}.first", 1), (f"{ZERO}.experts.0.up", 1), (f"{ZERO}.experts.1.up", 1)]


@pytest.mark.parametrize(
    ("again", "split"),
    [
        ([], ()),
        ([f"{ZERO}.first"], ()),
        ([f"{ZERO}.experts.0.up"], (f"{ZERO}.experts.1",)),
        ([f"{ZERO}.experts.0.up", f"{ZERO}.experts.1.up"], ()),
    ],
)
def test_experts_that_were_left_out_are_named(again, split):
    """Where others of their list were computed again; one that did not run at all is not missed."""
    found = told(calls(*EXPERTS, again=again))
    assert found[4] == split
    assert found[5] is (bool(again) and not split)
