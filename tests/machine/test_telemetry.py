"""Tests of the telemetry of a trial: energy as a difference, extremes of samples, and reasons for missing values."""

from __future__ import annotations

from lorameter.machine.telemetry import Telemetry

WATCH = """
    import types
    from lorameter.machine import telemetry
    from lorameter.machine.nvml import open_device
    clock = iter({times})
    telemetry.time = types.SimpleNamespace(monotonic=lambda: next(clock))
    watch = telemetry.Telemetry("train", open_device, energy={energy})
    found = []
    for _ in range({intervals}):
        watch.begin()
        found.append({{name: value for name, value in watch.end().items() if name.startswith("device")}})
    report([found, watch.missing])
"""


def watch_intervals(nvml, answers, *intervals, energy=True, **options):
    """Return the GPU values after each interval and the missing values; an interval is its begin and end in seconds."""
    # `begin` reads the clock twice, for the energy and for the host.
    times = [time for begin, end in intervals for time in (begin, begin, end)]
    found, missing = nvml(WATCH.format(energy=energy, times=times, intervals=len(intervals)), answers, **options)
    return found, missing


def test_energy_runs_from_the_first_begin_to_the_last_end(nvml):
    """Energy is one difference over all turns, so that the resolution of the counter does not add up; turns that are
    too short alone are long enough together."""
    answers = {"0.energy": "100000,400000,450000,1300000"}
    found, missing = watch_intervals(nvml, answers, (10.0, 11.0), (11.1, 14.0))
    assert "device_energy_train_j" not in found[0]
    assert (found[1]["device_energy_train_j"], found[1]["device_energy_train_s"]) == (1200.0, 4.0)
    assert "energy_j" not in missing


def test_extremes_cover_the_samples_at_both_ends(nvml):
    """Telemetry has the clocks right after the work, the highest temperature, and samples at both ends of each
    interval."""
    answers = {
        "0.sm_clock": "1000,1980,1000,1500", "0.temperature": "40,70,50,80", "0.reasons": "0,0x20,0x4,0x4",
        "0.power": "100000,600000,100000,500000", "0.thermal_ns": "0,1000000000,1500000000,1500000000",
    }  # fmt: skip
    found, _ = watch_intervals(nvml, answers, (0.0, 1.0), (2.0, 3.0))
    last = found[-1]
    assert (last["device_sm_clock_min_train_hz"], last["device_sm_clock_max_train_hz"]) == (1.5e9, 1.98e9)
    assert (last["device_temperature_train_c"], last["device_temperature_margin_train_c"]) == (80.0, 7.0)
    assert last["device_samples_train"] == 4
    assert (last["device_throttled_samples_train"], last["device_power_capped_samples_train"]) == (1, 2)
    assert last["device_power_train_w"] == 550.0
    assert last["device_thermal_slowdown_train_s"] == 1.0  # events between the intervals do not count


def test_the_clock_of_an_idle_gpu_is_left_out(nvml):
    """The clock of an idle GPU is left out, and its samples are kept."""
    found, _ = watch_intervals(
        nvml, {"0.reasons": "0,0x1,0,0", "0.sm_clock": "1980,345,1980,1980"}, (0.0, 1.0), (1.0, 2.0)
    )
    assert "device_sm_clock_min_train_hz" not in found[0]
    assert found[1]["device_sm_clock_min_train_hz"] == 1.98e9


def test_a_counter_that_the_gpu_lacks_has_its_reason(nvml):
    """A missing counter has a reason, and all other values are present."""
    refused = {f"rc.{name}": 3 for name in ("nvmlDeviceGetViolationStatus", "nvmlDeviceGetPowerUsage")}
    found, missing = watch_intervals(nvml, refused | {"0.energy": "0,900000"}, (0.0, 5.0))
    assert {"thermal_slowdown_s", "power_slowdown_s", "power_w"} <= set(missing)
    assert "device_power_train_w" not in found[-1]
    assert found[-1]["device_energy_train_j"] == 900.0


def test_on_a_cpu_only_the_host_is_watched():
    """A CPU run has no device telemetry and no notice about it."""
    watch = Telemetry("train")
    watch.begin()
    values = watch.end()
    assert values["host_watched_train_s"] >= 0
    assert all(name.startswith("host_") for name in values)
    assert watch.notice() is None
