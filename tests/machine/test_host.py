"""Tests of the kernel's counters as differences, on a machine described by files and on the real one."""

from __future__ import annotations

import os

import pytest

from lorameter.machine.host import HostTelemetry, cpu_quota, host_counters
from lorameter.machine.system import memory_available_bytes, memory_bytes, system_facts

PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")
CPU = min(os.sched_getaffinity(0))


@pytest.fixture
def root(tmp_path):
    """A function that writes files below a root and returns the root."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def files(*, stall_us=0, steal=0, busy=0, swapped=0, withheld_us=0, used_us=5):
    """Return the files of a machine with every counter at the given values."""
    pressure = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={stall_us}\nfull avg10=0.00 total=7\n"
    others = f"cpu4095 {99 * busy} 9 9 9 9 9 9 {99 * steal} 0 0"
    lines = [f"cpu{cpu} {busy} 2 3 4 5 6 7 {steal} 0 0" for cpu in os.sched_getaffinity(0)]
    return {
        "proc/pressure/cpu": pressure, "proc/pressure/memory": pressure,
        "proc/stat": "\n".join(["cpu  9 9 9 9 9 9 9 9999 0 0", *lines, others, "intr 1 2 3", "ctxt 5"]),
        "proc/vmstat": f"nr_free_pages 5\npswpin {swapped}\npswpout {2 * swapped}\n",
        "proc/self/cgroup": "0::/jobs/ours\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
        "sys/fs/cgroup/jobs/ours/cpu.stat": f"usage_usec {used_us}\nthrottled_usec {withheld_us}\n",
    }  # fmt: skip


def test_counters_add_up_over_two_periods(root):
    """Seconds, bytes and counts add up over two periods, without the events between them."""
    cpus = len(os.sched_getaffinity(0))
    place = root(files())
    watch = HostTelemetry(place)
    watch.begin()
    root(files(stall_us=2_000_000, steal=TICK, busy=3 * TICK, swapped=3, withheld_us=500_000, used_us=1_000_005))
    watch.end()
    root(files(stall_us=9_000_000, steal=9 * TICK, busy=9 * TICK, swapped=90, withheld_us=900_000, used_us=7_000_000))
    watch.begin()
    root(files(stall_us=9_500_000, steal=9 * TICK, busy=10 * TICK, swapped=91, withheld_us=900_000, used_us=7_500_000))
    totals = watch.end()
    assert totals["cpu_stall_s"] == pytest.approx(2.5)
    assert totals["steal_s"] == pytest.approx(cpus)
    assert totals["busy_s"] == pytest.approx(4 * cpus)
    assert totals["swap_in_bytes"] == 4 * PAGE
    assert totals["swap_out_bytes"] == 8 * PAGE
    assert (totals["quota_stall_s"], totals["quota_used_s"]) == (pytest.approx(0.5), pytest.approx(1.5))
    assert not watch.missing


def test_unreadable_machine_counters_have_reasons_and_are_not_zero(root):
    """Only the process's own counters remain."""
    watch = HostTelemetry(root({}))
    watch.begin()
    assert set(watch.end()) == {"watched_s", "involuntary_switches"}
    assert "CONFIG_PSI" in watch.missing["cpu_stall_s"]
    assert all(watch.missing.values())
    assert set(watch.missing) == host_counters(root({})).keys() - {"involuntary_switches"}


def test_a_counter_that_goes_back_is_missing(root):
    """Steal time is known to decrease; a negative difference is no measurement."""
    watch = HostTelemetry(root(files(steal=500)))
    watch.begin()
    root(files(steal=100))
    assert "steal_s" not in watch.end()
    assert "went back" in watch.missing["steal_s"]


@pytest.mark.parametrize(
    ("described", "cpus"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
          "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/elsewhere\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_tightest_quota_counts(root, described, cpus):
    """The quota may be that of a parent, or of a container that does not see its own folder."""
    assert cpu_quota(root(described)).value == cpus


def test_usable_memory_is_the_least_of_machine_and_container_limit(root):
    """A limit above the machine's memory changes nothing."""
    where = "sys/fs/cgroup/a"
    described = {
        "proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 600 kB\n", "proc/self/cgroup": "0::/a\n",
        f"{where}/memory.max": "204800\n", f"{where}/memory.current": "102400\n",
    }  # fmt: skip
    place = root(described)
    assert (memory_bytes(place).value, memory_available_bytes(place).value) == (204800, 102400)
    facts = system_facts(place)
    assert (facts["memory_bytes"].value, facts["memory_available_bytes"].value) == (204800, 102400)
    root({f"{where}/memory.max": "9223372036854771712\n"})
    assert (memory_bytes(place).value, memory_available_bytes(place).value) == (1024000, 614400)


def test_settings_are_read_where_the_kernel_keeps_them(root):
    """The settings are governor, both kinds of turbo, huge pages, memory, NUMA nodes and container."""
    cpu = "sys/devices/system/cpu"
    described = {
        f"{cpu}/cpu{CPU}/cpufreq/scaling_governor": "powersave\n", f"{cpu}/intel_pstate/no_turbo": "0\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 600 kB\nSwapTotal: 50 kB\nSwapFree: 40 kB\n",
        "sys/devices/system/node/node0/cpulist": "0-4095\n", "sys/devices/system/node/node1/cpulist": "9000-9001\n",
        "proc/self/cgroup": "0::/kubepods/pod1\n",
    }  # fmt: skip
    facts = system_facts(root(described))
    assert (facts["governor"].value, facts["turbo"].value, facts["huge_pages"].value) == ("powersave", True, "madvise")
    assert (facts["memory_bytes"].value, facts["memory_available_bytes"].value) == (1024000, 614400)
    assert (facts["swap_bytes"].value, facts["swap_used_bytes"].value) == (51200, 10240)
    assert facts["numa_nodes"].value == 1
    assert "kubepods" in facts["container"].value
    assert not facts["quota_cpus"].known
    (root({}) / f"{cpu}/intel_pstate/no_turbo").unlink()
    assert system_facts(root({f"{cpu}/cpufreq/boost": "0\n"}))["turbo"].value is False
