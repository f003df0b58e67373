"""What a script's steps showed, as the samples and counts of a trial's record."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.attach.follower import StepReading
from harness.records.record import Failure, Fragment

PARTS = ("data_time_s", "forward_time_s", "backward_time_s", "optimizer_time_s", "gradient_norm")
"""What of a step is kept beside its time, where its source sees it, one a timed step."""


def timed_samples(readings: Sequence[StepReading]) -> dict[str, tuple[float, ...]]:
    """Samples of a turn: times and losses a step, and what a turn held. What one step did not show is left out."""
    samples: dict[str, tuple[float, ...]] = {
        "step_time_s": tuple(one.step_time_s for one in readings),
        "step_cpu_time_s": tuple(one.cpu_time_s for one in readings),
    }
    for name in PARTS:
        samples |= _known(name, [getattr(one, name) for one in readings])
    return samples | untimed_samples("train_loss", "step_real_tokens", readings) | counts_of(readings)


def counts_of(readings: Sequence[StepReading]) -> dict[str, tuple[float, ...]]:
    """What a turn held: sequences, real tokens, padding and the tokens that the loss is over."""
    found: dict[str, tuple[float, ...]] = {}
    real, positions = ([getattr(one, name) for one in readings] for name in ("real_tokens", "padded_tokens"))
    found |= _sum("turn_sequences", [one.sequences for one in readings])
    found |= _sum("turn_real_tokens", real)
    found |= _sum("turn_loss_tokens", [one.loss_tokens for one in readings])
    if None not in real and None not in positions:
        found |= _sum("turn_padded_tokens", [whole - part for whole, part in zip(positions, real, strict=True)])
    return found


def untimed_samples(losses: str, tokens: str, readings: Sequence[StepReading]) -> dict[str, tuple[float, ...]]:
    """Losses and real tokens a step, by these names: of timed and of all other steps alike."""
    return _known(losses, [one.loss for one in readings]) | _known(tokens, [one.real_tokens for one in readings])


def judge_losses(fragment: Fragment, readings: Sequence[StepReading]) -> Fragment:
    """The fragment, as that of an invalid trial where a loss is not finite."""
    for reading in readings:
        if reading.loss is not None and not math.isfinite(reading.loss):
            message = (
                f"the loss is {reading.loss} in step {reading.number}; a diverged run has no result. Lower the "
                "script's learning rate, or let it clip its gradients."
            )
            return fragment.failed("invalid", Failure(phase="train", kind="LossNotFinite", message=message))
    return fragment


def _known(name: str, values: Sequence[float | None]) -> dict[str, tuple[float, ...]]:
    known = tuple(float(value) for value in values if value is not None)
    return {name: known} if known and len(known) == len(values) else {}


def _sum(name: str, values: Sequence[int | None]) -> dict[str, tuple[float, ...]]:
    known = [value for value in values if value is not None]
    return {name: (float(sum(known)),)} if known and len(known) == len(values) else {}
