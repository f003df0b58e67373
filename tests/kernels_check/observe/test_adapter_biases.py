"""Tests that biases of the base belong to the adapter exactly if PEFT trains them with the active adapter."""

import peft
import torch
from torch import nn

from kernels_check import verify


def _base():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))


def _config(bias="none", **options):
    return peft.LoraConfig(r=2, bias=bias, **({"target_modules": ["0", "2"]} | options))


def _learning(model, optimizer):
    inputs = torch.randn(4, 8)

    def step():
        optimizer.zero_grad()
        model(inputs).pow(2).mean().backward()
        optimizer.step()

    checks = verify(model, step, {"peft.learning": True, "peft.attached": True})
    assert next(check for check in checks if check.path == "peft.attached").met
    return next(check for check in checks if check.path == "peft.learning")


def test_biases_must_train_with_the_adapter():
    """All biases count; a frozen bias and one that the optimizer does not hold are found."""
    model, count = peft.get_peft_model(_base(), _config("lora_only")).train(), 2
    trained = [value for value in model.parameters() if value.requires_grad]
    found = _learning(model, torch.optim.AdamW(trained, lr=1e-2))
    assert found.met, found.reason
    assert f"{4 + count} of {4 + count} trainable parameters" in found.reason
    factors = [value for name, value in model.named_parameters() if "lora_" in name]
    found = _learning(model, torch.optim.AdamW(factors, lr=1e-2))
    assert found.status == "fallback"
    assert f"{count} of {4 + count} parameters not given to the optimizer" in found.reason
    model.base_model.model[0].base_layer.bias.requires_grad_(False)
    found = _learning(model, torch.optim.AdamW(trained, lr=1e-2))
    assert found.status == "fallback"
    assert f"1 of {4 + count} parameters frozen: base_model.model.0.base_layer.bias" in found.reason
