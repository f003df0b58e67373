"""Waiting for the device."""

from __future__ import annotations

import torch


def synchronise() -> None:
    """Wait for the device, where one is in use; never initialises CUDA."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
