"""Biases of the base belong to the adapter exactly where PEFT trains them for the adapter in use."""

import peft
import pytest
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


@pytest.mark.parametrize(("bias", "count"), [("all", 4), ("lora_only", 2)])
def test_they_have_to_learn_with_the_adapter(bias, count):
    """All are counted; one that is frozen, or that the optimizer lacks, is found."""
    model = peft.get_peft_model(_base(), _config(bias)).train()
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


def test_a_bias_that_the_first_forward_casts_learns_and_is_given_back(training):
    """bitsandbytes rewrites the float32 bias of a 4-bit layer in the dtype of its input."""
    run = training()
    base = run.model.unload()
    targets = [layer.self_attn.q_proj for layer in base.model.layers]
    for target in targets:
        target.bias = nn.Parameter(torch.zeros(target.out_features), requires_grad=False)
    run.model = peft.get_peft_model(base, _config("lora_only", target_modules=["q_proj"])).train()
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-2)
    for path in ("peft.learning", "base.frozen"):
        check = run.check(path, True)
        assert check.met, check.reason
    assert all(target.bias.dtype == torch.float32 for target in targets)
    run.step()
    assert all(target.bias.dtype == torch.bfloat16 for target in targets)
