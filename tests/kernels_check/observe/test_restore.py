"""Verifying changes nothing that training depends on, to the bit."""

import random

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "paged_adamw_32bit": lambda parameters: bnb.optim.PagedAdamW32bit(parameters, lr=1e-2),
    "adamw_8bit": lambda parameters: bnb.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=64),
}


def _adapter(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("verify_after", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_bit_for_bit(training, name, verify_after):
    """Losses, adapter weights, gradients and optimizer state equal those of a run that was never verified."""
    runs = []
    for verified in (False, True):
        run = training(make_optimizer=OPTIMIZERS[name], lora_dropout=0.3)
        torch.manual_seed(3)
        for step in range(4):
            if verified and step == verify_after:
                before = list(run.losses)
                run.verify({})
                run.losses = before
            run.step()
        runs.append(run)
    plain, watched = runs
    assert plain.losses == watched.losses
    for (key, ours), (_, theirs) in zip(_adapter(plain.model).items(), _adapter(watched.model).items(), strict=True):
        assert torch.equal(ours, theirs), key
    for ours, theirs in zip(plain.optimizer.state.values(), watched.optimizer.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key


def test_state_that_did_not_exist_is_removed_again(training):
    """Gradients that were None and optimizer state that was missing are so again."""
    run = training(make_optimizer=OPTIMIZERS["paged_adamw_32bit"])
    attributes = dict(vars(run.optimizer))
    run.verify({})
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert len(run.optimizer.state) == 0
    assert vars(run.optimizer).keys() == attributes.keys()
    assert run.optimizer.initialized is False


def test_gradients_found_keep_identity_and_value(training):
    """A gradient accumulated before is the same tensor with the same content afterwards."""
    run = training()
    parameter = next(value for value in run.model.parameters() if value.requires_grad)
    parameter.grad = mine = torch.full_like(parameter, 0.25)
    run.verify({})
    assert parameter.grad is mine
    assert bool((mine == 0.25).all())


def test_generators_are_left_as_found(training):
    """Python, NumPy and torch draw the same numbers after a verify whose step drew from all three."""
    run = training()

    def step():
        random.random()
        np.random.random()
        run.step()

    def draw():
        return random.random(), float(np.random.random()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    run.verify({}, step)
    assert draw() == expected


def test_a_mixture_of_modes_is_left_as_found(training):
    """Modes come back module by module, whatever the step set."""
    run = training()
    run.model.eval()
    odd = next(module for name, module in run.model.named_modules() if name.endswith("mlp"))
    odd.train()
    before = {name: module.training for name, module in run.model.named_modules()}
    run.verify({}, lambda: (run.model.train(), run.step()))
    assert {name: module.training for name, module in run.model.named_modules()} == before


def test_a_failing_step_is_raised_after_restoring(training):
    """An exception leaves neither hooks nor changed weights behind."""
    run = training()
    before = _adapter(run.model)

    def step():
        run.step()
        raise RuntimeError("the step broke")

    hooks = len(_global_optimizer_pre_hooks)
    with pytest.raises(RuntimeError, match="the step broke"):
        run.verify({}, step)
    assert len(_global_optimizer_pre_hooks) == hooks
    assert not any(module._forward_pre_hooks for module in run.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in _adapter(run.model).items())
    assert len(run.optimizer.state) == 0


def test_a_parameter_that_trains_only_inside_the_step_is_restored(training):
    """A step that switches a frozen parameter on and gives it to an optimizer leaves no trace of it."""
    run = training()
    norm = next(value for name, value in run.model.named_parameters() if name.endswith("model.norm.weight"))
    before = norm.detach().clone()

    def step():
        norm.requires_grad_(True)
        if len(run.optimizer.param_groups) == 1:
            run.optimizer.add_param_group({"params": [norm], "lr": 0.1})
        run.step()

    run.verify({}, step)
    assert torch.equal(norm, before)
    assert norm.requires_grad is False
