"""What stands in a trial's record of its surroundings: differences, extremes at the ends, and reasons."""

from __future__ import annotations

import pytest

from harness.machine.watch import Watch, named

WATCH = """
    from harness.machine.nvml import open_device
    from harness.machine.watch import DeviceWatch
    watch = DeviceWatch(open_device().value, energy={energy})
    found = []
    for begin, end in {stretches}:
        watch.begin(begin)
        for _ in range({looks}):
            watch.look()
        found.append(watch.end(end))
    tell([found, watch.missing])
"""


def watched(nvml, answers, *stretches, energy=True, looks=0, **options):
    lines = WATCH.format(energy=energy, looks=looks, stretches=repr(list(stretches)))
    found, missing = nvml(lines, answers, **options)
    return found, missing


def test_names_have_the_phase_before_the_unit():
    """As the peaks of memory do."""
    assert named("host", "steal_s", "train") == "host_steal_train_s"
    assert named("device", "sm_clock_min_hz", "generate") == "device_sm_clock_min_generate_hz"
    assert named("host", "involuntary_switches", "train") == "host_involuntary_switches_train"
    assert named("host", "load", "train") == "host_load_train"


def test_energy_runs_from_the_first_begin_to_the_last_end(nvml):
    """So that the steps of the counter do not add up turn by turn; a stretch that was too short grows long enough."""
    answers = {"0.energy": "100000,400000,450000,1300000"}
    found, missing = watched(nvml, answers, (10.0, 11.0), (11.1, 14.0))
    assert "energy_j" not in found[0]
    assert (found[1]["energy_j"], found[1]["energy_s"]) == (1200.0, 4.0)
    assert "energy_j" not in missing


def test_a_counter_that_was_reset_gives_no_energy(nvml):
    """And the record can say so."""
    found, missing = watched(nvml, {"0.energy": "900000,5000"}, (0.0, 5.0))
    assert "energy_j" not in found[-1]
    assert "went back from 900.000 to 5.000 J" in missing["energy_j"]


def test_energy_is_not_given_where_others_take_turns(nvml):
    """It would be theirs as well."""
    found, missing = watched(nvml, {"0.energy": "0,900000"}, (0.0, 5.0), energy=False)
    assert "energy_j" not in found[-1]
    assert "energy_j" not in missing


def test_extremes_over_all_ends(nvml):
    """Clocks right after the work, the hottest moment, samples at both ends of each stretch."""
    answers = {
        "0.sm_clock": "1000,1980,1000,1500", "0.temperature": "40,70,50,80", "0.reasons": "0,0x20,0x4,0x4",
        "0.power": "100000,600000,100000,500000", "0.thermal_ns": "0,1000000000,1500000000,1500000000",
    }  # fmt: skip
    found, _ = watched(nvml, answers, (0.0, 1.0), (2.0, 3.0))
    last = found[-1]
    assert (last["sm_clock_min_hz"], last["sm_clock_max_hz"]) == (1.5e9, 1.98e9)
    assert (last["temperature_c"], last["temperature_margin_c"]) == (80.0, 7.0)
    assert (last["samples"], last["throttled_samples"], last["power_capped_samples"]) == (4, 1, 2)
    assert last["power_w"] == 550.0
    assert last["thermal_slowdown_s"] == 1.0  # what fell between the stretches is not in it


MEMORY = """
    import os
    from harness.machine.nvml import open_device
    from harness.machine.watch import DeviceWatch
    def hold(size):
        with open(os.environ["FAKE_NVML"], "a") as file:
            file.write("0.processes=" + f"{{os.getpid()}}:{{size}}" + "\\n")
    hold(5000)
    watch = DeviceWatch(open_device().value, energy=False)
    calls = []
    for name in ("occupants", "memory"):
        ask = getattr(watch._device, name)
        setattr(watch._device, name, lambda ask=ask, name=name: calls.append(name) or ask())
    for _ in range({stretches}):
        watch.begin(0.0)
        found = watch.end(1.0)
    tell([found, watch.missing, calls])
"""


def test_device_memory_is_the_most_of_all_stretches(nvml):
    """What this process held and what was in use, by one question each a stretch."""
    found, missing, calls = nvml(MEMORY.format(stretches=3), {"0.used": "9000,12000,7000"})
    assert (found["own_bytes"], found["used_bytes"]) == (5000.0, 12000.0)
    assert not {"own_bytes", "used_bytes"} & set(missing)
    assert calls == ["occupants", "memory"] * 3
    assert named("device", "own_bytes", "train") == "device_own_train_bytes"
    assert named("device", "used_bytes", "train") == "device_used_train_bytes"


def test_device_memory_that_is_not_told_has_its_reason(nvml):
    """No zero stands for it."""
    silent = {f"rc.nvmlDeviceGet{what}": 4 for what in ("ComputeRunningProcesses_v3", "MemoryInfo_v2", "MemoryInfo")}
    found, missing, _ = nvml(MEMORY.format(stretches=1), silent)
    for name in ("own_bytes", "used_bytes"):
        assert name not in found
        assert "not permitted" in missing[name]


def test_the_clock_of_an_idle_card_says_nothing_of_a_step(nvml):
    """It is left out, with the samples kept."""
    found, _ = watched(nvml, {"0.reasons": "0,0x1,0,0", "0.sm_clock": "1980,345,1980,1980"}, (0.0, 1.0), (1.0, 2.0))
    assert "sm_clock_min_hz" not in found[0]
    assert found[1]["sm_clock_min_hz"] == 1.98e9


def test_the_clocks_of_a_step_are_those_while_its_work_is_queued(nvml):
    """A card that idles by the end of a stretch has told them before; what it says at the end is none of them then."""
    clocks = {"0.sm_clock": "345,1980,345,1755", "0.memory_clock": "2619,2619,810,2619"}
    found, missing = watched(nvml, clocks | {"0.reasons": "0x1,0x4,0x1,0"}, (0.0, 1.0), looks=1)
    assert (found[0]["sm_clock_min_hz"], found[0]["sm_clock_max_hz"]) == (1.98e9, 1.98e9)
    assert (found[0]["memory_clock_min_hz"], found[0]["memory_clock_max_hz"]) == (2.619e9, 2.619e9)
    assert (found[0]["samples"], found[0]["power_capped_samples"]) == (3.0, 1.0)
    assert "sm_clock_hz" not in missing


def test_a_look_that_comes_too_late_counts_for_nothing(nvml):
    """The card had finished: its clocks are left out, and those at the end stand if it works by then."""
    late = {"0.reasons": "0,0x1,0", "0.sm_clock": "1980,345,1755"}
    found, _ = watched(nvml, late, (0.0, 1.0), looks=1)
    assert (found[0]["sm_clock_min_hz"], found[0]["sm_clock_max_hz"]) == (1.755e9, 1.755e9)
    assert found[0]["samples"] == 2.0


def test_each_stretch_is_looked_into_anew(nvml):
    """What was seen in one says nothing of the next: its end stands where nobody looked in."""
    found, _ = watched(nvml, {"0.sm_clock": "1000,1980,1500,1000,1755,1600"}, (0.0, 1.0), (1.0, 2.0), looks=1)
    assert (found[1]["sm_clock_min_hz"], found[1]["sm_clock_max_hz"]) == (1.755e9, 1.98e9)
    refused = {"rc.nvmlDeviceGetClockInfo": 3}
    _, missing = watched(nvml, refused, (0.0, 1.0), looks=1)
    assert "does not offer it" in missing["sm_clock_hz"]


def test_what_the_card_does_not_tell_has_its_reason(nvml):
    """Everything else is there."""
    refused = {f"rc.{name}": 3 for name in ("nvmlDeviceGetViolationStatus", "nvmlDeviceGetPowerUsage")}
    found, missing = watched(nvml, refused | {"0.energy": "0,900000"}, (0.0, 5.0))
    assert {"thermal_slowdown_s", "power_slowdown_s", "power_w"} <= set(missing)
    assert "power_w" not in found[-1]
    assert found[-1]["energy_j"] == 900.0


def test_on_a_cpu_the_host_is_watched_and_no_card_is_asked():
    """Nothing of a device, and no notice that there is none."""
    watch = Watch("train", "cpu")
    watch.begin()
    values = watch.end()
    assert values["host_watched_train_s"] >= 0
    assert all(name.startswith("host_") for name in values)
    assert watch.notice() is None


def test_a_device_that_nvml_does_not_find_is_told_once(monkeypatch):
    """The host is watched all the same."""
    from harness.machine.reading import missing

    asked = []
    monkeypatch.setattr("harness.machine.watch.card_of", lambda device: asked.append(device) or missing("no driver"))
    watch = Watch("train", "cuda")
    for _ in range(2):
        watch.begin()
        values = watch.end()
    assert asked == ["cuda"]
    assert all(name.startswith("host_") for name in values)
    assert watch.notice().code == "not-measured"
    assert "no driver" in watch.notice().message


@pytest.mark.parametrize("refused", ["nvmlDeviceGetViolationStatus", "nvmlDeviceGetTotalEnergyConsumption"])
def test_only_what_has_no_substitute_is_worth_a_notice(nvml, refused):
    """Many cards have no counter of slow-downs; the samples say nearly the same."""
    lines = """
        from harness.machine import watch
        from harness.machine.nvml import open_device
        watch.card_of = lambda device: open_device()
        clock = iter(range(0, 100, 5))
        one = watch.Watch("train", "cuda", energy=True, clock=lambda: float(next(clock)))
        one.begin()
        one.end()
        notice = one.notice()
        tell(None if notice is None else notice.message)
    """
    told = nvml(lines, {f"rc.{refused}": 3, "0.energy": "0,900000"})
    if refused == "nvmlDeviceGetViolationStatus":
        assert told is None
    else:
        assert told.startswith(f"device_energy_train_j: {refused}: this card")


def test_an_end_without_a_begin_is_a_defect(nvml):
    """Not a silent zero."""
    lines = """
        from harness.machine.nvml import open_device
        from harness.machine.watch import DeviceWatch
        try:
            DeviceWatch(open_device().value, energy=True).end(1.0)
        except RuntimeError as error:
            tell(str(error))
    """
    assert "without begin" in nvml(lines)
