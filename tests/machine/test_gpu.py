"""Tests of the meters against each other on a real GPU: events and wall time, energy counter and power, NVML and the
allocator."""

from __future__ import annotations

import itertools
import statistics
import time

import pytest
import torch

from lorameter.machine.host import PeakMemoryTracker
from lorameter.machine.nvml import IDLE
from lorameter.machine.telemetry import COUNTER_PERIOD_S, open_torch_gpu
from lorameter.trial.process import Stopwatch

pytestmark = pytest.mark.gpu


@pytest.fixture
def work():
    """A function that queues the given number of large products on the GPU without waiting."""
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def multiply(times):
        for _ in range(times):
            left @ left

    multiply(5)
    torch.cuda.synchronize()
    return multiply


@pytest.fixture
def gpu():
    """The GPU of torch, opened with NVML."""
    found = open_torch_gpu("cuda")
    if found.value is None:
        pytest.skip(f"NVML does not find the GPU of torch: {found.reason}")
    return found.value


def test_device_events_agree_with_the_wall(work):
    """The median ratio of event time to wall time of synchronised steps is within 1 % of 1."""
    watch = Stopwatch("cuda")
    ratios = []
    for _ in range(9):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        _, lap = watch(lambda: work(40))
        ratios.append(lap.time_s / (time.perf_counter() - begin))
    assert sorted(ratios)[4] == pytest.approx(1.0, rel=0.01)


def test_nvml_and_torch_open_the_same_gpu(gpu):
    """Name and total memory agree, whatever CUDA_VISIBLE_DEVICES hides."""
    properties = torch.cuda.get_device_properties(0)
    assert gpu.facts()["name"].value in (properties.name, f"NVIDIA {properties.name}") or gpu.sliced
    assert gpu.memory().value.total == pytest.approx(properties.total_memory, rel=0.05)


def test_the_energy_counter_agrees_with_integrated_power(gpu, work):
    """Under a steady load of 10 s, after the power sensor has settled, both agree within 5 %."""
    if not gpu.energy_j().known or not gpu.sample()["power_w"].known:
        pytest.skip(f"{gpu.energy_j().reason or gpu.sample()['power_w'].reason}")

    def load_until(end, samples=None):
        while time.monotonic() < end:
            work(20)
            torch.cuda.synchronize()
            if samples is not None:
                samples.append((time.monotonic(), gpu.sample()["power_w"].value))

    load_until(time.monotonic() + 4.0)
    samples = []
    first, begin = gpu.energy_j().value, time.monotonic()
    load_until(begin + 10.0, samples)
    energy, seconds = gpu.energy_j().value - first, time.monotonic() - begin
    mean = sum(
        (later - earlier) * (power + before) / 2 for (earlier, before), (later, power) in itertools.pairwise(samples)
    ) / (samples[-1][0] - samples[0][0])
    assert energy == pytest.approx(mean * seconds, rel=0.05)


def test_the_allocator_has_not_retried_where_memory_is_plenty():
    """The retry and OOM counts are those of the phase."""
    gauge = PeakMemoryTracker("cuda")
    gauge.begin()
    torch.empty(2**20, dtype=torch.uint8, device="cuda")
    peaks = gauge.peaks("train")
    assert (peaks["device_alloc_retries_train"], peaks["device_ooms_train"]) == (0, 0)
    allocated, active, reserved = (
        peaks[f"device_peak_{kind}_train_bytes"] for kind in ("allocated", "active", "reserved")
    )
    assert 2**20 <= allocated <= active <= reserved


def test_the_allocator_counts_retries_and_failed_allocations():
    """An allocation beyond the GPU's memory fails after the cache was emptied, and both are counted."""
    gauge = PeakMemoryTracker("cuda")
    gauge.begin()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
    peaks = gauge.peaks("train")
    assert peaks["device_ooms_train"] == 1
    assert peaks["device_alloc_retries_train"] >= 1


def test_every_counter_has_a_value_or_a_reason(gpu):
    """A counter that the GPU does not give is missing with its reason."""
    readings = gpu.sample() | gpu.facts()
    assert not [name for name, one in readings.items() if not one.known and not one.reason]


def test_a_hand_over_does_not_slow_the_next_step_down(work):
    """After a rest as long as a hand-over between turns a step takes at most 1 % more; two series without a rest give
    the noise."""
    watch = Stopwatch("cuda")

    def median_s(rest_s):
        laps = []
        for _ in range(15):
            time.sleep(rest_s)
            laps.append(watch(lambda: work(20))[1].time_s)
        return statistics.median(laps)

    first, again, rested = map(median_s, (0.0, 0.0, 0.003))
    slowed, noise = rested / first - 1, abs(again / first - 1)
    if 0.01 < slowed <= 0.01 + 2 * noise:
        pytest.skip(f"{slowed:.1%} slower is within the noise of {noise:.1%}")
    assert slowed <= 0.01


def test_the_energy_counter_moves_at_least_once_a_period(gpu, work):
    """The median time between two changes under load is at most the assumed period."""
    if not gpu.energy_j().known:
        pytest.skip(gpu.energy_j().reason)
    moved, before, end = [], gpu.energy_j().value, time.monotonic() + 1.5
    while time.monotonic() < end:
        work(2)
        torch.cuda.synchronize()
        if (now := gpu.energy_j().value) != before:
            before = now
            moved.append(time.monotonic())
    assert statistics.median(later - earlier for earlier, later in itertools.pairwise(moved)) <= COUNTER_PERIOD_S


def test_a_gpu_with_queued_work_is_not_idle(gpu, work):
    """No reading of the clocks is one of an idle GPU while work is queued."""
    for _ in range(10):
        work(60)
        assert not (gpu.sample()["events"].value or 0) & IDLE
        torch.cuda.synchronize()
