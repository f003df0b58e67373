"""Settings as a document: each value or its reason, from files and from the driver's interface."""

from __future__ import annotations

ASK = """
    from lorameter.machine.system import settings
    tell(settings(gpu=True)["gpu"])
"""


def test_the_settings_of_a_card_are_told_with_their_reasons(nvml):
    """Limits, ECC and its errors, MIG, persistence, clocks and heat; what the GPU refuses says so and is no zero."""
    told = nvml(ASK, {"0.limit": 500000, "0.corrected": 2, "0.persistence": 0, "rc.nvmlDeviceGetMigMode": 3})
    assert {"name", "uuid", "driver", "max_memory_clock_hz", "clocks_need_root"} < told.keys()
    assert {name: told[name] for name in (
        "power_limit_w", "default_power_limit_w", "ecc", "corrected_errors", "uncorrected_errors", "mig", "persistence",
        "max_sm_clock_hz", "slowdown_temperature_c",
    )} == {
        "power_limit_w": 500.0, "default_power_limit_w": 700.0, "ecc": True, "corrected_errors": 2,
        "uncorrected_errors": 0,
        "mig": "not available: nvmlDeviceGetMigMode: this GPU or its driver does not offer it",
        "persistence": False, "max_sm_clock_hz": 1.98e9, "slowdown_temperature_c": 87.0,
    }  # fmt: skip


def test_a_card_that_is_not_there_is_a_reason(nvml):
    """Not an empty table."""
    assert nvml(ASK, {"count": 0}) == "not available: nvmlDeviceGetHandleByIndex: there is no such device"
