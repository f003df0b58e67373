"""Faults that silently bypass an adapter: around the step, inside it, or between two steps.

Each has a similar healthy control in this module: a reference inside the step, a projection after it, a warm-up, a
closure.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import peft
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from kernels_check.observe.adapter import adapter_layers
from negative_controls.small_run import SmallRun, backward, replace_step, wrap_step


def _loss(run: SmallRun, model: Any = None) -> Any:
    return (run.model if model is None else model)(**run.inputs, labels=run.inputs["input_ids"]).loss


def _trained(run: SmallRun) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in run.model.named_parameters() if value.requires_grad]


def _half(run: SmallRun) -> list[Any]:
    layers = [layer.module for layer in adapter_layers(run.model)]
    return layers[: len(layers) // 2]


def _optimise(run: SmallRun, groups: Any, rate: float = 1e-3) -> None:
    run.optimizer = torch.optim.AdamW(groups, lr=rate)


def _train_a_norm(run: SmallRun) -> None:
    """Train a norm, so that the loss stays differentiable where the adapter gives no gradient."""
    norm = next(value for name, value in run.model.named_parameters() if name.endswith("model.norm.weight"))
    norm.requires_grad_(True)
    run.optimizer.add_param_group({"params": [norm]})


def train_by_a_penalty(run: SmallRun, *, detached: bool = True) -> None:
    """Add a penalty on the adapter to a loss; with ``detached``, no gradient of the loss is left."""
    factors = [value for value in run.model.parameters() if value.requires_grad]

    def passes(run: SmallRun) -> Any:
        loss = run.model(**run.inputs, labels=run.inputs["input_ids"]).loss
        return backward((loss.detach() if detached else loss) + sum((one - 1).square().sum() for one in factors))

    run.passes = passes


def disable_in_the_step(run: SmallRun) -> None:
    """Keep `disable_adapter()` around the training forward, after two healthy steps."""
    run.step()
    run.step()
    _train_a_norm(run)

    def step() -> None:
        with run.model.disable_adapter():
            _loss(run).backward()
        clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()

    replace_step(run, step)


def ask_a_reference(run: SmallRun) -> None:
    """Disable the adapter for a reference inside the step, as preference training does."""

    def ask() -> None:
        with torch.no_grad(), run.model.disable_adapter():
            run.model(**run.inputs)

    wrap_step(run, before=ask)


def rest_half_in_the_step(run: SmallRun) -> None:
    """Deactivate half the layers during the step only."""
    resting = _half(run)

    def activate(*adapters: str) -> None:
        for layer in resting:
            layer.set_adapter([*adapters])

    wrap_step(run, before=activate, after=lambda: activate("default"))


def ask_another_adapter(run: SmallRun) -> None:
    """Switch to a second adapter for a reference inside the step, and back."""
    run.model.add_adapter("reference", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    run.model.set_adapter("default")

    def ask() -> None:
        run.model.set_adapter("reference")
        with torch.no_grad():
            run.model(**run.inputs)
        run.model.set_adapter("default")

    wrap_step(run, before=ask)


def pass_by_half(run: SmallRun) -> None:
    """Call the base layers in place of half the adapter layers, as a patched forward would."""
    for layer in _half(run):
        layer.forward = layer.base_layer.forward


def train_a_copy(run: SmallRun) -> None:
    """Train a deep copy instead of the verified model."""
    run.step()
    twin = copy.deepcopy(run.model)
    _optimise(run, [value for value in twin.parameters() if value.requires_grad])

    def step() -> None:
        run.optimizer.zero_grad()
        _loss(run, twin).backward()
        run.optimizer.step()

    replace_step(run, step)


def train_copies_made_in_the_step(run: SmallRun) -> None:
    """Copy the model in each step, train the copy, and assign its gradients to the model."""

    def step() -> None:
        twin = copy.deepcopy(run.model)
        run.optimizer.zero_grad()
        _loss(run, twin).backward()
        for own, its in zip(run.model.parameters(), twin.parameters(), strict=True):
            own.grad = its.grad
        run.optimizer.step()

    replace_step(run, step)


def copy_and_save_in_the_step(run: SmallRun) -> None:
    """Copy and save the model in each step, for a reference answer and a checkpoint."""

    def ask() -> None:
        with torch.no_grad():
            copy.deepcopy(run.model)(**run.inputs)

    wrap_step(run, before=ask, after=lambda: torch.save(run.model, io.BytesIO()))


def pass_by_half_and_evaluate(run: SmallRun) -> None:
    """Call the base layers in place of half the adapter layers, except in the evaluation at the end of each step."""
    patched = [(layer, layer.forward) for layer in _half(run)]
    pass_by_half(run)

    def evaluate() -> None:
        for layer, forward in patched:
            layer.forward = forward
        run.model.eval()
        with torch.no_grad():
            _loss(run)
        run.model.train()
        pass_by_half(run)

    wrap_step(run, after=evaluate)


def reload_every_step(run: SmallRun) -> None:
    """Load the adapter's state before every step."""
    run.step()
    kept = {name: value.detach().clone() for name, value in _trained(run)}

    @torch.no_grad()
    def reload() -> None:
        for name, value in _trained(run):
            value.copy_(kept[name])

    wrap_step(run, before=reload)


def clamp_after_every_step(run: SmallRun) -> None:
    """Clamp the weights, which changes few of them."""

    @torch.no_grad()
    def clamp() -> None:
        for _, value in _trained(run):
            value.clamp_(-0.08, 0.08)

    wrap_step(run, after=clamp)


def rest_lora_a(run: SmallRun) -> None:
    """Give the parameter group of lora_A a learning rate of zero."""
    first = [value for name, value in _trained(run) if ".lora_A." in name]
    second = [value for name, value in _trained(run) if ".lora_B." in name]
    _optimise(run, [{"params": first, "lr": 0.0}, {"params": second}])


def warm_up_from_zero(run: SmallRun) -> None:
    """Increase the learning rate from zero, with a new adapter."""
    wrap_step(run, after=LambdaLR(run.optimizer, lambda step: min(1.0, step / 10)).step)


def narrow(run: SmallRun, rate: float = 1e-3) -> None:
    """Keep the adapter in bfloat16."""
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

    replace_step(run, step)


def step_with_a_closure(run: SmallRun) -> None:
    """Pass the optimizer a closure that computes the gradients, as Lightning does."""

    def closure() -> Any:
        run.optimizer.zero_grad()
        return backward(_loss(run))

    replace_step(run, lambda: run.optimizer.step(closure=closure))


def with_a_head() -> Any:
    """Return LoRA with a fully trained copy of the head."""
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"])
