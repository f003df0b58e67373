"""What a module is to an adapter, asked of its class and of what it holds."""

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kernels_check.observation.adapter_kinds import active_in, holders_in, in_use, layers_at
from kernels_check.observation.adapter_layers import adapter_layers, adapter_parameters

SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def instrument():
    """Nothing is watched."""
    return "profile"


def model_of(config):
    torch.manual_seed(0)
    return peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config)


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)


class Own(nn.Module):
    """A class of one's own, with what it holds beside a layer."""

    def __init__(self, **held):
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        for name, one in held.items():
            setattr(self, name, one)


class Halving(nn.Module):
    """A dropout of a method's own."""

    p = 0.5


class Power(nn.Module):
    """What has a number of the same name, and is trained."""

    p = 2.0

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def test_a_layer_without_factors_is_no_adapters():
    """Whatever else it holds begins like a part of LoRA and stays the base's."""
    bare = Own(lora_scale=nn.Parameter(torch.ones(1)))
    assert list(holders_in(bare)) == []
    assert list(layers_at("bare", bare)) == []
    own = Own(lora_A=nn.Linear(4, 2), lora_scale=nn.Parameter(torch.ones(1)))
    assert set(holders_in(own)) == {"lora_A", "lora_scale"}
    assert [layer.name for layer in layers_at("own", own)] == ["own"]


def test_factors_that_wrap_no_layer_are_no_adapters():
    """A base layer is a module: a matrix of that name, or none, makes no place at which an adapter acts."""
    alone = nn.Module()
    alone.lora_A = nn.Linear(4, 2)
    assert list(holders_in(alone)) == []
    alone.base_layer = nn.Parameter(torch.ones(4, 4))
    assert list(holders_in(alone)) == []
    assert list(layers_at("alone", alone)) == []


def test_dropouts_are_what_drops_and_trains_nothing():
    """Those of torch, one that is off, and those of a method's own; an activation, or a part with weights, is none."""
    held = {"lora_A": nn.Linear(4, 2), "lora_drop": nn.Dropout(0.1), "lora_off": nn.Identity(), "lora_half": Halving()}
    own = Own(**held, lora_relu=nn.ReLU(), lora_power=Power(), lora_scale=nn.Parameter(torch.ones(1)))
    (layer,) = layers_at("own", own)
    assert {name for name, _ in layer.dropouts()} == {"own.lora_drop", "own.lora_off", "own.lora_half"}


def test_a_frozen_factor_is_still_one_that_the_method_trains():
    """Only where a method trains a part of what it lists does the flag tell which."""
    own = Own(lora_A=nn.Linear(4, 2, bias=False), lora_B=nn.Linear(2, 4, bias=False))
    own.lora_A.requires_grad_(False)
    (layer,) = layers_at("own", own)
    assert [name for name, _ in layer.weights()] == ["own.lora_A.weight", "own.lora_B.weight"]


def test_what_has_no_name_is_active_with_any_other():
    """And rests where every adapter does."""
    own = Own()
    assert active_in(own, ("",)) == ("",)
    for active, held, found in (
        ([], ("",), ()),
        (["one"], ("", "one"), ("one", "")),
        (["one"], ("one", "two"), ("one",)),
        ("one", ("one",), ("one",)),
    ):
        own.active_adapters = active
        assert active_in(own, held) == found


def test_the_tuner_says_which_adapter_is_in_use_where_layers_disagree():
    """A layer in which another one was left active is a fault, and that one is not what trains."""
    model = model_of(lora())
    model.add_adapter("other", lora())
    layers = adapter_layers(model)
    assert in_use(model, layers) == {"default"}
    layers[0].module.set_adapter("other")
    found = [place for name, module in model.named_modules() for place in layers_at(name, module)]
    assert in_use(model, found) == {"default"}


def test_an_encoder_of_a_prompt_is_the_adapters_and_its_only_place():
    """A model without one has none."""
    model = model_of(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert list(holders_in(model)) == ["prompt_encoder"]
    assert [(layer.name, layer.trains) for layer in adapter_layers(model)] == [("", ("prompt_encoder",))]
    assert adapter_parameters(model) == {"prompt_encoder.default.embedding.weight"}
    assert list(layers_at("", model_of(lora()))) == []
    assert list(holders_in(nn.Linear(2, 2))) == []


def test_adaption_prompts_that_are_shelved_are_found_disabled():
    """The method takes them out of the model; they are its adapter all the same."""
    model = model_of(peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"))
    assert [layer.disabled for layer in adapter_layers(model)] == [False, False]
    with model.disable_adapter():
        assert [layer.disabled for layer in adapter_layers(model)] == [True, True]


def test_what_a_tuner_holds_itself_is_the_adapters():
    """Factors that layers share, or a router; but neither the model, nor a tuner in which that lies, nor nothing."""
    model = model_of(peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert {"vera_A", "vera_B"} <= set(holders_in(model.base_model))
    assert "model" not in holders_in(model.base_model)
    tuner = LoraModel.__new__(LoraModel)
    nn.Module.__init__(tuner)
    tuner.lora_model, tuner.router, tuner.scale = model.base_model, nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    tuner.register_module("nothing", None)
    assert set(holders_in(tuner)) == {"router", "scale", "nothing"}
