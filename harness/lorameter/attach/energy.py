"""The energy of a GPU over the stretches in which a script only trains, from the GPU's own counter.

What a script does beside (evaluation, saving) is in no stretch, and one that is too short for the counter says nothing
(`lorameter.machine.telemetry.energy_between`), so the steps are counted with the stretches that do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lorameter.attach.observer import StepReading
from lorameter.machine.nvml import NvmlDevice
from lorameter.machine.reading import Reading
from lorameter.machine.telemetry import card_of, energy_between


class Energy:
    """Joules of one GPU, by stretches; asks nothing on a CPU."""

    def __init__(self, device: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._clock = clock
        self._card: NvmlDevice | None = None
        self._begun: tuple[float, Reading[float]] | None = None
        self._steps = self._tokens = self._of_steps = self._of_tokens = 0
        self._joules = 0.0
        self._counted = True
        """Whether the tokens of all steps are known."""

    def begin(self) -> None:
        """A stretch of training begins."""
        if self._device.startswith("cuda"):
            self._card = self._card or card_of(self._device).value
            if self._card is not None:
                self._begun = (self._clock(), self._card.energy_j())
                self._steps = self._tokens = 0

    def step(self, reading: StepReading) -> None:
        """A step of it."""
        self._steps += 1
        self._tokens += reading.real_tokens or 0
        self._counted = self._counted and reading.real_tokens is not None

    def end(self) -> None:
        """It is over."""
        self._joules, self._of_steps, self._of_tokens = self._so_far()
        self._begun = None

    def _so_far(self) -> tuple[float, int, int]:
        """Joules of all stretches, with their steps and tokens, that of the one under way as far as it has come."""
        joules, steps, tokens = self._joules, self._of_steps, self._of_tokens
        if self._begun is not None and self._card is not None:
            began_s, first = self._begun
            spent = energy_between(first, self._card.energy_j(), self._clock() - began_s)
            if spent.value is not None:
                joules, steps, tokens = joules + spent.value, steps + self._steps, tokens + self._tokens
        return joules, steps, tokens

    def values(self) -> dict[str, float]:
        """As of a trial's record; empty where no stretch was long enough."""
        joules, of_steps, of_tokens = self._so_far()
        if not of_steps:
            return {}
        tokens = {"energy_tokens": of_tokens} if self._counted and of_tokens else {}
        return {"device_energy_train_j": joules, "energy_steps": of_steps} | tokens
