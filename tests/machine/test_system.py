"""Settings as a document: each value or its reason, from files and from the driver's interface."""

from __future__ import annotations

import pytest

from harness.machine.cgroup import cpu_quota, memory_limit
from harness.machine.system import settings, system_facts

ASK = """
    from harness.machine.system import settings
    tell(settings(card=True)["card"])
"""


def test_the_settings_of_a_card_are_told_with_their_reasons(nvml):
    """Limits, ECC and its errors, MIG, persistence, clocks and heat; what the card refuses says so and is no zero."""
    told = nvml(ASK, {"0.limit": 500000, "0.corrected": 2, "0.persistence": 0, "rc.nvmlDeviceGetMigMode": 3})
    assert {"name", "uuid", "driver", "max_memory_clock_hz", "clocks_need_root"} < told.keys()
    assert {name: told[name] for name in (
        "power_limit_w", "default_power_limit_w", "ecc", "corrected_errors", "uncorrected_errors", "mig", "persistence",
        "max_sm_clock_hz", "slowdown_temperature_c",
    )} == {
        "power_limit_w": 500.0, "default_power_limit_w": 700.0, "ecc": True, "corrected_errors": 2,
        "uncorrected_errors": 0,
        "mig": "not available: nvmlDeviceGetMigMode: this card or its driver does not offer it",
        "persistence": False, "max_sm_clock_hz": 1.98e9, "slowdown_temperature_c": 87.0,
    }  # fmt: skip


def test_a_card_that_is_not_there_is_a_reason(nvml):
    """Not an empty table."""
    assert nvml(ASK, {"count": 0}) == "not available: nvmlDeviceGetHandleByIndex: there is no such device"


def test_a_machine_says_what_it_does_not_count(tmp_path):
    """A root without files: settings and counters have reasons, by the names that they have in a record."""
    told = settings(card=False, root=tmp_path)
    assert told["system"]["governor"].startswith("not available: the kernel is not told the CPU's clock")
    assert told["system"]["cpus"] >= 1
    assert "CONFIG_PSI" in told["host_counters_missing"]["cpu_stall_s"]
    assert {"steal_s", "busy_s", "quota_stall_s", "quota_used_s", "clock_hz"} < told["host_counters_missing"].keys()


@pytest.mark.parametrize(
    "quota", ["max 100000", "-1 100000", "0 0", "200000 0", "x y", "200000", "", "nan 1", "1 2 3", "9" * 5000 + " 1"]
)
def test_a_quota_that_is_none_is_no_limit(quota, tmp_path):
    """Nor an error: a container's file system says what it likes."""
    group = tmp_path / "sys/fs/cgroup/a"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a\n")
    (group / "cpu.max").write_text(quota)
    assert not cpu_quota(tmp_path).known
    (group / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path).value == 1.5


@pytest.mark.parametrize("membership", ["noise", "0::" + "x" * 5000, "0::/" + "a/" * 3000, "::", "1:cpu"])
def test_a_cgroup_that_is_none_is_passed_over(membership, tmp_path):
    """A line of another form, a name that no folder can have."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(membership)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert not cpu_quota(tmp_path).known
    assert not memory_limit(tmp_path).known


@pytest.mark.parametrize(("listed", "known"), [("0-99999999999", True), ("0-1,x", False), ("", False), ("-", False)])
def test_a_list_of_cpus_takes_no_memory(listed, known, tmp_path):
    """However many it says there are."""
    node = tmp_path / "sys/devices/system/node/node0"
    node.mkdir(parents=True)
    (node / "cpulist").write_text(listed)
    assert system_facts(tmp_path).numa_nodes.known == known
