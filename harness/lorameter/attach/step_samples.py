"""What a script's steps add up to: warm-up, the one that was watched, and the timed ones, as samples of a trial.

Every step of a training is told, and which of them count is decided as for any trial: the first is a number of its own,
the warm-up ends when the steps are steady, a step that a check looked on at has no time, and the rest is timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorameter.attach.observer import StepReading
from lorameter.attach.samples import timed_columns, timed_samples, untimed_columns, untimed_samples
from lorameter.records.record import Failure
from lorameter.stats import is_steady, is_warm
from lorameter.studies.protocol import Protocol

MOST_TIMED = 10_000
"""Timed steps that are kept: a record is read whole, and the later steps of a long training say no more."""


class StepSamples:
    """The steps of one training."""

    def __init__(self, planned_steps: int | None) -> None:
        """`planned_steps`: of the training; a warm-up takes no more than a third of them."""
        protocol = Protocol()
        self._least = protocol.warmup_steps_min
        most = protocol.warmup_steps_max
        self._most = most if planned_steps is None else max(self._least, min(most, planned_steps // 3))
        self._first: StepReading | None = None
        self._warm: list[StepReading] = []
        self._timed: list[StepReading] = []
        self.steady = False
        self.warm = False
        """Whether the warm-up is over."""
        self.steps = 0
        """All steps."""
        self.conventions: tuple[str, ...] = ()
        """How tokens were counted, in words."""
        self._last_conventions: tuple[str, ...] = ()
        self.not_finite: Failure | None = None
        """That of the first step whose loss is no number."""

    def add(self, reading: StepReading) -> dict[str, float | None]:
        """One more step; what it adds to the samples."""
        self.steps += 1
        if reading.conventions != self._last_conventions:
            self._last_conventions = reading.conventions
            self.conventions = tuple(dict.fromkeys((*self.conventions, *reading.conventions)))
        if self.not_finite is None:
            self.not_finite = loss_not_finite([reading])
        if reading.checks is not None:
            return {}
        early = untimed_columns("warmup_loss", "warmup_tokens", reading)
        if self._first is None:
            self._first = reading
            return early
        if not self.warm:
            self._warm.append(reading)
            self._look()
            return early | {"warmup_step_time_s": reading.step_time_s}
        if len(self._timed) < MOST_TIMED:
            self._timed.append(reading)
            return timed_columns(reading)
        return {}

    def _look(self) -> None:
        times = [one.step_time_s for one in self._warm]
        if len(times) >= self._least:
            self.steady = is_steady(times)
            self.warm = is_warm(times, self._least, self._most)

    @property
    def timed(self) -> int:
        """Steps that are timed."""
        return len(self._timed)

    @property
    def timed_numbers(self) -> tuple[int, ...]:
        """Which steps these are, from 1."""
        return tuple(reading.number for reading in self._timed)

    def samples(self) -> dict[str, tuple[float, ...]]:
        """As of a trial's record, each timed step a turn of its own."""
        early = [*([] if self._first is None else [self._first]), *self._warm]
        found = timed_samples([(reading,) for reading in self._timed])
        found |= untimed_samples("warmup_loss", "warmup_tokens", early)
        return found | ({"warmup_step_time_s": tuple(one.step_time_s for one in self._warm)} if self._warm else {})

    def values(self) -> dict[str, float]:
        """As of a trial's record."""
        found = {"training_steps": float(self.steps)}
        if self._first is not None:
            found["first_step_time_s"] = self._first.step_time_s
        return found | ({"warmup_steady": float(self.steady)} if self.warm else {})


def loss_not_finite(readings: Sequence[StepReading]) -> Failure | None:
    """The failure of a training in which the loss of a step is no number; None where all are."""
    for reading in readings:
        if reading.loss is not None and not math.isfinite(reading.loss):
            message = (
                f"the loss is {reading.loss} in step {reading.number}; a diverged run has no result. Lower the "
                "script's learning rate, or let it clip its gradients."
            )
            return Failure(phase="train", kind="LossNotFinite", message=message)
    return None


def tokens_in(samples: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    """What the record of a trial says of its tokens: real ones and padding, of all timed steps."""
    counts = {"real_tokens": samples.get("turn_tokens", ()), "padded_tokens": samples.get("turn_padded_tokens", ())}
    return {name: int(sum(found)) for name, found in counts.items() if found}
