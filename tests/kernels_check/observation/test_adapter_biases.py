"""Biases of the base belong to the adapter exactly where PEFT trains them for the adapter in use."""

import peft
import pytest
import torch
from torch import nn

from kernels_check import verify
from kernels_check.observation.adapter_biases import biases_of_adapters
from kernels_check.observation.adapter_layers import adapter_parameters, base_parameters


def _base():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))


def _config(bias="none", **options):
    return peft.LoraConfig(r=2, bias=bias, **({"target_modules": ["0", "2"]} | options))


def _made_trainable(model):
    """What PEFT has marked of the base, by name."""
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    return {name for name in names if name.endswith(".bias") and "lora_" not in name and "modules_to_save" not in name}


@pytest.mark.parametrize("more", [{}, {"lora_bias": True}, {"modules_to_save": ["3"]}, {"use_dora": True}])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_they_are_those_that_peft_makes_trainable(bias, more):
    """Biases of a copy that is trained beside the adapter, or of its factors, are the adapter's in any case."""
    model = peft.get_peft_model(_base(), _config(bias, **more))
    assert biases_of_adapters(model).keys() == _made_trainable(model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == adapter_parameters(model)
    assert not any(value.requires_grad for value in base_parameters(model).values())


@pytest.mark.parametrize(
    "config",
    [
        peft.BOFTConfig(boft_block_size=4, target_modules=["0"], bias="boft_only"),
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"], bias="oft_only"),
        peft.HRAConfig(r=2, target_modules=["0"], bias="hra_only"),
        peft.VeraConfig(r=2, target_modules=["0"], bias="all"),
    ],
)
def test_every_method_is_asked_in_its_own_words(config):
    """Each has a value of its own name."""
    model = peft.get_peft_model(_base(), config)
    assert biases_of_adapters(model).keys() == _made_trainable(model)


def test_a_model_in_which_only_layers_were_put_is_asked_as_well():
    """``inject_adapter_in_model`` leaves no tuner."""
    model = peft.inject_adapter_in_model(_config("lora_only"), _base())
    assert biases_of_adapters(model) == dict.fromkeys(("0.base_layer.bias", "2.base_layer.bias"), "bias='lora_only'")


def test_a_model_with_adapters_of_several_methods_is_asked_as_peft_does():
    """It takes whatever has ``bias`` in its name, and nothing else of the base."""
    base = _base()
    base.offset = nn.Parameter(torch.zeros(2))
    base.bias_of_all = nn.Parameter(torch.zeros(2))
    model = peft.PeftMixedModel(base, _config("all"))
    found = biases_of_adapters(model)
    assert {name.rpartition("model.")[2] for name in found} == {
        *("0.base_layer.bias", "1.bias", "2.base_layer.bias", "3.bias", "bias_of_all"),
    }
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name in trained if "lora_" not in name} == found.keys()


def test_only_the_adapter_in_use_asks():
    """One that was put aside trains nothing."""
    model = peft.get_peft_model(_base(), _config("all"))
    model.add_adapter("second", _config())
    assert len(biases_of_adapters(model)) == 4
    model.set_adapter("second")
    assert biases_of_adapters(model) == {}


def test_a_shared_bias_has_a_name_for_each_layer():
    """Whatever holds it."""
    base = _base()
    base[2].bias = base[0].bias
    found = biases_of_adapters(peft.get_peft_model(base, _config("lora_only")))
    assert found.keys() == {f"base_model.model.{place}.base_layer.bias" for place in (0, 2)}


def _learning(model, optimizer, instrument):
    inputs = torch.randn(4, 8)

    def step():
        optimizer.zero_grad()
        model(inputs).pow(2).mean().backward()
        optimizer.step()

    checks = verify(model, step, {"lora.learning": True, "lora.attached": True}, instrument=instrument)
    assert next(check for check in checks if check.path == "lora.attached").met
    return next(check for check in checks if check.path == "lora.learning")


@pytest.mark.parametrize(("bias", "count"), [("all", 4), ("lora_only", 2)])
def test_they_have_to_learn_with_the_adapter(instrument, bias, count):
    """All are counted; one that is frozen, or that the optimizer lacks, is found."""
    model = peft.get_peft_model(_base(), _config(bias)).train()
    trained = [value for value in model.parameters() if value.requires_grad]
    found = _learning(model, torch.optim.AdamW(trained, lr=1e-2), instrument)
    assert found.met, found.reason
    assert f"{4 + count} of {4 + count} trainable parameters" in found.reason
    factors = [value for name, value in model.named_parameters() if "lora_" in name]
    found = _learning(model, torch.optim.AdamW(factors, lr=1e-2), instrument)
    assert found.status == "fallback"
    assert f"{count} of {4 + count} parameters not given to the optimizer" in found.reason
    model.base_model.model[0].base_layer.bias.requires_grad_(False)
    found = _learning(model, torch.optim.AdamW(trained, lr=1e-2), instrument)
    assert found.status == "fallback"
    assert f"1 of {4 + count} parameters frozen: base_model.model.0.base_layer.bias" in found.reason


def test_a_bias_that_the_first_forward_casts_learns_and_is_given_back(instrument, training):
    """bitsandbytes rewrites the float32 bias of a 4-bit layer in the dtype of its input."""
    run = training()
    base = run.model.unload()
    targets = [layer.self_attn.q_proj for layer in base.model.layers]
    for target in targets:
        target.bias = nn.Parameter(torch.zeros(target.out_features), requires_grad=False)
    run.model = peft.get_peft_model(base, _config("lora_only", target_modules=["q_proj"])).train()
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-2)
    run.instrument = instrument
    for path in ("lora.learning", "base.frozen"):
        check = run.check(path, True)
        assert check.met, check.reason
    assert all(target.bias.dtype == torch.float32 for target in targets)
    run.step()
    assert all(target.bias.dtype == torch.bfloat16 for target in targets)
