"""The borders between the phases of a step or a request, and the time between them.

On CUDA a border is an event, which the device stamps when it comes to it and the host does not wait for; a phase's time
is then the device's own, with its waiting for launches in it. On a CPU it is a reading of a clock. Under the profiler
it is a mark in the records; they tell a kernel's phase by the host's clock, so the device ends with each phase.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.profiler import record_function

from lorameter.trial.process import synchronize
from lorameter.trial.profiling.activity import MARK


class Phases:
    """The time of each phase, one after the other or with something between them."""

    def __init__(self, names: Sequence[str], device: str) -> None:
        """`names` are all that there are; `device` is as torch names it."""
        self._names = tuple(names)
        self._device = device
        self._times_s = dict.fromkeys(self._names, 0.0)
        self._events: list[tuple[str, Any, Any]] = []
        self._phase = ""
        self._since: Any = None
        self._mark: Any = None
        self.marked = False
        """Whether phases are marked for the profiler, and not timed."""

    def begin(self, *, marked: bool = False) -> None:
        """Start from zero, in no phase."""
        self._leave()
        self.marked = marked
        self._events = []
        self._times_s = dict.fromkeys(self._names, 0.0)
        synchronize(self._device)

    def turn(self, phase: str) -> None:
        """End the phase that is on, and begin this one; "" begins none."""
        if self.marked:
            if self._mark is not None:
                synchronize(self._device)
            self._leave()
            if phase:
                self._mark = record_function(MARK + phase)
                self._mark.__enter__()
            return
        now = self._stamp()
        if self._phase and self._on_cuda:
            self._events.append((self._phase, self._since, now))
        elif self._phase:
            self._times_s[self._phase] += now - self._since
        self._phase, self._since = phase, now

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Begin with this phase, and end with whatever phase is on then; one that an exception ends has no time."""
        self.turn(phase)
        try:
            yield
            self.turn("")
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        """Be in no phase, without a border: nothing is asked of a device that may not answer any more."""
        mark, self._phase, self._since, self._mark = self._mark, "", None, None
        if mark is not None:
            mark.__exit__(None, None, None)

    def times_s(self) -> dict[str, float]:
        """Seconds of each phase since `begin`; the device must have finished."""
        for name, begin, end in self._events:
            self._times_s[name] += begin.elapsed_time(end) / 1e3
        self._events = []
        return self._times_s

    @property
    def _on_cuda(self) -> bool:
        return self._device.startswith("cuda")

    def _stamp(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
