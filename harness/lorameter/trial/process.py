"""Sets up a measuring process, times its steps, and releases its memory."""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from lorameter.studies.request import TrialRequest

INT8_LOGGER = "bitsandbytes.autograd._functions"
"""Logs a cast in every forward of every int8 layer, which would be inside the timed window."""


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def start_device(device: str) -> dict[str, float]:
    """Start the device before anything on it is timed, and return the seconds. CUDA creates its context here, which
    would otherwise be in the load time. A CPU needs no start and has no such value."""
    if not device.startswith("cuda"):
        return {}
    begin = time.perf_counter()
    synchronize(device)
    return {"device_start_time_s": time.perf_counter() - begin}


def release_unused(device: str) -> None:
    """Release unreferenced memory, so that it is neither in the next phase's peak nor freed in its timed steps.

    The profiler's events form reference cycles, which only garbage collection frees; afterwards the C library keeps the
    freed heap, and torch's allocator keeps its blocks.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    give_back_free()


def prepare_process(request: TrialRequest) -> None:
    """Apply the request's limits to this process, and silence loggers that would write inside the timed window."""
    logging.getLogger(INT8_LOGGER).setLevel(logging.ERROR)
    limit_threads(request.device, request.threads)
    limit = request.protocol.memory_limit_bytes
    if request.device == "cpu" and limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_threads(device: str, threads: int) -> None:
    """Limit the threads of torch on a CPU."""
    if device == "cpu":
        torch.set_num_threads(threads)


def give_back_free() -> None:
    """Return free pages of the heap to the system, if the C library has glibc's malloc_trim(3)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# --- clock ------------------------------------------------------------------------------------------------------------


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lap:
    """Time of one call in seconds: on the device (or wall time on a CPU), and CPU time of the process."""

    time_s: float
    cpu_time_s: float


class Stopwatch:
    """Times calls on one device with one method, with one synchronisation a call. Not thread-safe.

    On CUDA a call is timed with a pair of device events. The time excludes the host's work after its last launch, and
    includes the device's waiting if launches are slower than the device. On a CPU it is timed with `perf_counter` and
    the process's CPU time: their ratio, the occupancy, distinguishes an undisturbed step from a contended one
    independently of its time (measured in docs/method.md).
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def __call__(self, call: Callable[[], T], meanwhile: Callable[[], object] | None = None) -> tuple[T, Lap]:
        """The result of `call()` and its lap; on CUDA the lap ends when the device has finished.

        `meanwhile` is called on CUDA after all launches, while the host would wait for the device; neither time
        includes it. On a CPU it is not called.
        """
        if not self._cuda:
            cpu, wall = time.process_time(), time.perf_counter()
            result = call()
            wall = time.perf_counter() - wall
            return result, Lap(wall, time.process_time() - cpu)
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
