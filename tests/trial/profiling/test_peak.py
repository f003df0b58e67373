"""Measured peaks: the best lap counts, and on a known GPU it is near the vendor's figure and not above it."""

from __future__ import annotations

import pytest
import torch

from lorameter.models.costs.peaks import stated_peak
from lorameter.trial.process import Lap
from lorameter.trial.profiling import trial as peak
from lorameter.trial.profiling.trial import measure_peak

BOOST = 1.1
"""A GeForce GPU may clock above the boost that its figure is stated at; a data centre's GPU does not."""


def test_the_best_lap_of_all_sizes_counts(monkeypatch):
    """Interference only slows a product down; the first lap of each size is a warm-up."""
    laps = iter([0.001, 4.0, 2.0, 3.0, 0.001, 9.0, 8.0, 8.5])
    monkeypatch.setattr(peak, "CPU_SIZES", (64, 128))
    monkeypatch.setattr(peak, "Stopwatch", lambda device: lambda call: (call(), Lap(next(laps), 0.0)))
    assert measure_peak("cpu", "float32", tries=3).per_s == max(2 * 64**3 / 2.0, 2 * 128**3 / 8.0)
    assert next(laps, None) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("rate", "share"), [("bfloat16", 0.5), ("float16", 0.5), ("tf32", 0.5), ("float32", 0.6)])
def test_products_on_a_known_gpu(rate, share):
    """At least the stated share of the vendor's figure, and not more: a figure with sparsity would be twice as high."""
    stated = stated_peak(torch.cuda.get_device_name(), rate)
    if stated is None:
        pytest.skip(f"no figure for {rate} of {torch.cuda.get_device_name()}")
    limit = BOOST if "GeForce" in stated.device else 1.0
    if any(stated.device.endswith(name) for name in (" T4", " L4")):
        share = 0.3  # GPUs of 70 W throttle on products
    assert share <= measure_peak("cuda", rate).per_s / stated.per_s <= limit


@pytest.mark.gpu
def test_copies_on_a_known_gpu():
    """At least 70 % of the vendor's bandwidth, and never more than it."""
    stated = stated_peak(torch.cuda.get_device_name(), "memory")
    if stated is None:
        pytest.skip(f"no figure for {torch.cuda.get_device_name()}")
    assert 0.7 <= measure_peak("cuda", "memory").per_s / stated.per_s <= 1.0
