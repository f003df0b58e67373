"""Tests of the vendors' peak rates: each is found by the exact name of its device, is dense, and has a source.

Tests of shares of a peak: arithmetic, interval, formula and source.

Tests of `--gpu`: it takes the name of a GPU or a memory size, and refuses anything else with the choices.
"""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.models.costs.flops import computed_tokens, row_tokens
from lorameter.models.costs.peaks import (
    DEVICES,
    DRIVER_SHARE,
    Peak,
    find_ceiling,
    find_gpu,
    product_rate,
    stated_peak,
    utilisation,
)
from lorameter.stats import Estimate
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload


@pytest.mark.parametrize(
    ("name", "rate", "per_s"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "memory", 2039e9),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("Tesla V100-SXM2-32GB", "float32", 15.7e12),
    ],
)
def test_a_peak_is_found_by_the_name_of_nvml(name, rate, per_s):
    """Form factor and memory are part of the name and determine the peak."""
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
def test_a_similar_name_has_no_peak(name):
    """A related device, a partition or a laptop version of a listed device is another device."""
    assert stated_peak(name, "memory") is None


@pytest.mark.parametrize(("name", "rate"), [("Tesla T4", "bfloat16"), ("Tesla V100-PCIE-16GB", "tf32")])
def test_a_dtype_that_tensor_cores_lack_has_no_peak(name, rate):
    """The tensor cores of Volta and Turing have neither bfloat16 nor TF32."""
    assert stated_peak(name, rate) is None


def test_peaks_are_dense_and_have_a_source():
    """Half precision is twice TF32 if both exist, bfloat16 equals float16, and names are unique."""
    for device in DEVICES:
        half, tf32 = device.teraflops["float16"], device.teraflops.get("tf32")
        assert device.source
        assert device.teraflops.get("bfloat16", half) == half
        assert tf32 is None or half / tf32 == pytest.approx(2, rel=0.02)
    names = [name for device in DEVICES for name in device.names]
    assert len(names) == len(set(names))


VARIANT = LoraVariant(r=4, target_modules=("q_proj", "v_proj"), gradient_checkpointing=True)
WORKLOAD = Workload(sequence_length=32, batch_size=2)
USEFUL, COMPUTED = row_tokens(VARIANT, WORKLOAD), computed_tokens(VARIANT, WORKLOAD)
PEAK = Peak(device="Test GPU", rate="bfloat16", per_s=1e10, source="Test GPU datasheet")
STEP = Estimate(value=0.01, low=0.008, high=0.0125)


def test_the_interval_of_a_share():
    """The upper end of the time gives the lower end of the share."""
    found = utilisation("MFU", 50_000_000, STEP, PEAK, "products")
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(0.4), pytest.approx(0.625))
    assert str(found) == (
        "MFU 50.0% [40.0%, 62.5%] = products (5e+07 FLOP) / (0.01 s × peak), "
        "peak 10 bfloat16 GFLOP/s of Test GPU (Test GPU datasheet)"
    )


def test_three_shares_of_one_step():
    """MFU counts the FLOPs that the model needs, HFU the computed ones, and 6N those of training all weights."""
    ceiling = find_ceiling(10**6, 2 * 10**6, 3 * 10**6, STEP, PEAK, useful=USEFUL, computed=COMPUTED)
    assert (ceiling.mfu.value, ceiling.hfu.value, ceiling.six_n.value) == pytest.approx((0.01, 0.02, 0.03))
    assert ceiling.mfu.low < ceiling.mfu.value < ceiling.mfu.high
    assert "which LoRA does not compute" in str(ceiling.six_n)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float32", "tf32": True}, "tf32"),
        ({"dtype": "float32", "autocast": "float16"}, "float16"),
        ({"quantization": "nf4", "compute_dtype": "float16"}, "float16"),
        ({"quantization": "nf4", "compute_dtype": "float32", "tf32": True}, "tf32"),
    ],
)
def test_the_dtype_in_which_a_step_multiplies(options, rate):
    """The rate is that of the frozen layers: the compute dtype of 4-bit layers, autocast's dtype, or the weights'
    dtype."""
    assert product_rate(LoraVariant(**options)) == rate


GIB = 2**30


@pytest.mark.parametrize(("text", "size"), [
    (" 24 gib ", 24 * GIB), ("24GB", 24 * 10**9), ("40536MiB", 40536 * 2**20), ("0.5TiB", 512 * GIB),
])  # fmt: skip
def test_a_memory_size_is_accepted_as_a_gpu(text, size):
    """A GiB is 2^30 bytes, a GB is 10^9 bytes, and the device has no name."""
    gpu = find_gpu(text)
    assert (gpu.total_bytes, gpu.device_name, gpu.source) == (size, "", "as given")
    assert gpu.usable_bytes == int(size * (1 - DRIVER_SHARE)) < size


@pytest.mark.parametrize(("text", "label", "mib"), [
    ("H100", "H100 80GB", 81559), ("h100 pcie", "H100 80GB", 81559), ("A100 80", "A100 80GB", 81920),
    ("NVIDIA GeForce RTX 5090", "RTX 5090 32GB", 32607), ("Tesla T4", "T4 16GB", 15360),
    ("rtx4090", "RTX 4090 24GB", 24564), ("4090", "RTX 4090 24GB", 24564),
])  # fmt: skip
def test_a_gpu_name_is_found_without_its_optional_words(text, label, mib):
    """Maker, form factor and memory are optional in a name, and the spelling of nvidia-smi is accepted."""
    gpu = find_gpu(text)
    assert (gpu.name, gpu.total_bytes) == (label, mib * 2**20)
    assert "nvidia-smi" in gpu.source


def test_every_gpu_is_found_by_each_of_its_names():
    """Each GPU of the table is found by each of its names and by its label."""
    for device in DEVICES:
        for name in (*device.names, device.label):
            assert find_gpu(name).total_bytes == device.memory_mib * 2**20, name


@pytest.mark.parametrize(("text", "choices"), [
    ("A100", ("A100 40GB", "A100 80GB")), ("V100", ("V100 16GB", "V100 32GB")), ("RTX", ("RTX 3090", "RTX 5090")),
])  # fmt: skip
def test_a_name_of_gpus_of_different_memory_is_refused_with_the_choices(text, choices):
    """Each choice in the error is a valid argument."""
    with pytest.raises(UsageError, match="several GPUs have this name, with different memory") as refused:
        find_gpu(text)
    for choice in choices:
        assert choice in str(refused.value)
        assert find_gpu(choice)


@pytest.mark.parametrize("text", ["L40", "A10G", "RTX 4090 Laptop GPU", "MI300X", "", "GB", "24", "24XB", "x" * 5000])
def test_an_unknown_name_is_refused_with_the_known_ones(text):
    """A similar name is not accepted; the short error says that a memory size can be given instead."""
    with pytest.raises(UsageError) as refused:
        find_gpu(text)
    assert "Known: A100 40GB" in str(refused.value)
    assert "24GiB" in str(refused.value)
    assert len(str(refused.value)) < 500
