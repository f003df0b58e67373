"""How a measuring process is set up, forked or cold, and how it gives memory back."""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
import time
from pathlib import Path

import torch

from lorameter.studies.request import TrialRequest

INT8_LOGGER = "bitsandbytes.autograd._functions"
"""Warns of a cast in every forward of every int8 layer, which would be inside the timed window."""


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def start_device(device: str) -> dict[str, float]:
    """Have the device start before anything on it is timed, and how long that took: of CUDA its context, which would
    else be in the time of the load. A CPU needs no start, and has no such number."""
    if not device.startswith("cuda"):
        return {}
    begin = time.perf_counter()
    synchronize(device)
    return {"device_start_time_s": time.perf_counter() - begin}


def release_unused(device: str) -> None:
    """Give back what is no longer referenced, so that the next phase's peak and its timed steps do not pay for it.

    The profiler's events refer to each other in cycles, which only the collector frees; the C library then keeps the
    freed heap, and torch's allocator its blocks.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    give_back_free()


def prepare_process(request: TrialRequest) -> None:
    """Apply the request's limits to this process, and silence what would log inside the timed window."""
    logging.getLogger(INT8_LOGGER).setLevel(logging.ERROR)
    limit_threads(request.device, request.threads)
    limit = request.protocol.memory_limit_bytes
    if request.device == "cpu" and limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_threads(device: str, threads: int) -> None:
    """Compute with so many threads on a CPU."""
    if device == "cpu":
        torch.set_num_threads(threads)


_STATM = Path("/proc/self/statm")


def resident_now() -> int:
    """Bytes of the resident set; some microseconds."""
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def give_back_free() -> None:
    """Have malloc give back every page that holds nothing, where the C library has malloc_trim(3), which is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
