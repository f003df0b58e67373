"""The clock through which recorded samples reach pytest-benchmark to the bit."""

from __future__ import annotations

from collections.abc import Iterator


class ReplayClock:
    """A clock that gives back recorded durations: each pair of readings is 0 and the next duration, so that their
    difference is the recorded float to the last bit."""

    def __init__(self) -> None:
        self._durations: Iterator[float] = iter(())
        self._started = False

    def load(self, durations: tuple[float, ...]) -> None:
        """The durations to give back, in order."""
        self._durations = iter(durations)
        self._started = False

    def __call__(self) -> float:
        """One reading, in seconds."""
        self._started = not self._started
        return 0.0 if self._started else next(self._durations)
