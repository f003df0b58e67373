"""From a variant to something that can take a step: model with adapter, optimizer, schedule.

Everything is PEFT's, bitsandbytes' and torch's own; this module only translates names. Seeding happens here and
nowhere else: before the adapter is attached (its A matrices are random) and before the first step (dropout).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import get_scheduler
from transformers.integrations.liger import apply_liger_kernel

from lorameter.errors import UsageError
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import Variant
from lorameter.trial.building.base_cache import base_of
from lorameter.trial.building.lora import attach, attach_beside, unmixable_layers
from lorameter.trial.building.planted_slowdown import inject_work
from lorameter.trial.building.shared import SharedBase


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """What trains: the PEFT model, what is called in its place (compiled or not), optimizer and schedule."""

    model: Any
    forward: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    adapter: str
    """Name of the adapter that trains; the model may hold others, of other trials."""

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """What trains while this trainee's adapter is active."""
        return tuple(p for p in self.model.parameters() if p.requires_grad)


_APART = 1_000_003
"""Between the seeds of two ranks: no replicate has so many."""


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build(
    request: TrialRequest,
    *,
    steps: int,
    shared: SharedBase,
    distribute: Callable[[Any], Any] | None = None,
    rank: int = 0,
) -> TrainableModel:
    """Take the base if this process has none yet, attach the adapter, make the optimizer.

    Args:
        request: variant, workload, device and seed.
        steps: optimizer steps that the schedule must span.
        shared: the base of this process, and the trials that are on it already.
        distribute: has the model train together with those of other ranks; returns what is called in its place.
        rank: of this process among those, each of which draws its own dropout.
    """
    variant = request.variant
    set_precision(variant)

    def load(adapter: str) -> Any:
        base, made = base_of(request)
        shared.conversions += made
        if variant.liger_kernel:
            apply_liger_kernel(base, None)  # before the adapter: it swaps the forwards of the model's own classes
        seed_everything(request.seed)
        return attach(base, variant, adapter)

    def add(model: Any, adapter: str) -> None:
        seed_everything(request.seed)
        attach_beside(model, variant, adapter)

    model, adapter = shared.adopt(load, add)
    if request.workload.adapters > 1 and (refusing := unmixable_layers(model)):
        raise UsageError(
            f"workload: adapters = {request.workload.adapters}: PEFT answers for no several adapters in one batch by "
            f"{refusing[0]}, of which it adapts a parameter. Leave that layer out of target_modules, or adapters out."
        )
    if request.slowdown_rows:
        inject_work(model, request.slowdown_rows)
    model.train()
    forward = model if distribute is None else distribute(model)  # before the optimizer: a shard is another parameter
    optimizer = make_optimizer(model, variant)
    schedule = get_scheduler(
        variant.schedule, optimizer, num_warmup_steps=round(variant.warmup_ratio * steps), num_training_steps=steps
    )
    if variant.compile:
        _own_caches(Path(request.scratch))
        forward = torch.compile(model)
    seed_everything(request.seed + 1 + rank * _APART)
    return TrainableModel(model, forward, optimizer, schedule, adapter)


def make_optimizer(model: Any, variant: Variant) -> torch.optim.Optimizer:
    """The variant's optimizer over the trainable parameters only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"lr": variant.learning_rate, "weight_decay": variant.weight_decay}
    if variant.optimizer in ("adamw", "adamw_fused"):
        return torch.optim.AdamW(parameters, fused=variant.optimizer == "adamw_fused" or None, **options)
    import bitsandbytes

    paged = {"paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}[variant.optimizer]
    return cast(torch.optim.Optimizer, getattr(bitsandbytes.optim, paged)(parameters, **options))


def set_precision(variant: Variant) -> None:
    """Whether float32 products may run on TF32 tensor cores."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if variant.tf32 else "ieee"


def _own_caches(scratch: Path) -> None:
    """Empty compile caches for this trial: a cache that an earlier trial warmed would make this one look faster."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")
