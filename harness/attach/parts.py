"""The parts of a step: how long it waited for data, went forward, backward, and updated.

On a CPU a part is what the clock says. On a card the host runs ahead of the device, and waiting for it at each border
would change the step; so the device stamps the borders (events) and they are read once the step has ended. The wait for
data is the host's on either.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch

Part = Literal["data", "forward", "backward", "optimizer"]


class Parts:
    """Times of the parts of the step under way, each the sum over its occurrences. A part that begins inside another,
    as the passes of a closure do inside its optimizer's update, is none of that one's time."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[Part, float] = {}
        self._events: dict[Part, list[tuple[Any, Any]]] = {}
        self._open: list[tuple[Part, Any]] = []
        """Parts under way, the innermost last, and when each began or went on."""

    def begin(self, part: Part) -> None:
        """The part begins."""
        if self._open:
            self._close()
        self._open.append((part, self._mark(part)))

    def end(self, part: Part) -> None:
        """It has ended, with all that is inside it; nothing where it did not begin."""
        if not any(one == part for one, _ in self._open):
            return
        self._close()
        while self._open.pop()[0] != part:
            pass
        if self._open:
            outer, _ = self._open[-1]
            self._open[-1] = outer, self._mark(outer)

    def leave_out(self, seconds: float) -> None:
        """So much of what has just gone is no part of anything; what a device does meanwhile is its own."""
        if self._open and isinstance(self._open[-1][1], float):
            part, begun = self._open[-1]
            self._open[-1] = part, begun + seconds

    def _close(self) -> None:
        """The innermost part has been under way until now."""
        part, begun = self._open[-1]
        ended = self._mark(part)
        if isinstance(begun, float):
            self._seconds[part] = self._seconds.get(part, 0.0) + ended - begun
        else:
            self._events.setdefault(part, []).append((begun, ended))

    @contextlib.contextmanager
    def during(self, part: Part) -> Iterator[None]:
        """The block is the part, also where it fails."""
        self.begin(part)
        try:
            yield
        finally:
            self.end(part)

    def _mark(self, part: Part) -> Any:
        if not self._cuda or part == "data":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[Part, float]:
        """Seconds of each part that was seen; the next step begins. The device must have done what it was asked."""
        found = dict(self._seconds)
        for part, pairs in self._events.items():
            found[part] = sum(begun.elapsed_time(ended) for begun, ended in pairs) / 1e3
        self.forget()
        return found

    def forget(self) -> None:
        """What was seen belongs to no step."""
        self._seconds, self._events, self._open = {}, {}, []
