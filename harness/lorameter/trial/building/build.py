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
from typing import Any

import numpy as np
import torch
from transformers import get_scheduler
from transformers.integrations.liger import apply_liger_kernel

from lorameter.errors import UsageError
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import PeftVariant, Variant
from lorameter.trial.building.base_cache import base_of
from lorameter.trial.building.peft_methods import (
    attach,
    attach_beside,
    make_optimizer,
    reads_data,
    start_prefix,
    unmixable_layers,
    updater,
)
from lorameter.trial.building.planted_slowdown import inject_work
from lorameter.trial.building.shared import SharedBase
from lorameter.trial.data.stream import Batch, TokenStream


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """What trains: the PEFT model, what is called in its place (compiled or not), optimizer and schedule."""

    model: Any
    forward: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    adapter: str
    """Name of the adapter that trains; the model may hold others, of other trials."""
    after_update: Callable[[int], None] | None = None
    """What the method does after each update, given the number of the step from 1."""

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """What trains while this trainee's adapter is active."""
        return tuple(p for p in self.model.parameters() if p.requires_grad)


DATA_BATCHES = 8
"""Batches that an initialisation looks at which looks at data."""
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
        return attach(base, variant, adapter, batches=_batches(request), steps=steps)

    def add(model: Any, adapter: str) -> None:
        seed_everything(request.seed)
        attach_beside(model, variant, adapter)

    model, adapter = shared.adopt(load, add)
    if request.workload.adapters > 1 and (refusing := unmixable_layers(model)):
        raise UsageError(
            f"workload: adapters = {request.workload.adapters}: PEFT answers for no several adapters in one batch by "
            f"{refusing[0]}, of which it adapts a parameter. Leave that layer out of target_modules, or adapters out."
        )
    if isinstance(variant, PeftVariant) and variant.prefix_text:
        start_prefix(model, request.workload.model, variant.prefix_text)
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
    return TrainableModel(model, forward, optimizer, schedule, adapter, updater(model))


def _batches(request: TrialRequest) -> list[Batch]:
    """Inputs for an initialisation that looks at data: those of the first steps; none where it looks at none."""
    if not reads_data(request.variant):
        return []
    stream = TokenStream(Path(request.tokens_path), request.workload, request.variant, request.device)
    batches = [stream.take() for _ in range(DATA_BATCHES)]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


def set_precision(variant: Variant) -> None:
    """Whether float32 products may run on TF32 tensor cores."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if variant.tf32 else "ieee"


def _own_caches(scratch: Path) -> None:
    """Empty compile caches for this trial: a cache that an earlier trial warmed would make this one look faster."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")
