"""Faults that silently bypass an adapter: around the step, inside it, or between two steps.

Each has a similar healthy control in this module: a reference inside the step, a projection after it, a warm-up, a
closure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from kernels_check.observe.adapter import adapter_layers
from negative_controls.small_run import SmallRun


def _loss(run: SmallRun, model: Any = None) -> Any:
    return (run.model if model is None else model)(**run.inputs, labels=run.inputs["input_ids"]).loss


def _replace_step(run: SmallRun, step: Callable[[], object]) -> None:
    run.step = step  # type: ignore[assignment,method-assign]


def _trained(run: SmallRun) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in run.model.named_parameters() if value.requires_grad]


def _half(run: SmallRun) -> list[Any]:
    layers = [layer.module for layer in adapter_layers(run.model)]
    return layers[: len(layers) // 2]


def _optimise(run: SmallRun, groups: Any, rate: float = 1e-3) -> None:
    import torch

    run.optimizer = torch.optim.AdamW(groups, lr=rate)


def _train_a_norm(run: SmallRun) -> None:
    """Train a norm, so that the loss stays differentiable where the adapter gives no gradient."""
    norm = next(value for name, value in run.model.named_parameters() if name.endswith("model.norm.weight"))
    norm.requires_grad_(True)
    run.optimizer.add_param_group({"params": [norm]})


def disable_in_the_step(run: SmallRun) -> None:
    """Keep `disable_adapter()` around the training forward, after two healthy steps."""
    from torch.nn.utils import clip_grad_norm_

    run.step()
    run.step()
    _train_a_norm(run)

    def step() -> None:
        with run.model.disable_adapter():
            _loss(run).backward()
        clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()

    _replace_step(run, step)


def ask_a_reference(run: SmallRun) -> None:
    """Disable the adapter for a reference inside the step, as preference training does."""
    import torch

    sound = run.step

    def step() -> None:
        with torch.no_grad(), run.model.disable_adapter():
            run.model(**run.inputs)
        sound()

    _replace_step(run, step)


def rest_half_in_the_step(run: SmallRun) -> None:
    """Deactivate half the layers during the step only."""
    sound, resting = run.step, _half(run)

    def step() -> None:
        for layer in resting:
            layer.set_adapter([])
        sound()
        for layer in resting:
            layer.set_adapter("default")

    _replace_step(run, step)


def ask_another_adapter(run: SmallRun) -> None:
    """Switch to a second adapter for a reference inside the step, and back."""
    import peft
    import torch

    run.model.add_adapter("reference", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    run.model.set_adapter("default")
    sound = run.step

    def step() -> None:
        run.model.set_adapter("reference")
        with torch.no_grad():
            run.model(**run.inputs)
        run.model.set_adapter("default")
        sound()

    _replace_step(run, step)


def pass_by_half(run: SmallRun) -> None:
    """Call the base layers in place of half the adapter layers, as a patched forward would."""
    for layer in _half(run):
        layer.forward = layer.base_layer.forward


def train_a_copy(run: SmallRun) -> None:
    """Train a deep copy instead of the verified model."""
    run.step()
    twin = copy.deepcopy(run.model)
    own = [value for value in twin.parameters() if value.requires_grad]
    _optimise(run, own)

    def step() -> None:
        run.optimizer.zero_grad()
        _loss(run, twin).backward()
        run.optimizer.step()

    _replace_step(run, step)


def train_copies_made_in_the_step(run: SmallRun) -> None:
    """Copy the model in each step, train the copy, and assign its gradients to the model."""

    def step() -> None:
        twin = copy.deepcopy(run.model)
        run.optimizer.zero_grad()
        _loss(run, twin).backward()
        for own, its in zip(run.model.parameters(), twin.parameters(), strict=True):
            own.grad = its.grad
        run.optimizer.step()

    _replace_step(run, step)


def copy_and_save_in_the_step(run: SmallRun) -> None:
    """Copy and save the model in each step, for a reference answer and a checkpoint."""
    import io

    import torch

    sound = run.step

    def step() -> None:
        reference = copy.deepcopy(run.model)
        with torch.no_grad():
            reference(**run.inputs)
        sound()
        torch.save(run.model, io.BytesIO())

    _replace_step(run, step)


def pass_by_half_and_evaluate(run: SmallRun) -> None:
    """Call the base layers in place of half the adapter layers, except in the evaluation at the end of each step."""
    patched = [(layer, layer.forward) for layer in _half(run)]
    pass_by_half(run)
    passed = [(layer, layer.forward) for layer, _ in patched]
    sound = run.step

    def step() -> None:
        sound()
        for layer, forward in patched:
            layer.forward = forward
        _evaluate(run)
        for layer, forward in passed:
            layer.forward = forward

    _replace_step(run, step)


def _evaluate(run: SmallRun) -> None:
    import torch

    run.model.eval()
    with torch.no_grad():
        _loss(run, run.model)
    run.model.train()


def reload_every_step(run: SmallRun) -> None:
    """Load the adapter's state before every step."""
    import torch

    run.step()
    kept = {name: value.detach().clone() for name, value in _trained(run)}
    sound = run.step

    def step() -> None:
        with torch.no_grad():
            for name, value in _trained(run):
                value.copy_(kept[name])
        sound()

    _replace_step(run, step)


def clamp_after_every_step(run: SmallRun) -> None:
    """Clamp the weights, which changes few of them."""
    import torch

    sound = run.step

    def step() -> None:
        sound()
        with torch.no_grad():
            for _, value in _trained(run):
                value.clamp_(-0.08, 0.08)

    _replace_step(run, step)


def rest_lora_a(run: SmallRun) -> None:
    """Give the parameter group of lora_A a learning rate of zero."""
    first = [value for name, value in _trained(run) if ".lora_A." in name]
    second = [value for name, value in _trained(run) if ".lora_B." in name]
    _optimise(run, [{"params": first, "lr": 0.0}, {"params": second}])


def warm_up_from_zero(run: SmallRun) -> None:
    """Increase the learning rate from zero, with a new adapter."""
    from torch.optim.lr_scheduler import LambdaLR

    sound, scheduler = run.step, LambdaLR(run.optimizer, lambda step: min(1.0, step / 10))

    def step() -> None:
        sound()
        scheduler.step()

    _replace_step(run, step)


def narrow(run: SmallRun, rate: float = 1e-3) -> None:
    """Keep the adapter in bfloat16."""
    import torch

    for _, value in _trained(run):
        value.data = value.data.to(torch.bfloat16)
    _optimise(run, [value for _, value in _trained(run)], rate)


def narrow_with_a_small_rate(run: SmallRun) -> None:
    """Keep the adapter in bfloat16, with a learning rate below its precision."""
    narrow(run, 1e-7)


def optimise_factors_only(run: SmallRun) -> None:
    """Select the trained parameters by the names of the factors, as many scripts do."""
    _optimise(run, [value for name, value in _trained(run) if ".lora_A." in name or ".lora_B." in name])


def zero_gradients_before_the_update(run: SmallRun) -> None:
    """Zero the gradients before the update, so that only weight decay acts."""
    run.step()
    run.step()

    def step() -> None:
        _loss(run).backward()
        run.optimizer.zero_grad(set_to_none=False)
        run.optimizer.state.clear()
        run.optimizer.step()

    _replace_step(run, step)


def step_with_a_closure(run: SmallRun) -> None:
    """Pass the optimizer a closure that computes the gradients, as Lightning does."""

    def closure() -> Any:
        run.optimizer.zero_grad()
        loss = _loss(run)
        loss.backward()
        return loss

    _replace_step(run, lambda: run.optimizer.step(closure=closure))


def with_a_head() -> Any:
    """Return LoRA with a fully trained copy of the head."""
    import peft

    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"])
