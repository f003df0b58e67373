"""A real, tiny, quantised Llama with a PEFT adapter, an optimizer and a step, as used by the negative controls."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from negative_controls.small_run import SmallRun, build


@pytest.fixture
def training() -> Callable[..., SmallRun]:
    """The builder of small runs."""
    return build


@pytest.fixture
def make_observation() -> Callable[..., Any]:
    """A function that builds observations from attention calls and named fields only.

    Attention without a module call ran in the model itself.
    """
    from torch import nn

    from kernels_check.observe.calls import Calls, ModuleCall
    from kernels_check.observe.digest import Digest
    from kernels_check.observe.observation import Observation
    from kernels_check.observe.profile import StepProfile

    entry = ModuleCall(names=("",), caller=None, with_grad=True, in_backward=False)
    nothing = Digest(parts={}, total_bytes=0, unseen={}, sharded=frozenset(), packed=False)

    def observation(*attention: Any, model: nn.Module | None = None, **given: Any) -> Observation:
        placed = tuple(
            dataclasses.replace(call, call=0) if call.direction == "forward" and call.call is None and not call.compiled
            else call for call in attention
        )  # fmt: skip
        entered = given.pop("entered", ())
        profiled = {"attention": placed, "fourbit": (), "writes": (), "kernels": {}}
        profiled |= {"entered": entered, "compiled_regions": given.pop("regions", len(entered))}
        profiled |= {"compiler_lookups": given.pop("lookups", 0), "eager": frozenset()}
        watched = {"calls": 2, "optimizer_steps": 2, "optimizers": (), "gradients": {}, "changed": frozenset()}
        watched |= {"modules": Calls(all=(entry,)), "modes": {"": True}, "drew_random": False}
        watched |= {"model": model or nn.Identity(), "before": nothing, "after": nothing}
        profile = StepProfile(**{key: given.pop(key, value) for key, value in profiled.items()})
        return Observation(profile=profile, **watched | given)

    return observation
