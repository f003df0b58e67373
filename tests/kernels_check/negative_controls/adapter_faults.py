"""Faults that train an adapter in part or not at all, and usual code that looks similar and trains all of it."""

from __future__ import annotations

import threading
from typing import Any

from kernels_check.observe.adapter import adapter_layers
from negative_controls.faults import dropout_off
from negative_controls.small_run import SmallRun


def disable_beside_zeros(run: SmallRun) -> None:
    """Keep ``disable_adapter()`` around the forward; gradients are zero but exist."""
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
    """Disable the adapter's dropout for the second of two micro-batches only."""

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
    """Freeze one of the factors."""
    for name, value in run.model.named_parameters():
        if ".lora_A." in name:
            value.requires_grad_(False)


def use_lora_fa(run: SmallRun) -> None:
    """Train with PEFT's LoRA-FA, whose optimizer freezes lora_A and needs its value."""
    from peft.optimizers import create_lorafa_optimizer

    run.optimizer = create_lorafa_optimizer(run.model, r=4, lora_alpha=8, lr=1e-3)


def minimise_sharpness(run: SmallRun, *, undone: bool = False) -> None:
    """Train with SAM around a torch optimizer; undone: also reload the weights before each step."""
    import torch

    class Sharpness(torch.optim.Optimizer):
        """Takes the gradient at an uphill point, then steps the base optimizer from the original point."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})
            self.base = torch.optim.SGD(self.param_groups, lr=0.1)
            self.param_groups = self.base.param_groups

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            """Take two passes and an update."""
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
    """Execute the whole step in another thread."""
    sound = run.step

    def step() -> None:
        thread = threading.Thread(target=sound)
        thread.start()
        thread.join()

    run.step = step  # type: ignore[method-assign]


def share_a_factor(run: SmallRun) -> None:
    """Let two query layers share their lora_A."""
    import torch

    first, second = _queries(run)
    second.lora_A["default"] = first.lora_A["default"]
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def pass_one_by(run: SmallRun) -> None:
    """Share a factor, and call the base layer in place of the second adapter layer."""
    share_a_factor(run)
    _, second = _queries(run)
    second.forward = second.base_layer.forward


def sparse_table() -> Any:
    """Return LoRA with a fully trained copy of the embedding."""
    import peft

    return peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])


def send_sparse_gradients(run: SmallRun) -> None:
    """Let the trained embedding produce sparse gradients."""
    import torch

    for name, module in run.model.named_modules():
        if name.endswith("modules_to_save.default"):
            module.sparse = True
    run.optimizer = torch.optim.SGD([value for value in run.model.parameters() if value.requires_grad], lr=0.5)


def forget_the_table(run: SmallRun) -> None:
    """Produce sparse gradients, and leave the embedding out of the optimizer."""
    import torch

    send_sparse_gradients(run)
    named = run.model.named_parameters()
    factors = [value for name, value in named if value.requires_grad and "modules_to_save" not in name]
    run.optimizer = torch.optim.SGD(factors, lr=0.5)


def hold_as_lora(run: SmallRun) -> None:
    """Hold the model in an own module whose attribute name contains "lora"."""
    from torch import nn

    class Learner(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.lora_model = model

        def forward(self, **inputs: Any) -> Any:
            return self.lora_model(**inputs)

    run.model = Learner(run.model)


def train_base_held_as_lora(run: SmallRun) -> None:
    """Train all floating-point weights of a base below such a name."""
    import torch

    hold_as_lora(run)
    for name, value in run.model.named_parameters():
        value.requires_grad_("lora_" in name and value.is_floating_point())
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def _queries(run: SmallRun) -> list[Any]:
    return [layer.module for layer in adapter_layers(run.model) if layer.name.endswith("q_proj")]
