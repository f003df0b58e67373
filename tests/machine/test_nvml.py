"""Tests of `Reading` through nvidia-ml-py down to the C interface of the driver, which a scripted library replaces."""

from __future__ import annotations

import pytest

from tests.machine.two_gpus import MIG, TWO

NOT_SUPPORTED = 3
SAMPLE = """
    from lorameter.machine.nvml import open_device
    device = open_device().value
    report({name: [one.value, one.reason] for name, one in (device.facts() | device.sample()).items()})
"""
NAME = """
    from lorameter.machine.nvml import open_device
    found = open_device()
    report(found.reason if found.value is None else [found.value.facts()["name"].value, found.value.sliced])
"""


def test_a_gpu_reports_everything_in_base_units(nvml):
    """All values are in base units such as W, J, Hz, °C and s; a value that is present has no reason."""
    found = nvml(
        SAMPLE,
        {
            "0.name": "Test GPU", "0.uuid": "GPU-1", "driver": "580.1", "0.power": 421500, "0.energy": 12345678,
            "0.limit": 500000, "0.sm_clock": 1410, "0.temperature": 71, "0.reasons": 0x24, "0.uncorrected": 2,
            "0.thermal_ns": 1500000000, "0.power_ns": 250000000, "0.persistence": 0,
        },
    )  # fmt: skip
    assert {name: value for name, (value, _) in found.items()} == {
        "name": "Test GPU", "uuid": "GPU-1", "driver": "580.1", "power_limit_w": 500.0,
        "default_power_limit_w": 700.0, "max_sm_clock_hz": 1.98e9, "max_memory_clock_hz": 2.619e9,
        "slowdown_temperature_c": 87.0, "ecc": True, "corrected_errors": 0, "uncorrected_errors": 2, "mig": False,
        "persistence": False, "clocks_need_root": True, "energy_j": 12345.678, "power_w": 421.5,
        "sm_clock_hz": 1.41e9, "temperature_c": 71.0, "temperature_margin_c": 16.0,
        "events": ["sw_power_cap", "sw_thermal_slowdown"], "thermal_slowdown_s": 1.5, "power_slowdown_s": 0.25,
    }  # fmt: skip
    assert not any(reason for _, reason in found.values())


@pytest.mark.parametrize(
    ("code", "words"),
    [(NOT_SUPPORTED, "does not offer it"), (4242, "stand-in")],
)
def test_a_counter_that_cannot_be_read_is_missing_with_its_reason(nvml, code, words):
    """An unreadable counter is None with a reason, not an exception or zero, and all other values are present."""
    refused = {
        "nvmlDeviceGetTotalEnergyConsumption": "energy_j", "nvmlDeviceGetPowerUsage": "power_w",
        "nvmlDeviceGetEccMode": "ecc", "nvmlDeviceGetTotalEccErrors": "uncorrected_errors",
        "nvmlDeviceGetViolationStatus": "thermal_slowdown_s", "nvmlDeviceGetPersistenceMode": "persistence",
    }  # fmt: skip
    found = nvml(SAMPLE, {f"rc.{function}": code for function in refused})
    for function, name in refused.items():
        value, reason = found[name]
        assert value is None
        assert reason.startswith(f"{function}: ")
        assert words in reason
    assert found["sm_clock_hz"][0] == 1.755e9


@pytest.mark.parametrize(
    ("visible", "answer"),
    [
        (None, ["First", False]), ("1,0", ["Second", False]), ("GPU-aaaa2", ["Second", False]),
        ("", "CUDA_VISIBLE_DEVICES hides every device"), ("1,1", "CUDA_VISIBLE_DEVICES hides every device"),
        ("GPU-aaaa", "2 devices have a UUID that begins with GPU-aaaa"),
        ("7", "nvmlDeviceGetHandleByIndex: there is no such device"),
    ],
)  # fmt: skip
def test_the_gpu_is_the_one_that_cuda_will_use(nvml, visible, answer):
    """CUDA_VISIBLE_DEVICES selects by index, UUID or UUID prefix; the first entry counts, and an empty value hides all
    GPUs."""
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert nvml(NAME, TWO, **variables) == answer


@pytest.mark.parametrize("visible", ["MIG-bbbb", "1"])
def test_the_energy_of_a_shared_gpu_is_missing(nvml, visible):
    """A shared MIG instance has no power or energy, which are those of the whole GPU, but has clocks and
    temperatures."""
    found = nvml(SAMPLE, MIG, CUDA_VISIBLE_DEVICES=visible)
    for name in ("energy_j", "power_w"):
        assert found[name] == [None, "the counter is the whole GPU's, and other MIG instances share the GPU"]
    assert found["sm_clock_hz"][0] == 1.755e9
    assert found["name"][0] == ("Second MIG 1g.10gb" if visible.startswith("MIG") else "Second")


def test_a_missing_driver_is_reported(nvml):
    """A missing driver and a driver that is not loaded give different messages."""
    assert "no NVIDIA driver is installed" in nvml(NAME, driver="none")
    assert "not loaded" in nvml(NAME, {"rc.nvmlInitWithFlags": 9})
