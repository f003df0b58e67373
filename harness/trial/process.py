"""What a measuring process is told before it measures, the forked trial and the cold interpreter alike."""

from __future__ import annotations

import gc
import logging
import resource

import torch

from harness.records.record import TrialRequest
from harness.trial.profiling.pages import give_back_free

INT8_LOGGER = "bitsandbytes.autograd._functions"
"""Warns of a cast in every forward of every int8 layer, which would be inside the timed window."""


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def release_unused(device: str) -> None:
    """Give back what is no longer referenced, so that the next phase's peak and its timed steps do not pay for it.

    The profiler's events refer to each other in cycles, which only the collector frees; the C library then keeps the
    freed heap, and torch's allocator its blocks, unless told otherwise.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    give_back_free()


def prepare_process(request: TrialRequest) -> None:
    """Apply the request's limits to this process, and silence what would log inside the timed window."""
    logging.getLogger(INT8_LOGGER).setLevel(logging.ERROR)
    if request.device == "cpu":
        torch.set_num_threads(request.threads)
        limit = request.protocol.memory_limit_bytes
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
