"""Steps as they were noted when they had ended, and what they showed.

Between two pieces of somebody's training each line costs ten times what it costs in a loop, so that nothing is worked
out there: what may change meanwhile is copied or read, and all the rest is kept as it is until the steps are told.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from lorameter.attach.observer import StepReading
from lorameter.attach.step_phases import Border, times_of
from lorameter.attach.tokens import Copied, Tokens, count_tokens


class FinishedStep(NamedTuple):
    """A step that has ended; of all that cannot be changed a tuple is made the soonest."""

    number: int
    wall_s: float
    cpu_s: float
    borders: Sequence[Border]
    batches: Sequence[Copied]
    loss: float | None
    loss_dtype: torch.dtype | None
    gradient_norm: Any
    """A number, or a scalar of the device that no later step changes."""
    checks: tuple[Any, ...] | None


def readings_of(ended: Sequence[FinishedStep]) -> Iterator[StepReading]:
    """What each of them showed. Waits for the device."""
    counted = iter(count_tokens([batch for one in ended for batch in one.batches]))
    for one in ended:
        yield _reading_of(one, [next(counted) for _ in one.batches])


def _reading_of(ended: FinishedStep, tokens: Sequence[Tokens]) -> StepReading:
    parts, norm = times_of(ended.borders), ended.gradient_norm
    counted = tokens[0] if len(tokens) == 1 else _together(tokens)
    return StepReading(
        number=ended.number,
        step_time_s=ended.wall_s,
        cpu_time_s=ended.cpu_s,
        data_time_s=parts.get("data"),
        forward_time_s=parts.get("forward"),
        backward_time_s=parts.get("backward"),
        optimizer_time_s=parts.get("optimizer"),
        sequences=counted.sequences,
        real_tokens=counted.real,
        padded_tokens=counted.padded,
        loss_tokens=counted.loss,
        loss=ended.loss,
        loss_dtype=None if ended.loss_dtype is None else _name_of(ended.loss_dtype),
        gradient_norm=None if norm is None else float(norm),
        conventions=counted.conventions,
        checks=ended.checks,
    )


def _together(tokens: Sequence[Tokens]) -> Tokens:
    """Those of all batches of a step."""
    return Tokens(
        sequences=_sum([one.sequences for one in tokens]),
        padded=_sum([one.padded for one in tokens]),
        real=_sum([one.real for one in tokens]),
        loss=_sum([one.loss for one in tokens]),
        conventions=tokens[-1].conventions if tokens else (),
    )


def _sum(counts: list[int | None]) -> int | None:
    """None where one of them was not seen, or there is none."""
    known = [count for count in counts if count is not None]
    return sum(known) if counts and len(known) == len(counts) else None


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
