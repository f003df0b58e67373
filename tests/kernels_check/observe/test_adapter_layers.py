"""Adapters are separated from their base by the layers that hold them; of several, only the active one is judged."""

import copy

import peft
import pytest
import torch

from kernels_check.observe.adapter import (
    adapter_layers,
)

ADAPTERS = {
    "default": {"r": 4, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 16, "lora_dropout": 0.2, "target_modules": "all-linear"},
    "narrow": {"r": 2, "lora_dropout": 0.0, "target_modules": ["down_proj"]},
}
LAYERS = {"default": 4, "wide": 14, "narrow": 2}


@pytest.fixture
def shared(training):
    """One base with three adapters, each with an optimizer that has stepped; returns activate(name) -> run."""
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
        **{"lora.attached": True, "lora.learning": True, "lora.dropout": ADAPTERS[name]["lora_dropout"]},
        **{"lora.dtype": "float32", "optimizer.class": "torch.optim.AdamW", "optimizer.fused": True, "mode": "train"},
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_in_turn_is_active_throughout(shared, name):
    """Its own rank, dropout and targets are what is found; the inactive ones are no fault of it."""
    run = shared(name)
    assert len(adapter_layers(run.model)) == LAYERS[name]
    checks = {check.path: check for check in run.verify(_requirements(name))}
    failed = [(path, checks[path].reason) for path in _requirements(name) if not checks[path].met]
    assert failed == []
    assert f"adapter {name} enabled, unmerged and executed in {LAYERS[name]} layers" in checks["lora.attached"].reason
    assert f"{2 * LAYERS[name]} of {2 * LAYERS[name]} trainable parameters" in checks["lora.learning"].reason


def test_verifying_one_leaves_the_others_untouched(shared):
    """Weights, gradients' absence, optimizer states, flags, active adapter and random numbers, to the bit."""
    run = shared("wide")
    weights = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    flags = {name: value.requires_grad for name, value in run.model.named_parameters()}
    gradients = {name: copy.deepcopy(value.grad) for name, value in run.model.named_parameters()}
    states = copy.deepcopy({name: optimizer.state_dict() for name, optimizer in run.optimizers.items()})
    random = torch.get_rng_state()
    run.verify(_requirements("wide"))
    for name, value in run.model.named_parameters():
        assert torch.equal(value, weights[name]), name
        assert value.requires_grad is flags[name], name
        before = gradients[name]
        assert (value.grad is None) if before is None else torch.equal(value.grad, before), name
    for name, optimizer in run.optimizers.items():
        for key, state in optimizer.state_dict()["state"].items():
            for field, held in state.items():
                assert torch.equal(held, states[name]["state"][key][field]), (name, key, field)
    assert torch.equal(torch.get_rng_state(), random)
    assert run.model.active_adapter == "wide"


def test_a_frozen_adapter_is_caught_among_several(shared):
    """An active adapter that is frozen while an inactive one is trainable does not learn."""
    name = "narrow"
    run = shared(name)
    other = next(key for key in ADAPTERS if key != name)
    for parameter, value in run.model.named_parameters():
        value.requires_grad_(f".{other}." in parameter or parameter.endswith("norm.weight"))
    check = run.check("lora.learning", True)
    assert (check.status, check.observed) == ("fallback", False)
    assert f"{2 * LAYERS[name]} of {2 * LAYERS[name]} parameters frozen" in check.reason


def test_the_optimizer_of_another_adapter_is_caught(shared):
    """Gradients reach the active adapter, but the optimizer that steps updates another."""
    run = shared("narrow")
    run.optimizer = run.optimizers["default"]
    check = run.check("lora.learning", True)
    assert check.status == "fallback"
    assert "4 of 4 parameters not given to the optimizer" in check.reason


def test_one_optimizer_for_all_adapters_keeps_the_state_of_the_inactive(shared):
    """A shared optimizer judges as well, and the moments of the adapters that rest stay as they were."""
    run = shared("default")
    every = [value for name, value in run.model.named_parameters() if "lora_" in name]
    run.optimizer = torch.optim.AdamW(every, lr=1e-3, fused=True)
    for name in ADAPTERS:
        run.model.set_adapter(name)
        run.step()
    before = copy.deepcopy(run.optimizer.state_dict()["state"])
    checks = {check.path: check for check in run.verify({"lora.learning": True, "base.frozen": True})}
    assert checks["lora.learning"].met, checks["lora.learning"].reason
    assert checks["base.frozen"].met, checks["base.frozen"].reason
    for key, state in run.optimizer.state_dict()["state"].items():
        for field, held in state.items():
            assert torch.equal(held, before[key][field]), (key, field)
