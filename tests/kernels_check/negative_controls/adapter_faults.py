"""Ways to train an adapter in part or not at all, and everyday code that looks alike and trains all of it."""

from __future__ import annotations

import threading
from typing import Any

from kernels_check.observe.adapter import adapter_layers
from negative_controls.faults import dropout_off
from negative_controls.small_run import SmallRun


def disable_beside_zeros(run: SmallRun) -> None:
    """Leave ``disable_adapter()`` around the forward; gradients set to zero are there and say nothing."""
    import torch

    run.step()
    run.step()
    norm = next(value for name, value in run.model.named_parameters() if name.endswith("model.norm.weight"))
    norm.requires_grad_(True)

    def step() -> None:
        run.optimizer.zero_grad(set_to_none=False)
        with run.model.disable_adapter():
            run.model(**run.inputs, labels=run.inputs["input_ids"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()

    run.step = step  # type: ignore[method-assign]


def rest_dropout_once(run: SmallRun) -> None:
    """Put the adapter's dropout to sleep for the second of two micro-batches, and wake it after."""

    def passes(run: SmallRun) -> Any:
        run.one_pass()
        dropout_off(run)
        loss = run.one_pass()
        run.model.train()
        return loss

    run.passes = passes


def spoil_a_gradient(run: SmallRun) -> None:
    """Multiply a gradient by NaN."""
    value = next(value for value in run.model.parameters() if value.requires_grad)
    value.register_hook(lambda gradient: gradient * float("nan"))


def freeze_lora_a(run: SmallRun) -> None:
    """Freeze one of the factors by hand."""
    for name, value in run.model.named_parameters():
        if ".lora_A." in name:
            value.requires_grad_(False)


def use_lora_fa(run: SmallRun) -> None:
    """Train by PEFT's LoRA-FA, whose optimizer freezes lora_A and needs its value."""
    from peft.optimizers import create_lorafa_optimizer

    run.optimizer = create_lorafa_optimizer(run.model, r=4, lora_alpha=8, lr=1e-3)


def minimise_sharpness(run: SmallRun, *, undone: bool = False) -> None:
    """Train by SAM with an optimizer of torch inside; undone: and reload the weights before each step."""
    import torch

    class Sharpness(torch.optim.Optimizer):
        """Takes the gradient from a little uphill, then lets its base step from where it was."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})
            self.base = torch.optim.SGD(self.param_groups, lr=0.1)
            self.param_groups = self.base.param_groups

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            """Two passes and an update."""
            with torch.enable_grad():
                loss = closure()
            values = [value for group in self.param_groups for value in group["params"]]
            before = [value.clone() for value in values]
            for value in values:
                value.add_(value.grad, alpha=0.05)
            with torch.enable_grad():
                closure()
            for value, old in zip(values, before, strict=True):
                value.copy_(old)
            self.base.step()
            return loss

    parameters = [value for value in run.model.parameters() if value.requires_grad]
    run.optimizer, run.by_closure = Sharpness(parameters), True
    if undone:
        start, passes = [value.detach().clone() for value in parameters], run.step

        def reloaded() -> None:
            with torch.no_grad():
                for value, old in zip(parameters, start, strict=True):
                    value.copy_(old)
            passes()

        run.step = reloaded  # type: ignore[method-assign]


def step_in_a_thread(run: SmallRun) -> None:
    """Let another thread do all of the step."""
    sound = run.step

    def step() -> None:
        thread = threading.Thread(target=sound)
        thread.start()
        thread.join()

    run.step = step  # type: ignore[method-assign]


def share_a_factor(run: SmallRun) -> None:
    """Let the two layers of queries share their lora_A."""
    import torch

    first, second = _queries(run)
    second.lora_A["default"] = first.lora_A["default"]
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def pass_one_by(run: SmallRun) -> None:
    """And call what the second of them wraps in its place."""
    share_a_factor(run)
    _, second = _queries(run)
    second.forward = second.base_layer.forward


def sparse_table() -> Any:
    """LoRA, and a copy of the embedding that is trained whole."""
    import peft

    return peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])


def send_sparse_gradients(run: SmallRun) -> None:
    """Let the embedding that is trained give sparse gradients."""
    import torch

    for name, module in run.model.named_modules():
        if name.endswith("modules_to_save.default"):
            module.sparse = True
    run.optimizer = torch.optim.SGD([value for value in run.model.parameters() if value.requires_grad], lr=0.5)


def forget_the_table(run: SmallRun) -> None:
    """And leave it out of the optimizer."""
    import torch

    send_sparse_gradients(run)
    named = run.model.named_parameters()
    factors = [value for name, value in named if value.requires_grad and "modules_to_save" not in name]
    run.optimizer = torch.optim.SGD(factors, lr=0.5)


def hold_as_lora(run: SmallRun) -> None:
    """Hold the model in a module of one's own, by a name that speaks of LoRA."""
    from torch import nn

    class Learner(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.lora_model = model

        def forward(self, **inputs: Any) -> Any:
            return self.lora_model(**inputs)

    run.model = Learner(run.model)


def train_base_held_as_lora(run: SmallRun) -> None:
    """And train all of its floating-point weights, by that name."""
    import torch

    hold_as_lora(run)
    for name, value in run.model.named_parameters():
        value.requires_grad_("lora_" in name and value.is_floating_point())
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def _queries(run: SmallRun) -> list[Any]:
    return [layer.module for layer in adapter_layers(run.model) if layer.name.endswith("q_proj")]
