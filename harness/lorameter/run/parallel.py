"""What is not timed, on as many idle cores as there are: commands of several processes at once.

Building a model, checking a step, warming up and a first request are in no number, and on a real model they take most
of a run. So they are carried out side by side, as many processes at once as there are cores for their threads, and
whoever has answered makes room for the next. When the last has answered nothing is at work any more: what is timed
comes after that, and is alone as ever.
"""

from __future__ import annotations

import math
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

W = TypeVar("W", bound="Readable")


class Readable(Protocol):
    """What can be waited for."""

    def fileno(self) -> int:
        """Of what can be read then."""


@dataclass(slots=True)
class WorkerTasks:
    """What one process is asked, one thing after the other."""

    worker: Any
    asked: deque[tuple[str, str]]
    """Commands and the trials that they are for."""


def walk(
    errands: Iterable[WorkerTasks],
    *,
    lanes: int,
    begin: Callable[[WorkerTasks, str, str], bool],
    end: Callable[[WorkerTasks, str, str], None],
    timeout_s: float,
) -> None:
    """Carry errands out, so many processes at once, in their order.

    Args:
        errands: each of another process.
        lanes: processes that may be at work at once.
        begin: sends a command; returns whether there was anything to be sent.
        end: takes the answer to it; what is left of an errand is asked after that.
        timeout_s: how long an answer may take; one that has not come by then is taken by `end` all the same, which
            finds nothing.
    """
    waiting = deque(errands)
    at_work: dict[int, tuple[WorkerTasks, str, str, float]] = {}

    def go_on(errand: WorkerTasks) -> None:
        while errand.asked:
            command, trial = errand.asked.popleft()
            if begin(errand, command, trial):
                at_work[id(errand)] = errand, command, trial, time.monotonic() + timeout_s
                return

    while waiting or at_work:
        while waiting and len(at_work) < lanes:
            go_on(waiting.popleft())
        if not at_work:
            continue
        first = first_to_answer([one[0].worker for one in at_work.values()], min(one[3] for one in at_work.values()))
        errand, command, trial, _ = next(one for one in at_work.values() if one[0].worker is first)
        del at_work[id(errand)]
        end(errand, command, trial)
        waiting.append(errand)  # behind those that wait, so that at the end no long errand is left alone


def first_to_answer(workers: Sequence[W], deadline: float) -> W:
    """The one that has answered or died, the longest asked of several; the first of all where none has by then."""
    watched = select.poll()  # select() knows no descriptor above 1023
    by_number = {worker.fileno(): worker for worker in workers}
    for number in by_number:
        watched.register(number, select.POLLIN)
    left_ms = None if math.isinf(deadline) else 1000 * max(0.0, deadline - time.monotonic())
    ready = {number for number, _ in watched.poll(left_ms)}
    return next((worker for number, worker in by_number.items() if number in ready), workers[0])
