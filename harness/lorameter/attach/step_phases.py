"""The parts of a step: how long it waited for data, went forward, backward, and updated.

On a CPU a part is what the clock says. On a GPU the host runs ahead of the device, and waiting for it at each border
would change the step; so the device stamps the borders (events) and they are read once the step has ended. The wait for
data is the host's on either.

Inside the step a border is noted and no more: what is called between two pieces of somebody's work finds none of its
code in the caches, and takes ten times as long as in a loop of its own. What the borders mean is worked out later.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from lorameter.attach.error_guard import ErrorGuard

Part = Literal["data", "forward", "backward", "optimizer"]
Border = tuple[Part | None, bool, float, Any]
"""The part, whether it begins, the host's clock, and on a GPU an event. Without a part it is so many seconds that are
none's."""


class PhaseTimer:
    """A part of a step: it begins and ends by itself, or with a block. It keeps nothing of either, so one serves all of
    a training: a generator would be made and run twice in the middle of each step."""

    def __init__(self, parts: Parts, part: Part) -> None:
        self._parts = parts
        self._part = part

    def begin(self) -> None:
        """The part begins."""
        parts = self._parts
        parts.borders.append((self._part, True, time.perf_counter(), parts.stamp() if parts.cuda else None))

    def end(self, *error: object) -> None:
        """It has ended, with all that is inside it; nothing where it did not begin."""
        parts = self._parts
        parts.borders.append((self._part, False, time.perf_counter(), parts.stamp() if parts.cuda else None))

    __enter__ = begin
    __exit__ = end


class Parts:
    """Times of the parts of the step under way, each the sum over its occurrences. A part that begins inside another,
    as the passes of a closure do inside its optimizer's update, is none of that one's time."""

    def __init__(self, device: torch.device, shield: ErrorGuard) -> None:
        """`shield`: around what may fail, which on a CPU is nothing."""
        self._shield = shield
        self.cuda = device.type == "cuda"
        self.borders: list[Border] = []
        """Of the step under way, in their order; whoever has the step end begins them anew."""
        self._begun: Border = ("forward", True, 0.0, None)
        self.during: Mapping[Part, PhaseTimer] = {part: PhaseTimer(self, part) for part in get_args(Part)}
        """Each part by its name."""

    def begin(self) -> None:
        """A step begins here."""
        self._begun = "forward", True, time.perf_counter(), self.stamp() if self.cuda else None

    def leave_out(self, seconds: float) -> None:
        """So much of what has just gone is no part of anything; what a device does meanwhile is its own."""
        self.borders.append((None, False, seconds, None))

    def begin_backward(self) -> None:
        """A backward pass begins, and what lies between it and the border before was its forward pass: for a loop whose
        forward passes are not seen by themselves."""
        place, (_, _, at, event) = next(
            ((place, border) for place, border in reversed([*enumerate(self.borders, 1)]) if border[0] is not None),
            (0, self._begun),
        )
        self.borders.insert(place, ("forward", True, at, event))
        now, stamp = time.perf_counter(), self.stamp() if self.cuda else None
        self.borders += [("forward", False, now, stamp), ("backward", True, now, stamp)]

    def stamp(self) -> Any:
        """An event of the device, here and now; None where that fails."""
        return self._shield.run(_new_event)


def _new_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def times_of(borders: Sequence[Border]) -> dict[Part, float]:
    """Seconds of each part that was seen. The device must have done what it was asked.

    Almost all steps of a CPU have parts that follow each other: what these need no more is not done for them, since it
    is done for each step of the training.
    """
    found: dict[Part, float] = {}
    under_way: Part | None = None
    begun = 0.0
    for part, begins, at, event in borders:
        if part is None:
            begun += at
        elif event is not None or under_way != (None if begins else part):
            return _nested_times_of(borders)
        elif begins:
            under_way, begun = part, at
        else:
            under_way, found[part] = None, found.get(part, 0.0) + at - begun
    return found


def _nested_times_of(borders: Sequence[Border]) -> dict[Part, float]:
    """The same of parts that lie in one another, or are the device's."""
    found: dict[Part, float] = {}
    under_way: list[tuple[Part, float, Any]] = []
    """The innermost last, and when each began or went on."""
    for part, begins, at, event in borders:
        if part is None:
            if under_way and under_way[-1][2] is None:
                inner, begun, _ = under_way[-1]
                under_way[-1] = inner, begun + at, None
            continue
        if not begins and all(one != part for one, _, _ in under_way):
            continue
        if under_way:
            inner, begun, stamp = under_way[-1]
            spent = at - begun if stamp is None else stamp.elapsed_time(event) / 1e3
            found[inner] = found.get(inner, 0.0) + spent
        if begins:
            under_way.append((part, at, None if part == "data" else event))
            continue
        while under_way.pop()[0] != part:
            pass
        if under_way:
            outer, _, stamp = under_way[-1]
            under_way[-1] = outer, at, None if stamp is None else event
    return found
