"""A real, tiny, quantised Llama with a PEFT adapter, an optimizer and a step: that of the negative controls."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from functools import partial

import pytest

from kernels_check.controls.small_run import SmallRun, build


@pytest.fixture(params=["profile", "spy"])
def instrument(request: pytest.FixtureRequest) -> str:
    """Both instruments, which must agree."""
    return str(request.param)


@pytest.fixture
def training(instrument: str) -> Callable[..., SmallRun]:
    """The builder of small runs."""
    return partial(build, instrument=instrument)
