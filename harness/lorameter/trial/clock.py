"""Clocks for timed steps: one instrument, one synchronisation a step.

On CUDA a step is timed with a pair of device events, which the device itself stamps. What the host does after its last
launch is not in the number; where launches are slower than the device, its waiting for them is. On a CPU it is
`perf_counter` and the process's CPU time: their ratio, the occupancy, distinguishes an undisturbed step from a
contended one without looking at the outcome (measured in docs/method.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lap:
    """Time of one call, in seconds: on the device (or the wall, on a CPU), and of the process on all its CPUs."""

    time_s: float
    cpu_time_s: float


class Stopwatch:
    """Times calls on one device. Not shared between threads."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def __call__(self, call: Callable[[], T], meanwhile: Callable[[], object] | None = None) -> tuple[T, Lap]:
        """The result of `call()` and its lap; on CUDA the lap ends when the device has finished.

        `meanwhile` is called on CUDA when all is launched, while the device works and the host would wait for it. What
        it takes is in neither time. On a CPU there is no such moment, and it is not called.
        """
        return self._on_device(call, meanwhile) if self._cuda else self._on_host(call)

    def _on_host(self, call: Callable[[], T]) -> tuple[T, Lap]:
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        wall = time.perf_counter() - wall
        return result, Lap(wall, time.process_time() - cpu)

    def _on_device(self, call: Callable[[], T], meanwhile: Callable[[], object] | None) -> tuple[T, Lap]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        cpu = time.process_time()
        begin.record()
        result = call()
        end.record()
        if meanwhile is not None:
            launched = time.process_time()
            meanwhile()
            cpu += time.process_time() - launched
        torch.cuda.synchronize()
        return result, Lap(begin.elapsed_time(end) / 1e3, time.process_time() - cpu)
