"""One training step as in a plain training loop, and the held-out loss.

The step contains no work of the harness; a self-test compares its time with that of a plain loop. `use_cache=False` is
passed to every forward pass, in training and evaluation: with a cache, transformers skips the detection of packed
records, and their isolation is silently lost (about 29 logits leak; kernels_check tests this).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from lorameter.studies.variant import Variant
from lorameter.trial.building.base_model import evaluation_mode
from lorameter.trial.building.build import TrainableModel
from lorameter.trial.data.stream import Batch, TokenStream

_FORWARD: dict[str, Any] = {"use_cache": False}


def compute_loss(forward: Any, batch: Batch, *, device: str, autocast: str | None = None) -> torch.Tensor:
    """Mean loss over the labelled tokens of a batch, computed by `forward` as in a training step; `autocast` is the
    autocast dtype, if any."""
    context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if autocast:
        context = torch.autocast(device.split(":")[0], dtype=getattr(torch, autocast))
    with context:
        loss: torch.Tensor = forward(**batch, **_FORWARD).loss
    return loss


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The arguments of the forward pass for a batch, without labels; to probe the logits."""
    return {key: value for key, value in batch.items() if key != "labels"} | _FORWARD


class TrainStep:
    """A callable that runs one optimizer step on the next batches and returns its mean loss, still on the device."""

    def __init__(self, trainee: TrainableModel, stream: TokenStream, variant: Variant, device: str) -> None:
        self._trainee = trainee
        self._stream = stream
        self._updates = 0
        self._accumulate = variant.gradient_accumulation
        self._clip = variant.max_grad_norm
        self._trained = trainee.parameters
        self._device = device
        self._autocast = variant.autocast

    def __call__(self) -> torch.Tensor:
        """Run forward and backward passes over the accumulated batches, clip, step and schedule."""
        total = self.gradients()
        self.update()
        return total

    def gradients(self) -> torch.Tensor:
        """Run forward and backward passes over the accumulated batches; returns their mean loss."""
        total = self.backward(self.loss(self.take())).float()
        for _ in range(1, self._accumulate):
            total += self.backward(self.loss(self.take()))
        return total

    def take(self) -> Batch:
        """The next batch."""
        return self._stream.take()

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean loss over the labelled tokens of a batch."""
        return compute_loss(self._trainee.forward, batch, device=self._device, autocast=self._autocast)

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Add a batch's gradients to those of the step; returns its part of the step's loss."""
        part = loss if self._accumulate == 1 else loss / self._accumulate
        part.backward()
        return part.detach()

    def update(self) -> None:
        """Clip, step, schedule, and release the gradients."""
        trainee = self._trainee
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        trainee.optimizer.step()
        self._updates += 1
        if trainee.after_update is not None:
            trainee.after_update(self._updates)
        trainee.schedule.step()
        trainee.optimizer.zero_grad(set_to_none=True)

    def held_out_loss(self) -> float:
        """Mean loss over all labelled held-out tokens, without dropout; model, optimizer and random state do not
        change."""
        total, count = 0.0, 0
        with evaluation_mode(self._trainee.model):
            for batch in self._stream.held_out():
                labelled = int((batch["labels"][:, 1:] != -100).sum())
                total += float(self.loss(batch)) * labelled
                count += labelled
        return total / count
