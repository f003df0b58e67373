"""Whether a block ran in compiled code is told by what called hooks, and by where regions were entered."""

import pytest
from torch import nn
from torch.nn import Parameter

from kernels_check.observation.calls import Calls, ModuleCall
from kernels_check.observation.compiled_blocks import CompiledBlocks, compiled_blocks

ZERO, ONE = "layers.0", "layers.1"
GRADIENTS = (f"{ZERO}.first.weight", f"{ONE}.first.weight")


class Scale(nn.Module):
    """Weights of its own, and a part that has none."""

    def __init__(self):
        super().__init__()
        self.weight, self.act = Parameter(nn.Linear(2, 2).weight.detach()), nn.ReLU()


class Block(nn.Module):
    """A layer of weights, and one that calls another module."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(2, 2), Scale()


class Stack(nn.Module):
    """Two blocks, and others that are called beside them."""

    def __init__(self, *, trains=True):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.vision = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(2, 2)
        self.layers.requires_grad_(trains)


def calls(*made):
    """Calls by name and the number of the caller; with a third word, one of a reference."""
    entry = {"training": True, "in_backward": False, "thread": 0}
    every = [ModuleCall(names=(name,), caller=at, with_grad=not words, **entry) for name, at, *words in made]
    return Calls(all=tuple(every), thread=0)


def sort(logged, *regions, eager=(), gradients=(), trains=True):
    return compiled_blocks(Stack(trains=trains), logged, regions, eager, gradients)


def test_a_region_of_a_reference_is_none_of_the_step():
    """It records no gradients, where another entry does; a region outside of all calls is of the step."""
    logged = calls(("", None), (ZERO, 0), ("", None, "reference"), (ONE, 2, "reference"))
    assert sort(logged, 1, 3) == CompiledBlocks(compiled=(ZERO,), regions=1)
    assert sort(logged, None).helpers == 1


@pytest.mark.parametrize(("eager", "partly"), [((), ()), ((1,), (ZERO,)), ((2,), (ZERO,)), ((4,), (ZERO,)), ((5,), ())])
def test_a_block_is_compiled_in_part_where_anything_in_it_ran_outside(eager, partly):
    """Products or attention in any of its calls; what calls others computes by them; an activation has no weights."""
    logged = calls(
        ("", None), (ZERO, 0), (f"{ZERO}.first", 1), (f"{ZERO}.scale", 1), (f"{ZERO}.scale.act", 3), (ONE, 0)
    )
    found = sort(logged, 2, eager=eager)
    assert (found.partly, found.compiled, found.eager) == (partly, () if partly else (ZERO,), (ONE,))


def test_a_layer_of_weights_outside_of_the_regions_of_its_block_ran_eagerly():
    """It called its hook, and no region was entered in it."""
    logged = calls(("", None), (ZERO, 0), (f"{ZERO}.first", 1), (f"{ZERO}.scale", 1))
    assert sort(logged, 1).partly == (ZERO,)
    assert sort(logged, 2, 3).compiled == (ZERO,)


@pytest.mark.parametrize(
    ("logged", "regions", "gradients", "compiled"),
    [
        (calls(("", None)), [0], GRADIENTS, (ZERO, ONE)),
        (calls(("", None)), [0], GRADIENTS[1:], (ONE,)),
        (calls(("", None)), [0], ("head.weight",), ()),
        (calls(("", None)), [None], GRADIENTS, ()),
        (calls(("", None), ("head", 0)), [1], GRADIENTS, ()),
        (calls(("", None), (ZERO, 0)), [1], GRADIENTS, (ZERO,)),
        (calls(("", None), ("layers", 0)), [0], GRADIENTS, ()),
        (calls(("", None), ("layers", 0)), [1], GRADIENTS, (ZERO, ONE)),
        (calls(("head", None)), [None], GRADIENTS, (ZERO, ONE)),
        (calls(("head", None)), [0], GRADIENTS, ()),
    ],
)
def test_a_silent_block_is_compiled_where_a_region_was_entered_around_it(logged, regions, gradients, compiled):
    """In the innermost call that it can have come from; that it ran is told by a gradient that reached it."""
    assert sort(logged, *regions, gradients=gradients).compiled == compiled


@pytest.mark.parametrize(
    ("regions", "trains", "compiled"),
    [([0, 1], False, (ZERO, ONE)), ([0, 1], True, (ZERO,)), ([1], False, (ZERO,)), ([0], False, ())],
)
def test_a_frozen_silent_block_goes_with_those_beside_it(regions, trains, compiled):
    """No gradient can show it: a region around it, and its neighbours compiled; blocks of another list say nothing."""
    logged = calls(
        ("", None), (ZERO, 0), ("vision.0", 0), ("vision.0.first", 2), ("vision.1", 0), ("vision.1.first", 4)
    )
    found = sort(logged, *regions, trains=trains)
    assert (found.compiled, "vision.0" in found.eager, ZERO in found.eager) == (compiled, True, ZERO not in compiled)


@pytest.mark.parametrize(
    ("region", "gradients", "ours"),
    [(1, (), 1), (2, (), 1), (3, (), 1), (0, (), 0), (4, (), 0), (None, (), 0), (0, (f"{ONE}.first.weight",), 1)],
)
def test_a_region_is_the_models_where_its_blocks_or_layers_ran(region, gradients, ours):
    """In what holds the blocks it may be a loss, unless a block is proven to have run in compiled code."""
    logged = [("", None), (ZERO, 0), (f"{ZERO}.first", 1), ("head", 0), ("vision", 0), ("vision.0", 0)]
    found = sort(calls(*logged), region, gradients=gradients)
    assert (found.regions, found.helpers) == (ours, 1 - ours)


def test_what_was_not_compiled_whole_is_named():
    """Blocks in part and eager ones; all of them ran."""
    found = CompiledBlocks(compiled=("a",), partly=("b",), eager=("c",))
    assert (found.ran, found.not_whole) == (3, ("b", "c"))
