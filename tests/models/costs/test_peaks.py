"""Tests of the vendors' figures: found by the exact name of a device, dense, each with its source."""

from __future__ import annotations

import pytest

from lorameter.models.costs.peaks import DEVICES, stated_peak


@pytest.mark.parametrize(
    ("name", "rate", "per_s"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "memory", 2039e9),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("Tesla V100-SXM2-32GB", "float32", 15.7e12),
    ],
)
def test_figures_by_the_names_of_nvml(name, rate, per_s):
    """Form factor and memory are part of the name and decide the figure."""
    peak = stated_peak(name, rate)
    assert (peak.device, peak.rate) == (name, rate)
    assert peak.per_s == pytest.approx(per_s)
    assert "NVIDIA" in peak.source


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G", "NVIDIA A100X", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H200 NVL", "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "AMD EPYC", "",
    ],
)  # fmt: skip
def test_a_similar_name_has_no_figure(name):
    """A related device, a partition or a laptop version of a listed device is another device."""
    assert stated_peak(name, "memory") is None


@pytest.mark.parametrize(("name", "rate"), [("Tesla T4", "bfloat16"), ("Tesla V100-PCIE-16GB", "tf32")])
def test_a_type_without_tensor_cores_has_no_figure(name, rate):
    """Volta and Turing have neither bfloat16 nor TF32."""
    assert stated_peak(name, rate) is None


def test_figures_are_dense_and_have_a_source():
    """Half precision is twice TF32 if both exist, bfloat16 equals float16, and names are unique."""
    for device in DEVICES:
        half, tf32 = device.teraflops["float16"], device.teraflops.get("tf32")
        assert device.source
        assert device.teraflops.get("bfloat16", half) == half
        assert tf32 is None or half / tf32 == pytest.approx(2, rel=0.02)
    names = [name for device in DEVICES for name in device.names]
    assert len(names) == len(set(names))
