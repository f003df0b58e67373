"""Peaks of memory of a training, each phase for itself: what an evaluation takes is none of what a step takes."""

from __future__ import annotations

from lorameter.attach.observer import Phase
from lorameter.machine.memory import PeakMemoryTracker


class Peaks:
    """The highest that each phase has come to so far, in the process that asks."""

    def __init__(self, device: str) -> None:
        """Nothing counts yet; a training is what comes first."""
        self._gauge = PeakMemoryTracker(device)
        self._found: dict[str, int] = {}
        self.phase: Phase = "train"
        """What the training does now."""

    def begin(self) -> None:
        """From here on they count."""
        self._gauge.begin()

    def enter(self, phase: Phase) -> None:
        """The phase under way has ended, and this one begins."""
        self._keep()
        self.phase = phase
        self._gauge.begin()

    def so_far(self) -> dict[str, int]:
        """Bytes by their names in a record, that of the phase under way among them."""
        self._keep()
        return dict(self._found)

    def _keep(self) -> None:
        for name, size in self._gauge.peaks(self.phase).items():
            self._found[name] = max(size, self._found.get(name, 0))
