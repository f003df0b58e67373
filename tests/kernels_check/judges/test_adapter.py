"""An adapter passes only if it is attached, executed and learning."""

import torch

from kernels_check.observation.adapter_layers import adapter_layers, adapter_parameters


def weights(run):
    return [pair for layer in adapter_layers(run.model) for pair in layer.weights()]


def test_a_disabled_adapter_is_caught(training):
    """The layers are there and skipped."""
    run = training()
    run.model.base_model.disable_adapter_layers()
    own = adapter_parameters(run.model)
    for name, value in run.model.named_parameters():
        value.requires_grad_(name in own or name.endswith("norm.weight"))
    check = run.check("lora.attached", True)
    assert (check.status, check.observed) == ("fallback", False)
    assert "adapters disabled in 4 of 4 layers" in check.reason
    assert "adapter not executed" in check.reason


def test_a_merged_adapter_is_caught(training):
    """A merged adapter costs nothing and learns nothing."""
    run = training(quant=None)
    run.model.merge_adapter()
    own = adapter_parameters(run.model)
    for name, value in run.model.named_parameters():
        value.requires_grad_(name in own or name.endswith("norm.weight"))
    check = run.check("lora.attached", True)
    assert check.status == "fallback"
    assert "merged into the base in 4 of 4 layers" in check.reason
    assert run.check("lora.learning", True).status == "fallback"


def test_a_frozen_adapter_does_not_learn(training):
    """Executed, but without gradients."""
    run = training()
    for name, value in run.model.named_parameters():
        value.requires_grad_(name.endswith("norm.weight"))
    assert run.check("lora.attached", True).met
    check = run.check("lora.learning", True)
    assert (check.status, check.observed) == ("fallback", False)
    assert "8 of 8 parameters frozen" in check.reason


def test_a_factor_missing_from_the_optimizer_is_named(training):
    """Gradients arrive, but nothing applies them."""
    run = training()
    kept = [value for name, value in run.model.named_parameters() if "lora_" in name and "layers.1" not in name]
    run.optimizer = torch.optim.AdamW(kept, lr=1e-3)
    check = run.check("lora.learning", True)
    assert check.status == "fallback"
    assert "4 of 8 parameters not given to the optimizer" in check.reason


def test_the_first_step_never_fails_lora_a(training):
    """At step 0 the gradient of lora_A is exactly zero; the later watched step clears it."""
    run = training()
    assert all(not bool(weight.any()) for name, weight in weights(run) if ".lora_B." in name)
    assert run.check("lora.learning", True).met


def test_a_zero_learning_rate_is_unknown_with_its_reason(training):
    """A warm-up that starts at zero cannot move lora_B: neither a proof nor a failure."""
    run = training(make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    for name, weight in weights(run):
        if ".lora_B." in name:
            torch.nn.init.ones_(weight)
    check = run.check("lora.learning", True)
    assert check.status == "unknown"
    assert "learning rate is 0" in check.reason


def test_a_gradient_that_is_not_finite_is_named(training):
    """An overflowing step does not learn."""
    run = training()

    def step():
        run.optimizer.zero_grad()
        (run.model(**run.inputs, labels=run.inputs["input_ids"]).loss * float("inf")).backward()
        run.optimizer.step()

    check = run.check("lora.learning", True, step)
    assert check.status == "fallback"
    assert "not finite" in check.reason


def test_the_adapter_dtype_is_that_of_its_weights(training):
    """PEFT keeps adapters in float32 by default; asking for bfloat16 finds out."""
    run = training()
    check = run.check("lora.dtype", "bfloat16")
    assert (check.status, check.observed) == ("fallback", "float32")
    first = adapter_layers(run.model)[0]
    for _, weight in first.weights():
        weight.data = weight.data.bfloat16()
    assert run.check("lora.dtype", "float32").observed == "bfloat16+float32"


def test_dropout_that_is_off_is_seen(training):
    """A layer without dropout, or with another probability, is not the required one."""
    check = training(lora_dropout=0.0).check("lora.dropout", 0.05)
    assert (check.status, check.observed) == ("fallback", 0.0)
    assert "Identity" in check.reason
    assert training(lora_dropout=0.0).check("lora.dropout", 0.0).met
    assert training(lora_dropout=0.1).check("lora.dropout", 0.05).observed == 0.1


def test_dropout_in_eval_mode_is_not_applied(training):
    """The module is there with the right probability and does nothing."""
    run = training()
    name, dropout = next((name, module) for name, module in run.model.named_modules() if "lora_dropout.default" in name)
    dropout.eval()
    check = run.check("lora.dropout", 0.05)
    assert check.status == "fallback"
    assert f"{name} (p=0.05 but in eval mode)" in check.reason
    assert "3 of 4 layers" in check.reason


def test_only_active_adapters_are_judged(training):
    """A second, inactive adapter on the same base is no fault of the first."""
    import peft

    run = training()
    run.model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    run.model.set_adapter("default")
    assert {layer.name.rpartition(".")[2] for layer in adapter_layers(run.model)} == {"q_proj", "v_proj"}
    assert run.check("lora.learning", True).met
    assert "adapter default enabled" in run.check("lora.attached", True).reason


def test_zeroth_order_training_is_not_taken_for_an_evaluation(training):
    """Two forwards without gradients tell the loss on either side, and the gradients are put there by hand."""
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

    checks = {check.path: check for check in run.verify({"lora.attached": True, "lora.dropout": 0.05}, step)}
    assert [checks[path].status for path in ("lora.attached", "lora.dropout")] == ["unknown", "unknown"]
    assert "as in zeroth-order training" in checks["lora.attached"].reason
