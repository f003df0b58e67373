"""A real, tiny, quantised Llama with a PEFT adapter, an optimizer and a step: that of the negative controls."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from functools import partial
from typing import Any

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


@pytest.fixture
def seen() -> Callable[..., Any]:
    """Observations of which only what matters is given: attention calls, and fields by name."""
    from torch import nn

    from kernels_check.observation.calls import Calls
    from kernels_check.observation.events import StepProfile
    from kernels_check.observation.observe import Observation
    from kernels_check.observation.storage import Digest

    nothing = Digest(tensors={}, hashed_bytes=0, total_bytes=0, packed=False)

    def observation(*attention: Any, model: nn.Module | None = None, **given: Any) -> Observation:
        profiled = {"attention": attention, "fourbit": (), "optimizer_ops": {}, "kernels": {}, "unclassified": {}}
        profiled |= {"compiled_regions": 0, "compiler_lookups": 0}
        watched = {"calls": 2, "optimizer_steps": 2, "optimizers": (), "gradients": {}, "changed": frozenset()}
        watched |= {"modules": Calls(), "modes": {"": True}, "drew_random": False}
        watched |= {"model": model or nn.Identity(), "before": nothing, "after": nothing}
        profile = StepProfile(**{key: given.pop(key, value) for key, value in profiled.items()})
        return Observation(profile=profile, **watched | given)

    return observation
