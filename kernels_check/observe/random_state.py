"""The generators of random numbers, and the way back."""

from __future__ import annotations

import random
import sys

import torch


class RandomState:
    """The generators of Python, NumPy (if loaded), torch on the CPU, and CUDA (if initialised)."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._python = random.getstate()
        self._numpy = numpy.random.get_state() if numpy is not None else None
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Set every generator back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)

    def advanced(self) -> bool:
        """Whether torch drew random numbers since."""
        moved = not torch.equal(self._torch, torch.get_rng_state())
        if self._cuda is None:
            return moved
        pairs = zip(self._cuda, torch.cuda.get_rng_state_all(), strict=True)
        return moved or any(not torch.equal(before, now) for before, now in pairs)
