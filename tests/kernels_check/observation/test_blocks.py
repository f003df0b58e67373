"""The blocks of a model are the members of its numbered lists, or its layers of weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from kernels_check.observation.blocks import block_names, block_of, lists_inside


class Block(nn.Module):
    """Two layers of weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)


def model(**parts):
    whole = nn.Module()
    for name, part in parts.items():
        whole.add_module(name, part)
    return whole


def blocks(count):
    return nn.ModuleList(Block() for _ in range(count))


@pytest.mark.parametrize(
    ("built", "names"),
    [
        (model(embed=nn.Embedding(2, 2), layers=blocks(2), head=nn.Linear(2, 2)), ("layers.0", "layers.1")),
        (model(vision=model(layers=blocks(1)), text=model(h=blocks(1))), ("vision.layers.0", "text.h.0")),
        (model(layers=blocks(1), projector=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), ("layers.0",)),
        (
            model(layers=nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), head=nn.Linear(2, 2)),
            ("layers.0", "layers.1"),
        ),
        (nn.Sequential(Block(), Block()), ("0", "1")),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), ("0", "1")),
        (nn.Linear(2, 2), ("",)),
        (model(a=nn.Linear(2, 2), b=nn.ReLU()), ("a",)),
        (nn.Sequential(model(layers=blocks(2)), nn.Linear(2, 2)), ("0.layers.0", "0.layers.1")),
        (model(stages=nn.ModuleList(model(layers=blocks(2)) for _ in range(2))), ("stages.0", "stages.1")),
        (nn.ReLU(), ()),
        (model(layers=nn.ModuleList([Block(), nn.Identity(), Block()])), ("layers.0", "layers.2")),
    ],
)
def test_blocks_are_found(built, names):
    """Outermost lists first; a projector, a head and what has no parameters are none."""
    assert block_names(built) == names


def test_a_compiled_block_is_of_the_kind_of_the_others():
    """Its wrapper makes no other list of it."""
    layers = nn.Sequential(Block(), torch.compile(Block()))
    assert block_names(model(layers=layers)) == ("layers.0", "layers.1")


def test_an_adapter_makes_no_block_of_a_layer():
    """A linear layer with an adapter is a single layer of weights, as it was."""
    adapted = get_peft_model(
        model(layers=blocks(2), mlp=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))),
        LoraConfig(target_modules=["mlp.0", "first"]),
    )
    assert block_names(adapted) == ("base_model.model.layers.0", "base_model.model.layers.1")
    single = get_peft_model(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), LoraConfig(target_modules=["0"])
    )
    assert block_names(single) == ("base_model.model.0", "base_model.model.2")


def test_a_module_lies_in_the_block_whose_name_begins_its_own():
    """By whole parts of the name."""
    named = frozenset({"layers.1"})
    assert block_of("layers.1.first", named) == block_of("layers.1", named) == "layers.1"
    assert block_of("layers.10.first", named) is block_of("head", named) is None
    assert block_of("first", frozenset({""})) == ""


def test_the_lists_inside_a_block():
    """Such as the experts of a mixture; two single layers are none."""
    built = model(layers=nn.ModuleList([model(experts=blocks(2), pair=nn.ModuleList([nn.Linear(2, 2)] * 2))]))
    assert lists_inside(built, "layers.0") == [("layers.0.experts.0", "layers.0.experts.1")]
