"""Tests that PEFT's layers, not names, decide which parameters belong to the adapter."""

from __future__ import annotations

import dataclasses

import torch

from lorameter.models import catalogue
from lorameter.studies.variant import LoraVariant
from lorameter.trial.building import peft_methods
from lorameter.trial.building.base_model import empty_model, load_base
from lorameter.trial.building.build import base_digest

TINY = catalogue.resolve("tiny-llama")
VARIANT = LoraVariant(name="v", r=4, dtype="float32", target_modules=("q_proj", "v_proj"))


def attached(**changes):
    """Return tiny-llama with an adapter, without weights."""
    variant = dataclasses.replace(VARIANT, **changes)
    with torch.device("meta"):
        return peft_methods.attach(empty_model(TINY, variant), variant), variant


def test_trained_parameters_are_the_adapter_s_own():
    """Parameters have their names in the model; trained biases of the base belong to the base."""
    model, _ = attached(use_dora=True, target_modules=("all-linear",))
    own = peft_methods.own_parameters(model)
    assert {name: id(one) for name, one in own.items()} == {
        name: id(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert len(peft_methods.adapted_layers(model)) == 4 * 7
    model, _ = attached(bias="all")
    assert not [name for name in peft_methods.own_parameters(model) if "bias" in name]


def test_base_weights_with_names_like_pefts_are_still_the_bases():
    """A base module with a name like PEFT's is still the base's: it is not cast and is in the digest."""
    base = load_base(TINY, VARIANT, device="cpu", seed=1)
    base.model.lora_gate = torch.nn.Linear(2, 2)
    variant = dataclasses.replace(VARIANT, adapter_dtype="bfloat16")
    model = peft_methods.attach(base, variant)
    own = peft_methods.own_parameters(model)
    assert not [name for name in own if "lora_gate" in name]
    assert {parameter.dtype for parameter in own.values()} == {torch.bfloat16}
    assert base.model.lora_gate.weight.dtype == torch.float32
    before = base_digest(model)
    with torch.no_grad():
        next(iter(own.values())).add_(1)
    assert base_digest(model) == before
    with torch.no_grad():
        base.model.lora_gate.weight.add_(1)
    assert base_digest(model) != before


def test_parameters_of_all_adapters_count_and_only_the_active_one_trains():
    """Parameters of waiting adapters count as well; only the active adapter trains."""
    model, variant = attached()
    alone = len(peft_methods.own_parameters(model))
    peft_methods.attach_beside(model, variant, "second")
    own = peft_methods.own_parameters(model)
    assert len(own) == 2 * alone
    peft_methods.activate(model, "second")
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {
        name for name in own if ".second." in name
    }


def test_the_same_parameters_train_after_use_without_the_adapter():
    """LoRA-FA keeps one factor frozen, which PEFT would unfreeze."""
    variant = dataclasses.replace(VARIANT, optimizer="lorafa")
    model = peft_methods.attach(load_base(TINY, variant, device="cpu", seed=1), variant)
    peft_methods.make_optimizer(model, variant)
    before = {name for name, one in model.named_parameters() if one.requires_grad}
    assert before
    assert all("lora_B" in name for name in before)
    with peft_methods.without_adapter(model):
        pass
    assert {name for name, one in model.named_parameters() if one.requires_grad} == before
