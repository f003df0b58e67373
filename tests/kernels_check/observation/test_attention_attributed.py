"""Calls of attention are attributed to layers of constructed models, and what should have attended is found."""

from types import SimpleNamespace

import pytest
from torch import nn

from kernels_check.observation.attention_calls import AttentionCall
from kernels_check.observation.attention_layers import attention_layers
from kernels_check.observation.calls import Calls, ModuleCall


class Attention(nn.Module):
    """What attends, or does not."""

    def __init__(self, **held):
        super().__init__()
        for name, one in held.items():
            setattr(self, name, one)


class Replaced(nn.Module):
    """Another class in the place of attention."""


class Feed(nn.Module):
    """What attends to nothing."""


class Block(Attention):
    """Holds attention."""


class OtherBlock(Block):
    """Of another kind."""


class Tower(Attention):
    """A model, with or without a configuration."""


def library(name):
    """A class that a library has defined beside others."""
    kind = type(name, (nn.Module,), {})
    kind.__module__ = "transformers.models.hybrid.modeling_hybrid"
    return kind()


def of(*blocks):
    return nn.ModuleList(blocks)


def config(count, *kinds):
    return SimpleNamespace(num_hidden_layers=count, layer_types=list(kinds) or None)


def calls_of(model):
    """One call of each module, from that of the module which holds it; lists are not called."""
    made, numbers = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or type(module) is Skipped:
            continue
        above = name
        caller = None
        while above and caller is None:
            above = above.rpartition(".")[0]
            caller = numbers.get(above)
        numbers[name] = len(made)
        made.append(
            ModuleCall(names=(name,), caller=caller, training=True, with_grad=True, in_backward=False, thread=0)
        )
    return Calls(all=tuple(made), thread=0), numbers


class Skipped(nn.Module):
    """A layer that its block does not call."""


def attending(number, **more):
    told = {"op": "aten::_scaled_dot_product_flash_attention", "backend": "flash", "direction": "forward"}
    return AttentionCall(**told, call=number, **more)


def unknown(model, *attended, mixing=(), asked=lambda names: ()):
    """Of a model in whose layers of these names attention ran; unless told, nothing that is asked mixes tokens."""
    calls, numbers = calls_of(model)
    ours = [attending(numbers[name]) for name in attended]
    found = attention_layers(model, calls, ours, {numbers[name] for name in mixing}, asked)
    assert found.forward.keys() == set(attended)
    return dict(found.unknown)


@pytest.mark.parametrize(
    ("place", "announced", "whole"),
    [
        ("", True, True),
        ("", False, True),
        ("body", True, True),
        ("body", False, False),
        ("body.layers.0", True, False),
        ("body.layers.0.attn", True, False),
        ("heads.0", True, False),
    ],
)
def test_code_that_was_compiled_for_many_layers_is_what_holds_the_announced_list(place, announced, whole):
    """The list of as many blocks as the configuration says, however large another list is; else the whole model."""
    body = Tower(layers=of(Block(attn=Attention()), Block(attn=Attention())))
    model = Tower(body=body, heads=of(*(nn.Linear(64, 64) for _ in range(3))))
    if announced:
        model.config = config(2)
    calls, numbers = calls_of(model)
    found = attention_layers(model, calls, [attending(numbers[place], region=1)])
    assert bool(found.compiled) is whole
    assert set(found.forward) == (set() if whole else {place})
    assert found.expected == (2 if whole and announced else None)


def test_compiled_code_is_counted_by_its_first_calls():
    """What is computed again for the backward pass is no entry."""
    model = Tower(layers=of(Block(), Block()))
    calls, _ = calls_of(model)
    first = [attending(0, region=1), attending(0, region=2)]
    found = attention_layers(model, calls, [*first, attending(0, region=3, recomputed=True)])
    assert found.entries == (2,)
    assert len(found.compiled) == 3


def test_compiled_code_of_an_entry_that_trains_nothing_is_left_aside():
    """Such as an evaluation inside the step."""
    model = Tower(layers=of(Block(), Block()))
    given = {"names": ("",), "caller": None, "training": True, "in_backward": False, "thread": 0}
    calls = Calls(all=tuple(ModuleCall(with_grad=with_grad, **given) for with_grad in (True, False)), thread=0)
    found = attention_layers(model, calls, [attending(0, region=1), attending(1, region=2)])
    assert [call.call for call in found.compiled] == [0]
    assert [call.call for call in found.aside] == [1]


def test_what_stands_in_the_place_of_attention_has_to_attend():
    """Of whatever class, without being asked; so has what is of the class of one that attends, in a flat sequence."""
    model = Tower(layers=of(Block(attn=Attention()), Block(attn=Replaced())))
    assert unknown(model, "layers.0.attn") == {"layers.1.attn": 1}
    assert unknown(of(Attention(), Attention()), "0") == {"1": 1}


def test_another_class_in_a_flat_sequence_has_to_attend_only_if_it_mixes_tokens():
    """As was seen inside it, or as it says when it is asked."""
    model = of(Attention(), Block(feed=Feed()), Attention())
    assert unknown(model, "0", "2") == {}
    assert unknown(model, "0", "2", asked=set) == {"1": 1}
    assert unknown(model, "0", "2", mixing=["1.feed"]) == {"1": 1}
    assert unknown(model, "0", "2", mixing=["2"]) == {}


def test_another_layer_of_the_same_library_is_of_another_kind():
    """A library names what is no attention by its class, where one that attends stands in the same place."""
    model = Tower(layers=of(Block(mixer=library("HybridAttention")), Block(mixer=library("HybridMamba"))))
    assert unknown(model, "layers.0.mixer", asked=set) == {}
    model.layers[0].mixer = Attention()
    assert unknown(model, "layers.0.mixer", asked=set) == {"layers.1.mixer": 1}


def test_blocks_that_are_announced_have_to_attend_where_only_something_beside_them_did():
    """A head with attention hides no block without; one block that attends is judged with its neighbours."""
    model = Tower(layers=of(Feed(), Feed()), head=Attention())
    assert unknown(model, "head", asked=set) == {}
    model.config = config(2)
    assert unknown(model, "head") == {"layers.0": 1, "layers.1": 1}
    model.config = config(2, "linear_attention", "full_attention")
    assert unknown(model, "head") == {"layers.1": 1}
    model = Tower(layers=of(Attention(), Feed()), head=Attention())
    model.config = config(2)
    assert unknown(model, "head", "layers.0") == {}


def test_only_the_list_that_is_announced_is_excused_by_its_kinds():
    """Another with another number of blocks is not; nor does a list that is numbered from one go beyond the kinds."""
    model = Tower(layers=of(Block(), Block()), tower=of(Attention(), Attention(), Attention()))
    model.config = config(2, "full_attention", "linear_attention")
    assert unknown(model, "tower.0", "layers.0") == {"tower.1": 1, "tower.2": 1}
    model = Tower(layers=nn.ModuleDict({"1": Attention(), "2": Attention()}))
    model.config = config(2, "full_attention", "full_attention")
    assert unknown(model, "layers.1") == {"layers.2": 1}


def test_a_block_of_another_kind_that_mixes_nothing_passes_by_what_it_holds():
    """One of the same kind that does not call its attention is found; numbered blocks alone are compared."""
    first, second = (Block(attn=Block(core=core)) for core in (Attention(), Skipped()))
    assert unknown(Tower(layers=of(first, second)), "layers.0.attn.core") == {"layers.1": 1}
    other = OtherBlock(attn=Block(core=Skipped()))
    assert unknown(Tower(layers=of(first, other)), "layers.0.attn.core") == {}
    assert unknown(Tower(layers=of(first, other)), "layers.0.attn.core", asked=set) == {"layers.1": 1}


def test_the_outermost_layer_says_it():
    """What lies inside one that ran no attention ran none either."""
    model = Tower(layers=of(Block(attn=Attention()), Block(attn=Attention(inner=Attention()))))
    assert unknown(model, "layers.0.attn") == {"layers.1.attn": 1}
