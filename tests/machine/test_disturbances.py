"""Tests of the disturbances of a trial: value, limit and remedy; only a value past its limit makes the trial
invalid."""

from __future__ import annotations

import re

import pytest

from lorameter.machine.disturbances import judge

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


def found(changes=None, memory=None, *, in_turns=False, occupancy=None, phase="train"):
    return judge(QUIET | (changes or {}), memory or {}, phase, in_turns=in_turns, occupancy=occupancy)


def test_a_quiet_trial_has_no_disturbances():
    """A trial without measured values has none either."""
    assert found() == ()
    assert judge({}, {}, "train", in_turns=False) == ()
    assert found(occupancy=0.99) == ()


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
        (one,) = found(changes)
        assert (one.code, one.invalid) == (code, invalid)
        assert len(re.findall(r"\d", one.message)) >= 2
        assert one.remedy.endswith((".", ")"))
        assert one.weight > 0


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("power-capped", {"device_power_capped_samples_train": 40.0}),
        ("gpu-near-thermal-limit", {"device_temperature_margin_train_c": 1.0}),
        ("unaccounted-gpu-memory", {"device_hidden_train_bytes": 60.0 * GIB}),
        ("cpu-contention", {"host_cpu_stall_train_s": 90.0}),
    ],
)
def test_some_disturbances_never_make_a_trial_invalid(code, changes):
    """Measuring again would find the same value, or the value is weak evidence."""
    (one,) = found(changes)
    assert (one.code, one.invalid) == (code, False)


def test_too_little_of_a_cpu_is_invalid_only_in_an_isolated_trial():
    """Trials that take turns are compared turn by turn."""
    (alone,) = found(occupancy=0.4)
    assert alone.invalid
    (together,) = found(occupancy=0.4, in_turns=True)
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
    assert found({withheld: 32.0, given: 6368.0}) == ()
    (one,) = found({withheld: 100.0, given: 100.0})
    assert one.invalid
    assert "50% of the CPU time that was requested" in one.message
    unknown = {name: value for name, value in QUIET.items() if name != given} | {withheld: 99.0}
    assert judge(unknown, {}, "train", in_turns=False) == ()
