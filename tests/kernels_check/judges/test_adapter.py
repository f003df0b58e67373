"""Tests that an adapter passes only if it is attached, executed and learning."""

import bitsandbytes
import pytest
import torch
from peft import LoraConfig

from kernels_check.observe.adapter import adapter_layers


def test_the_adapter_dtype_is_that_of_its_weights(training):
    """PEFT keeps adapters in float32 by default, so that a requirement of bfloat16 fails."""
    run = training()
    check = run.check("peft.dtype", "bfloat16")
    assert (check.status, check.observed) == ("fallback", "float32")
    first = adapter_layers(run.model)[0]
    for _, weight in first.weights():
        weight.data = weight.data.bfloat16()
    assert run.check("peft.dtype", "float32").observed == "bfloat16+float32"


def test_zeroth_order_training_is_not_taken_for_an_evaluation(training):
    """Two forwards without gradients give the losses on both sides, and the script sets the gradients."""
    run = training(quant=None)
    trained = [value for value in run.model.parameters() if value.requires_grad]

    def move(directions, far):
        for value, direction in zip(trained, directions, strict=True):
            value.data.add_(direction, alpha=far)

    def step():
        directions, losses = [torch.randn_like(value) for value in trained], []
        for far in (1e-3, -2e-3):
            move(directions, far)
            with torch.no_grad():
                losses.append(run.model(**run.inputs, labels=run.inputs["input_ids"]).loss)
        move(directions, 1e-3)
        for value, direction in zip(trained, directions, strict=True):
            value.grad = direction * (losses[0] - losses[1]) / 2e-3
        run.optimizer.step()

    checks = {check.path: check for check in run.verify({"peft.attached": True, "peft.dropout": 0.05}, step)}
    assert [checks[path].status for path in ("peft.attached", "peft.dropout")] == ["unknown", "unknown"]
    assert "as in zeroth-order training" in checks["peft.attached"].reason


@pytest.mark.parametrize(
    "configuration",
    [
        LoraConfig(target_modules="all-linear", exclude_modules=["down_proj"]),
        LoraConfig(target_modules=["q_proj", "down_proj"], exclude_modules=r".*\.mlp\..*"),
        LoraConfig(target_modules=r"model\.layers\.\d+\.self_attn\.[qv]_proj"),
        LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]),
    ],
    ids=["a list", "a pattern excluded", "a pattern", "a copy"],
)
def test_a_target_that_the_configuration_excludes_is_not_missing(training, configuration):
    """PEFT removes the excluded modules from the targets but keeps their names in ``target_modules``."""
    check = training(adapter=lambda: configuration).check("peft.attached", True)
    assert check.met, check.reason


def test_an_exclusion_hides_no_misspelt_target(training):
    """Only a name that matches an excluded module is accepted."""
    configuration = LoraConfig(target_modules=["q_proj", "down_proj", "qurey"], exclude_modules=["down_proj"])
    check = training(adapter=lambda: configuration).check("peft.attached", True)
    assert check.status == "fallback"
    assert "requested, but matched nothing: target_modules 'qurey' (" in check.reason


def linear4bit_layers(run):
    """Return the 4-bit layers; skips where bitsandbytes does not repack weights, without AVX512-BF16."""
    layers = [module for module in run.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    if not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512_BF16, so bitsandbytes does not repack")
    return layers


def evaluate(run):
    run.model.eval()
    with torch.no_grad():
        run.model(**run.inputs)
    run.model.train()


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_a_gradient_missing_behind_repacked_weights_is_found(training):
    """Each parameter has a gradient, but only through the adapters; the part through the base is missing."""
    run = training(targets="all-linear")
    layers = linear4bit_layers(run)
    evaluate(run)
    check = run.check("peft.learning", True)
    assert check.status == "fallback"
    # Nothing before the first four layers needs a gradient.
    assert f"the gradient was lost in {len(layers) - 3} 4-bit layers" in check.reason
    assert "support_avx512bf16_for_cpu=False" in check.reason


class Warming(torch.optim.SGD):
    """Changes nothing for the first updates, as RAdamScheduleFree does for four."""

    def __init__(self, parameters, updates):
        super().__init__(parameters, lr=1e-3)
        self.left = updates

    def step(self, closure=None):
        self.left -= 1
        if self.left < 0:
            super().step(closure)


def test_an_update_that_moves_nothing_is_not_lost_to_rounding(training):
    """Float32 would show a small change; only a later update shows whether the optimizer is still warming up."""
    check = training(make_optimizer=lambda parameters: Warming(parameters, 1000)).check("peft.learning", True)
    assert check.status == "unknown"
    assert "the optimizer may be warming up" in check.reason
