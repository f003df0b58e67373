"""Tests that adapters are separated from their base by the layers that hold them, and that only the active adapter is
judged."""

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
