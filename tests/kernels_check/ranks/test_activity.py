"""Tests of how a rank spends a step, from the intervals of its events."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels_check import ranks
from kernels_check.ranks import STEPS, profile_steps, read_times


def test_a_step_that_exchanges_nothing_is_all_its_own():
    """A single rank waits for no other rank and passes a barrier before each step."""
    met = []
    share = profile_steps(lambda: time.sleep(0.02), lambda: met.append(1))
    assert len(met) == STEPS
    assert share.exchange_s == share.exposed_s == 0
    assert 0.02 <= share.own_s <= share.step_s  # the smallest of the steps, and their mean


CPU, GPU = "DeviceType.CPU", "DeviceType.CUDA"


def event(name, begin_s, end_s, *, thread=1, device=CPU, marked=False):
    """Return an event of the profiler, in microseconds."""
    span = SimpleNamespace(start=begin_s * 1e6, end=end_s * 1e6)
    return SimpleNamespace(name=name, time_range=span, thread=thread, device_type=device, is_user_annotation=marked)


def on_cpu(at_s):
    """Return a step of one second: it computes, and gloo exchanges for 0.4 s from the middle on, of which 0.3 s are
    waited for; gloo's thread adds the parts."""
    return [
        event(ranks._STEP, at_s, at_s + 1, marked=True),
        event("aten::mul", at_s, at_s + 0.6),
        event("aten::addmm", at_s + 0.1, at_s + 0.2),
        event("gloo:all_reduce", at_s + 0.5, at_s + 0.9, thread=2, marked=True),
        event("aten::add_", at_s + 0.6, at_s + 0.9, thread=2),
        event("aten::add_", at_s + 0.9, at_s + 1),
    ]


def on_gpu(at_s):
    """Return the same step on a GPU, whose host only launches; host ranges are GPU ranges as well."""
    return [
        event(ranks._STEP, at_s, at_s + 1, marked=True),
        event(ranks._STEP, at_s, at_s + 1, device=GPU, marked=True),
        event("aten::mul", at_s, at_s + 1),
        event("gemm_bf16", at_s, at_s + 0.6, device=GPU),
        event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", at_s + 0.5, at_s + 0.9, device=GPU),
        event("nccl:all_reduce", at_s + 0.5, at_s + 0.9, device=GPU, marked=True),
        event("adamw", at_s + 0.9, at_s + 1, device=GPU),
    ]


@pytest.mark.parametrize(("one", "on_device"), [(on_cpu, False), (on_gpu, True)])
def test_exchange_is_separated_from_concurrent_computation(one, on_device):
    """For gloo and NCCL, each of two steps has 0.4 s of exchange, of which 0.1 s are hidden."""
    share = read_times([*one(3.0), *one(7.0)], on_device=on_device)
    times = {name: getattr(share, name) for name in ("step_s", "exchange_s", "exposed_s", "own_s")}
    assert times == pytest.approx({"step_s": 1.0, "exchange_s": 0.4, "exposed_s": 0.3, "own_s": 0.7})


def test_the_own_time_of_a_rank_is_the_least_of_its_steps():
    """Other load adds to some steps only; shares are those of the mean step."""
    late = [event("aten::mul", 7.6, 8.0)]
    share = read_times([*on_cpu(3.0), *on_cpu(7.0), *late], on_device=False)
    assert share.own_s == pytest.approx(0.7)
    assert share.exposed_s == pytest.approx((0.3 + 0.0) / 2)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("gloo:broadcast", CPU), ("nccl:reduce_scatter", CPU), ("nccl:all_reduce", GPU),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", GPU),
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)", GPU),
    ],
)  # fmt: skip
def test_exchanges_are_known_by_their_names(name, device):
    """The names are those of torch's process groups, and the newer and older ones of NCCL's kernels."""
    events = [
        event(ranks._STEP, 0.0, 1.0),
        event("gemm", 0.0, 0.5, device=GPU),
        event(name, 0.5, 1.0, device=device),
    ]
    assert read_times(events, on_device=True).exchange_s == pytest.approx(0.5)


def test_a_session_without_a_gpu_kernel_has_no_times(monkeypatch):
    """Without GPU events all time would count as the rank's own, whatever it waited for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(ranks, "profile", lambda activities: profile(activities=[ProfilerActivity.CPU]))
    assert profile_steps(lambda: torch.ones(8) @ torch.ones(8), lambda: None) is None
