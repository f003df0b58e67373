"""The energy of a card over the stretches in which a script only trains, from the card's own counter.

What a script does beside (evaluation, saving) is in no stretch, and one that is too short for the counter says nothing
(`harness.machine.watch.energy_between`), so the steps are counted with the stretches that do.
"""

from __future__ import annotations

import time

from harness.attach.follower import StepReading
from harness.machine.nvml import Device
from harness.machine.reading import Reading
from harness.machine.watch import card_of, energy_between


class Energy:
    """Joules of one card, by stretches; asks nothing on a CPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._card: Device | None = None
        self._begun: tuple[float, Reading[float]] | None = None
        self._steps = self._tokens = 0
        self._joules = self._of_steps = self._of_tokens = 0.0
        self._counted = True
        """Whether the tokens of all steps are known."""

    def begin(self) -> None:
        """A stretch of training begins."""
        if self._device.startswith("cuda"):
            self._card = self._card or card_of(self._device).value
            if self._card is not None:
                self._begun = (time.monotonic(), self._card.energy_j())
                self._steps = self._tokens = 0

    def step(self, reading: StepReading) -> None:
        """A step of it."""
        self._steps += 1
        self._tokens += reading.real_tokens or 0
        self._counted = self._counted and reading.real_tokens is not None

    def end(self) -> None:
        """It is over."""
        if self._begun is None or self._card is None:
            return
        (began_s, first), self._begun = self._begun, None
        spent = energy_between(first, self._card.energy_j(), time.monotonic() - began_s)
        if spent.value is not None:
            self._joules += spent.value
            self._of_steps += self._steps
            self._of_tokens += self._tokens

    def values(self) -> dict[str, float]:
        """As of a trial's record; empty where no stretch was long enough."""
        if not self._of_steps:
            return {}
        tokens = {"energy_tokens": self._of_tokens} if self._counted and self._of_tokens else {}
        return {"device_energy_train_j": self._joules, "energy_steps": self._of_steps} | tokens
