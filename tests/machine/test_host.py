"""Tests of host telemetry: kernel counters over a period, on a constructed file tree and on this machine.

Tests of the handling of signals and of the end of a process.

Tests of the disturbances of a trial: value, limit and remedy; only a value past its limit makes the trial
invalid.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from lorameter.machine.disturbances import judge
from lorameter.machine.host import cpu_quota, host_counters, memory_available_bytes, memory_bytes, system_facts
from lorameter.machine.processes import handle_signals
from lorameter.machine.telemetry import Telemetry

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
    watch = Telemetry("train", root=place)
    watch.begin()
    root(files(stall_us=2_000_000, steal=TICK, busy=3 * TICK, swapped=3, withheld_us=500_000, used_us=1_000_005))
    watch.end()
    root(files(stall_us=9_000_000, steal=9 * TICK, busy=9 * TICK, swapped=90, withheld_us=900_000, used_us=7_000_000))
    watch.begin()
    root(files(stall_us=9_500_000, steal=9 * TICK, busy=10 * TICK, swapped=91, withheld_us=900_000, used_us=7_500_000))
    totals = watch.end()
    assert totals["host_cpu_stall_train_s"] == pytest.approx(2.5)
    assert totals["host_steal_train_s"] == pytest.approx(cpus)
    assert totals["host_busy_train_s"] == pytest.approx(4 * cpus)
    assert totals["host_swap_in_train_bytes"] == 4 * PAGE
    assert totals["host_swap_out_train_bytes"] == 8 * PAGE
    assert totals["host_quota_stall_train_s"] == pytest.approx(0.5)
    assert totals["host_quota_used_train_s"] == pytest.approx(1.5)
    assert not watch.missing


def test_unreadable_machine_counters_have_reasons_and_are_not_zero(root):
    """Only the process's own counters remain."""
    watch = Telemetry("train", root=root({}))
    watch.begin()
    assert set(watch.end()) == {"host_watched_train_s", "host_involuntary_switches_train"}
    assert "CONFIG_PSI" in watch.missing["cpu_stall_s"]
    assert all(watch.missing.values())
    assert set(watch.missing) == host_counters(root({})).keys() - {"involuntary_switches"}


def test_a_counter_that_goes_back_is_missing(root):
    """Steal time is known to decrease; a negative difference is no measurement."""
    watch = Telemetry("train", root=root(files(steal=500)))
    watch.begin()
    root(files(steal=100))
    assert "host_steal_train_s" not in watch.end()
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
        f"{cpu}/cpu{CPU}/node0/uevent": "", f"{cpu}/cpu9000/node1/uevent": "",
        ".dockerenv": "",
    }  # fmt: skip
    facts = system_facts(root(described))
    assert (facts["governor"].value, facts["turbo"].value, facts["huge_pages"].value) == ("powersave", True, "madvise")
    assert (facts["memory_bytes"].value, facts["memory_available_bytes"].value) == (1024000, 614400)
    assert (facts["swap_bytes"].value, facts["swap_used_bytes"].value) == (51200, 10240)
    assert facts["numa_nodes"].value == 1
    assert facts["container"].value == "/.dockerenv is there"
    assert not facts["quota_cpus"].known
    (root({}) / f"{cpu}/intel_pstate/no_turbo").unlink()
    assert system_facts(root({f"{cpu}/cpufreq/boost": "0\n"}))["turbo"].value is False


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_is_ignored_stays_ignored(before):
    """An ignored signal stays ignored, as SIGHUP under nohup; another one has the handler until the block ends."""
    received = []
    original = signal.signal(signal.SIGUSR1, before)
    try:
        with handle_signals([signal.SIGUSR1], lambda number, frame: received.append(number)):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert received == ([] if before is signal.SIG_IGN else [signal.SIGUSR1])
        assert signal.getsignal(signal.SIGUSR1) is before
    finally:
        signal.signal(signal.SIGUSR1, original)


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_exits_with_its_code_and_flushed_output(code):
    """Exit handlers run, output is flushed, and threads are not joined."""
    program = (
        "import atexit, threading, time\n"
        "from lorameter.machine.processes import exit_quickly\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "atexit.register(print, 'at the end')\n"
        "print('before', end=' ')\n"
        f"exit_quickly({code})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (code, "before at the end\n", "")


QUIET = {
    "host_watched_train_s": 100.0, "host_cpu_stall_train_s": 0.5, "host_steal_train_s": 0.1,
    "host_busy_train_s": 100.0, "host_quota_used_train_s": 100.0,
    "host_swap_in_train_bytes": 0.0, "host_swap_out_train_bytes": 0.0, "host_quota_stall_train_s": 0.0,
    "host_involuntary_switches_train": 3.0, "device_samples_train": 40.0, "device_throttled_samples_train": 0.0,
    "device_power_capped_samples_train": 0.0, "device_thermal_slowdown_train_s": 0.0,
    "device_sm_clock_min_train_hz": 1.95e9, "device_sm_clock_max_train_hz": 1.98e9, "device_temperature_train_c": 60.0,
    "device_temperature_margin_train_c": 27.0, "device_others_train": 0.0,
    "device_others_train_bytes": 0.0, "device_hidden_train_bytes": 0.0,
}  # fmt: skip
GIB = 2**30


def disturbances(changes=None, memory=None, *, in_turns=False, occupancy=None, phase="train"):
    return judge(QUIET | (changes or {}), memory or {}, phase, in_turns=in_turns, occupancy=occupancy)


def test_a_quiet_trial_has_no_disturbances():
    """A trial without measured values has none either."""
    assert disturbances() == ()
    assert judge({}, {}, "train", in_turns=False) == ()
    assert disturbances(occupancy=0.99) == ()


@pytest.mark.parametrize(
    ("code", "noticed", "past"),
    [
        ("throttled", {"device_thermal_slowdown_train_s": 2.0}, {"device_thermal_slowdown_train_s": 11.0}),
        ("throttled", {"device_throttled_samples_train": 4.0}, {"device_throttled_samples_train": 5.0}),
        ("clocks-moving", {"device_sm_clock_min_train_hz": 1.8e9}, {"device_sm_clock_min_train_hz": 1.4e9}),
        ("gpu-shared", {"device_others_train": 1.0, "device_others_train_bytes": 5e8},
         {"device_others_train": 1.0, "device_others_train_bytes": 2.0 * GIB}),
        ("swapped", {"host_swap_in_train_bytes": 4096.0}, {"host_swap_in_train_bytes": 3e8}),
        ("stolen", {"host_steal_train_s": 2.0}, {"host_steal_train_s": 36.0}),
        ("quota", {"host_quota_stall_train_s": 2.0}, {"host_quota_stall_train_s": 36.0}),
    ],
)  # fmt: skip
def test_a_disturbance_is_a_notice_and_past_its_limit_invalid(code, noticed, past):
    """Each message has the value and the limit, and a remedy."""
    for changes, invalid in ((noticed, False), (past, True)):
        (disturbance,) = disturbances(changes)
        assert (disturbance.code, disturbance.invalid) == (code, invalid)
        assert len(re.findall(r"\d", disturbance.message)) >= 2
        assert disturbance.remedy.endswith((".", ")"))
        assert disturbance.weight > 0


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("power-capped", {"device_power_capped_samples_train": 40.0}),
        ("unaccounted-gpu-memory", {"device_hidden_train_bytes": 60.0 * GIB}),
        ("cpu-contention", {"host_cpu_stall_train_s": 90.0}),
    ],
)
def test_some_disturbances_never_make_a_trial_invalid(code, changes):
    """Measuring again would find the same value, or the value is weak evidence."""
    (disturbance,) = disturbances(changes)
    assert (disturbance.code, disturbance.invalid) == (code, False)


def test_too_little_of_a_cpu_is_invalid_only_in_an_isolated_trial():
    """Trials that take turns are compared turn by turn."""
    (alone,) = disturbances(occupancy=0.4)
    assert alone.invalid
    (together,) = disturbances(occupancy=0.4, in_turns=True)
    assert (together.code, together.invalid) == ("cpu-contention", False)
    assert "one thread had a CPU for 40%" in together.message
    assert "isolated trial is invalid" in together.message


@pytest.mark.parametrize(
    ("withheld", "given"),
    [("host_steal_train_s", "host_busy_train_s"), ("host_quota_stall_train_s", "host_quota_used_train_s")],
)
def test_withheld_time_is_a_share_of_the_requested_cpu_time(withheld, given):
    """On 64 CPUs, 0.5 % of the CPU time is a third of the wall time but not a disturbance; without the granted time
    there is no share."""
    assert disturbances({withheld: 32.0, given: 6368.0}) == ()
    (disturbance,) = disturbances({withheld: 100.0, given: 100.0})
    assert disturbance.invalid
    assert "50% of the CPU time that was requested" in disturbance.message
    unknown = {name: value for name, value in QUIET.items() if name != given} | {withheld: 99.0}
    assert judge(unknown, {}, "train", in_turns=False) == ()
