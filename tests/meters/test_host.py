"""The kernel's counters as differences, from a machine that is described file by file, and from the real one."""

from __future__ import annotations

import os
import time

import pytest

from harness.meters.cgroup import cpu_quota, memory_left, quota_stall_s
from harness.meters.host import CUMULATIVE, HostWatch, host_counters
from harness.meters.system import system_facts

PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")
CPU = min(os.sched_getaffinity(0))


@pytest.fixture
def root(tmp_path):
    """A function that writes files below a root; returns the root."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def files(*, stall_us=0, steal=0, swapped=0, withheld_us=0):
    """A machine that keeps every counter, after so much of each."""
    pressure = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={stall_us}\nfull avg10=0.00 total=7\n"
    lines = [f"cpu{cpu} 1 2 3 4 5 6 7 {steal} 0 0" for cpu in os.sched_getaffinity(0)]
    return {
        "proc/pressure/cpu": pressure, "proc/pressure/memory": pressure, "proc/pressure/io": pressure,
        "proc/stat": "\n".join(["cpu  9 9 9 9 9 9 9 9999 0 0", *lines, "intr 1 2 3"]),
        "proc/vmstat": f"nr_free_pages 5\npswpin {swapped}\npswpout {2 * swapped}\n",
        "proc/loadavg": "1.50 1.00 0.50 2/300 999\n",
        "proc/self/cgroup": "0::/jobs/ours\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
        "sys/fs/cgroup/jobs/ours/cpu.stat": f"usage_usec 5\nthrottled_usec {withheld_us}\n",
    }  # fmt: skip


def test_a_watch_tells_what_happened_between(root):
    """Seconds, bytes and counts, added up over two stretches; what happened outside them is not in it."""
    cpus = len(os.sched_getaffinity(0))
    place = root(files())
    watch = HostWatch(place)
    watch.begin()
    root(files(stall_us=2_000_000, steal=TICK, swapped=3, withheld_us=500_000))
    watch.end()
    root(files(stall_us=9_000_000, steal=9 * TICK, swapped=90, withheld_us=900_000))
    watch.begin()
    root(files(stall_us=9_500_000, steal=9 * TICK, swapped=91, withheld_us=900_000))
    totals = watch.end()
    assert totals["cpu_stall_s"] == pytest.approx(2.5)
    assert totals["steal_s"] == pytest.approx(cpus)
    assert totals["swap_in_bytes"] == 4 * PAGE
    assert totals["swap_out_bytes"] == 8 * PAGE
    assert totals["quota_stall_s"] == pytest.approx(0.5)
    assert totals["load"] == 1.5
    assert set(watch.missing) == {"clock_hz"}


def test_a_machine_that_tells_nothing_gives_reasons_and_no_zeros(root):
    """Only what the process counts itself is left."""
    watch = HostWatch(root({}))
    watch.begin()
    assert set(watch.end()) == {"watched_s", "voluntary_switches", "involuntary_switches", "major_faults"}
    assert "CONFIG_PSI" in watch.missing["cpu_stall_s"]
    assert all(watch.missing.values())
    assert set(watch.missing) == {*CUMULATIVE, "load", "clock_hz"} - {
        "voluntary_switches", "involuntary_switches", "major_faults",
    }  # fmt: skip


def test_a_counter_that_goes_back_is_missing(root):
    """Steal is known to; a difference below zero is no measurement."""
    watch = HostWatch(root(files(steal=500)))
    watch.begin()
    root(files(steal=100))
    assert "steal_s" not in watch.end()
    assert "went back" in watch.missing["steal_s"]


def test_the_clock_has_a_range(root):
    """In hertz, from the kernel's kilohertz."""
    name = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_cur_freq"
    watch = HostWatch(root({name.format(cpu): "3200000\n" for cpu in os.sched_getaffinity(0)}))
    watch.begin()
    watch.end()
    watch.begin()
    root({name.format(CPU): "1600000\n"})
    totals = watch.end()
    assert (totals["clock_min_hz"], totals["clock_max_hz"]) == (1.6e9, 3.2e9)


def test_an_end_without_a_begin_is_a_defect():
    """Not a silent zero."""
    with pytest.raises(RuntimeError, match="without begin"):
        HostWatch().end()


def test_the_real_machine_counts_this_process():
    """Sleeping gives the CPU up voluntarily, whatever else this machine tells."""
    watch = HostWatch()
    watch.begin()
    for _ in range(5):
        time.sleep(0.001)
    totals = watch.end()
    assert totals["voluntary_switches"] >= 5
    assert 0.005 <= totals["watched_s"] < 60
    assert host_counters().taken_s > 0


@pytest.mark.parametrize(
    ("described", "cpus"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
          "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 1.5),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/a\n", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000\n",
          "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"proc/self/cgroup": "4:cpu:/elsewhere\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "4:cpu:/a\n", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_tightest_quota_counts(root, described, cpus):
    """Of either version, on the way up, and where the container's own name is not to be seen."""
    assert cpu_quota(root(described)).value == cpus


def test_version_one_counts_in_nanoseconds(root):
    """Under another name."""
    described = {"proc/self/cgroup": "4:cpu:/a\n", "sys/fs/cgroup/cpu/a/cpu.stat": "throttled_time 2500000000\n"}
    assert quota_stall_s(root(described)).value == 2.5
    assert not quota_stall_s(root({"proc/self/cgroup": "4:cpuset:/a\n"})).known


@pytest.mark.parametrize(
    ("names", "cached"),
    [(("memory.max", "memory.current"), "inactive_file"),
     (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file")],
)  # fmt: skip
def test_file_pages_can_be_dropped(root, names, cached):
    """They count as used, and a process that needs memory gets theirs."""
    version = "0::/a\n" if names[0] == "memory.max" else "4:memory:/a\n"
    folder = "sys/fs/cgroup/a" if names[0] == "memory.max" else "sys/fs/cgroup/memory/a"
    described = {"proc/self/cgroup": version, f"{folder}/memory.stat": f"{cached} 300\n"}
    described |= {f"{folder}/{name}": f"{size}\n" for name, size in zip(names, (1000, 800), strict=True)}
    assert memory_left(root(described)).value == 500
    root({f"{folder}/{names[0]}": "max\n"})
    assert not memory_left(root({})).known


def test_settings_are_read_where_the_kernel_keeps_them(root):
    """Governor, turbo of both kinds, huge pages, memory, nodes, container."""
    cpu = "sys/devices/system/cpu"
    described = {
        f"{cpu}/cpu{CPU}/cpufreq/scaling_governor": "powersave\n", f"{cpu}/intel_pstate/no_turbo": "0\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 600 kB\nSwapTotal: 50 kB\nSwapFree: 40 kB\n",
        "sys/devices/system/node/node0/cpulist": "0-4095\n", "sys/devices/system/node/node1/cpulist": "9000-9001\n",
        "proc/self/cgroup": "0::/kubepods/pod1\n",
    }  # fmt: skip
    facts = system_facts(root(described))
    assert (facts.governor.value, facts.turbo.value, facts.huge_pages.value) == ("powersave", True, "madvise")
    assert (facts.memory_bytes.value, facts.memory_available_bytes.value) == (1024000, 614400)
    assert (facts.swap_bytes.value, facts.swap_used_bytes.value) == (51200, 10240)
    assert facts.numa_nodes.value == 1
    assert "kubepods" in facts.container.value
    assert not facts.quota_cpus.known
    (root({}) / f"{cpu}/intel_pstate/no_turbo").unlink()
    assert system_facts(root({f"{cpu}/cpufreq/boost": "0\n"})).turbo.value is False


def test_a_machine_without_settings_has_reasons(root):
    """Nothing raises."""
    facts = system_facts(root({}))
    for name in ("governor", "turbo", "huge_pages", "memory_bytes", "swap_bytes", "numa_nodes", "load", "container"):
        assert not getattr(facts, name).known
    assert facts.cpus >= 1
