"""What a measuring process is told before it measures, the forked trial and the cold interpreter alike."""

from __future__ import annotations

import logging
import resource

import torch

from harness.record import TrialRequest

INT8_LOGGER = "bitsandbytes.autograd._functions"
"""Warns of a cast in every forward of every int8 layer, which would be inside the timed window."""


def prepare_process(request: TrialRequest) -> None:
    """Apply the request's limits to this process, and silence what would log inside the timed window."""
    logging.getLogger(INT8_LOGGER).setLevel(logging.ERROR)
    if request.device == "cpu":
        torch.set_num_threads(request.threads)
        limit = request.protocol.memory_limit_bytes
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
