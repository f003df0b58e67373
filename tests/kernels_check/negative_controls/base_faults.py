"""Faults of a run's base after it was built, and healthy variations that look similar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernels_check.observe.adapter import adapter_layers
from negative_controls.small_run import SmallRun


def after_each_step(run: SmallRun, change: Callable[[], object]) -> None:
    """Call a function at the end of every update."""
    run.optimizer.register_step_post_hook(lambda *_: change())


def normalise_batches(run: SmallRun) -> None:
    """Append a batch norm, as in vision towers, and leave it in train mode."""
    from torch import Tensor, nn

    class Normalised(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.statistics = norm, nn.BatchNorm1d(128, affine=False)

        def forward(self, hidden: Tensor) -> Tensor:
            hidden = self.norm(hidden)
            normalised: Tensor = self.statistics(hidden.float().transpose(1, 2)).transpose(1, 2)
            return normalised.to(hidden.dtype)

    body = run.model.base_model.model.model
    body.norm = Normalised(body.norm)


def normalise_as_loaded(run: SmallRun) -> None:
    """Append a batch norm as ``normalise_batches`` does, with fixed statistics."""
    normalise_batches(run)
    run.model.base_model.model.model.norm.statistics.eval()


def drift_offset(run: SmallRun) -> None:
    """Change the offset of all scales of a weight."""
    layer = adapter_layers(run.model)[1].base
    after_each_step(run, lambda: layer.weight.quant_state.offset.add_(1e-3))


def drift_int8_scales(run: SmallRun) -> None:
    """Change the scales, which the first forward has moved to the layer."""
    layer = adapter_layers(run.model)[0].base
    after_each_step(run, lambda: layer.state.SCB.add_(1))


def add_biases(run: SmallRun, bias: str = "none") -> None:
    """Give the targets biases, and attach the adapter again."""
    import peft
    import torch

    base = run.model.unload()
    for layer in base.model.layers:
        for target in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            zeros = torch.zeros(target.out_features, dtype=target.weight.dtype)
            target.bias = torch.nn.Parameter(zeros.to(target.weight.device), requires_grad=False)
    run.model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias=bias)).train()
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def train_biases(run: SmallRun) -> None:
    """Let PEFT train the biases of the targets with the adapter."""
    add_biases(run, "lora_only")


def train_biases_of_another(run: SmallRun) -> None:
    """Switch to an adapter without trained biases; PEFT leaves those of the first one trainable."""
    import peft
    import torch

    train_biases(run)
    run.model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    run.model.set_adapter("second")
    run.optimizer = torch.optim.AdamW([value for value in run.model.parameters() if value.requires_grad], lr=1e-3)


def add_experts(run: SmallRun) -> Any:
    """Add experts whose weights are one parameter, which quantisation of linear layers does not reach."""
    import torch
    from torch import nn

    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.randn(4, 128, 128).bfloat16(), requires_grad=False)
    run.model.base_model.model.experts = experts
    return experts


def add_quantised_experts(run: SmallRun) -> None:
    """Add experts as ``add_experts`` does, quantised by a parametrisation."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    replace_parameter_4bit(add_experts(run), "gate_up_proj", quant_type="nf4")


def take_scales_of_another(run: SmallRun) -> None:
    """Swap the quantisation state of two layers, as a loader with wrong keys does."""
    first, second = (layer.base for layer in adapter_layers(run.model) if layer.name.endswith("q_proj"))
    first.weight.quant_state = second.weight.quant_state
