"""Tests that the optimizer is judged by its class, its operators and the device of its state."""

import bitsandbytes as bnb
import pytest
import torch

from kernels_check.judges.optimizer import is_class

ADAMW = ("torch.optim.adamw.AdamW", "torch.optim.adam.Adam", "torch.optim.optimizer.Optimizer", "builtins.object")


@pytest.mark.parametrize(
    ("classes", "required", "matches"),
    [
        (ADAMW, "torch.optim.AdamW", True),
        (ADAMW, "torch.optim.adamw.AdamW", True),
        (("mine.Tuned", *ADAMW), "torch.optim.AdamW", True),
        (("mine.Tuned", *ADAMW), "mine.Tuned", True),
        (ADAMW, "torch.optim.Adam", False),
        (ADAMW, "bitsandbytes.optim.AdamW", False),
        (ADAMW, "AdamW", False),
        (("bitsandbytes.optim.adamw.AdamW", *ADAMW[2:]), "torch.optim.AdamW", False),
    ],
)
def test_class_rule(classes, required, matches):
    """The package and the last component of the most derived class decide; AdamW does not match Adam although torch
    derives it from Adam."""
    assert is_class(classes, required) is matches


def test_the_observed_class_is_its_full_path(training):
    """The observed class is a full path, since bitsandbytes has a class of the same short name."""
    run = training(make_optimizer=lambda parameters: bnb.optim.PagedAdamW32bit(parameters, lr=1e-3))
    check = run.check("optimizer.class", "bitsandbytes.PagedAdamW32bit")
    assert check.met
    assert check.observed == "bitsandbytes.optim.adamw.PagedAdamW32bit"
    assert run.check("optimizer.class", "torch.optim.AdamW").status == "fallback"


def test_no_optimizer_is_absent(training):
    """A step that updates nothing has no optimizer to judge."""
    run = training()

    def step():
        run.model(**run.inputs, labels=run.inputs["input_ids"]).loss.backward()

    required = {"optimizer.class": "torch.optim.AdamW", "peft.learning": True}
    checks = {check.path: check for check in run.verify(required, step)}
    assert checks["optimizer.class"].status == "absent"
    check = checks["peft.learning"]
    assert check.status == "unknown"
    assert "no torch.optim.Optimizer stepped in 8 calls" in check.reason
    assert "current_gradient_accumulation_steps" in check.reason


def test_plain_sgd_is_recognised_by_the_parameters_it_writes(training):
    """Plain SGD has no operator of its own and is recognised by the parameters that it writes."""
    run = training(quant=None, make_optimizer=lambda given: torch.optim.SGD(given, lr=1e-3))
    check = run.check("optimizer.fused", False)
    assert (check.met, check.observed) == (True, "loop")


def test_an_update_without_an_optimizer_is_unknown(training):
    """An update by hand or by a foreign optimizer is neither known as fused nor as a loop."""
    run = training(quant=None)
    values = [value for value in run.model.parameters() if value.requires_grad]

    def step():
        run.gradients()
        with torch.no_grad():
            for value in values:
                value -= 0.1 * value.grad

    for path, required in {"optimizer.fused": False, "optimizer.class": "torch.optim.SGD"}.items():
        check = run.check(path, required, step)
        assert (check.status, check.observed) == ("unknown", None)
        assert "8 parameters changed" in check.reason


def test_an_update_by_kernels_of_a_library_is_unknown(training):
    """An optimizer whose writes appear in no operator is unknown."""

    class Foreign(torch.optim.Optimizer):
        def __init__(self, given):
            super().__init__(given, {})

        def step(self, closure=None):
            for value in self.param_groups[0]["params"]:
                value.detach().numpy()[...] -= 0.001

    run = training(quant=None, prepare=True, dtype="float32", make_optimizer=Foreign)
    check = run.check("optimizer.fused", False)
    assert (check.status, check.observed) == ("unknown", None)
    assert "Foreign wrote no parameter by an operator" in check.reason
