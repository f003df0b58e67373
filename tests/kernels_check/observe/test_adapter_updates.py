"""Tests that usual training code counts as adapter learning, and that code which undoes the update does not.

Tests that adapters are separated from their base by the layers that hold them, and that only the active adapter is
judged.

Tests that biases of the base belong to the adapter exactly if PEFT trains them with the active adapter.
"""

import peft
import pytest
import torch
from torch import nn

from kernels_check import verify
from kernels_check.observe.adapter import (
    adapter_layers,
)

BOTH = ("peft.attached", "peft.learning")


def loss(run):
    return run.model(**run.inputs, labels=run.inputs["input_ids"]).loss


def trained(run):
    return {name: value for name, value in run.model.named_parameters() if value.requires_grad}


def judged(run, step=None):
    checks = {check.path: check for check in run.verify(dict.fromkeys(BOTH, True), step)}
    return checks["peft.learning"]


def in_backward(run):
    optimizers = {id(value): torch.optim.AdamW([value], lr=1e-3) for value in trained(run).values()}

    def update(value):
        optimizers[id(value)].step()
        optimizers[id(value)].zero_grad()

    for value in trained(run).values():
        value.register_post_accumulate_grad_hook(update)
    return lambda: loss(run).backward()


def by_hand(run):
    def step():
        values = list(trained(run).values())
        for value, gradient in zip(values, torch.autograd.grad(loss(run), values), strict=True):
            value.grad = gradient
        run.optimizer.step()

    return step


HEALTHY = {
    "optimizers in the backward pass": in_backward,
    "gradients set by the training code": by_hand,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HEALTHY)
def test_usual_training_code_is_active(training, name):
    """Usual training code is active, not a fallback and not unknown."""
    run = training(lora_dropout=0.0)
    check = judged(run, HEALTHY[name](run))
    assert check.met, check.reason


def test_master_weights_that_are_copied_back_are_unknown(training):
    """The optimizer steps copies of the parameters."""
    run = training()
    masters = {name: value.detach().clone().requires_grad_() for name, value in trained(run).items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-3)

    def step():
        run.model.zero_grad()
        loss(run).backward()
        for name, value in trained(run).items():
            masters[name].grad = value.grad.clone()
        optimizer.step()
        with torch.no_grad():
            for name, value in trained(run).items():
                value.copy_(masters[name])

    check = judged(run, step)
    assert check.status == "unknown"
    assert "copy of master weights" in check.reason


def test_ranks_that_adalora_prunes_are_not_reported_as_lost(training):
    """AdaLoRA itself masks ranks between updates."""
    adapter = peft.AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "total_step": 100, "tinit": 0, "tfinal": 90, "deltaT": 1},
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    run, done = training(quant=None, dtype="float32", adapter=lambda: adapter), []

    def step():
        run.step()
        done.append(1)
        run.model.base_model.update_and_allocate(len(done))

    check = judged(run, step)
    assert check.met, check.reason


ADAPTERS = {
    "default": {"r": 4, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 16, "lora_dropout": 0.2, "target_modules": "all-linear"},
    "narrow": {"r": 2, "lora_dropout": 0.0, "target_modules": ["down_proj"]},
}
LAYERS = {"default": 4, "wide": 14, "narrow": 2}


@pytest.fixture
def shared(training):
    """One base with three adapters that have each taken an optimizer step; returns activate(name) -> run."""
    run = training()
    for name in list(ADAPTERS)[1:]:
        run.model.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]))
    run.optimizers = {}

    def activate(name):
        run.model.set_adapter(name)
        if name not in run.optimizers:
            trained = [value for value in run.model.parameters() if value.requires_grad]
            run.optimizers[name] = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        run.optimizer = run.optimizers[name]
        return run

    for name in ADAPTERS:
        activate(name).step()
    return activate


def _requirements(name):
    return {
        **{"attention.backend": "fused", "base.bits": 4, "base.quant_type": "nf4", "base.frozen": True},
        **{"peft.attached": True, "peft.learning": True, "peft.dropout": ADAPTERS[name]["lora_dropout"]},
        **{"peft.dtype": "float32", "optimizer.class": "torch.optim.AdamW", "optimizer.fused": True, "mode": "train"},
    }


@pytest.mark.parametrize("name", ["default", "wide"])
def test_each_adapter_in_turn_is_active_throughout(shared, name):
    """Rank, dropout and targets are those of the active adapter; inactive adapters are not a fault."""
    run = shared(name)
    assert len(adapter_layers(run.model)) == LAYERS[name]
    checks = {check.path: check for check in run.verify(_requirements(name))}
    failed = [(path, checks[path].reason) for path in _requirements(name) if not checks[path].met]
    assert failed == []
    assert f"adapter {name} enabled, unmerged and executed in {LAYERS[name]} layers" in checks["peft.attached"].reason
    assert f"{2 * LAYERS[name]} of {2 * LAYERS[name]} trainable parameters" in checks["peft.learning"].reason


def test_a_frozen_adapter_is_caught_among_several(shared):
    """A frozen active adapter is reported as not learning although an inactive one is trainable."""
    name = "narrow"
    run = shared(name)
    other = next(key for key in ADAPTERS if key != name)
    for parameter, value in run.model.named_parameters():
        value.requires_grad_(f".{other}." in parameter or parameter.endswith("norm.weight"))
    check = run.check("peft.learning", True)
    assert (check.status, check.observed) == ("fallback", False)
    assert f"{2 * LAYERS[name]} of {2 * LAYERS[name]} parameters frozen" in check.reason


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
