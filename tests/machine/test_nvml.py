"""Tests of `Reading` through nvidia-ml-py down to the C interface of the driver, which a scripted library replaces.

Tests of several GPUs in NVML, with a scripted driver library.

Tests of other processes on the GPU: they are distinguished from this run's own, and unknown where a container hides
them.

Tests of energy as a difference of a counter, where the difference is meaningful.
"""

from __future__ import annotations

import pytest

from lorameter.machine.reading import Reading, missing_reading
from lorameter.machine.telemetry import energy_between
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
        "name": "Test GPU", "uuid": "GPU-1", "driver": "580.1", "capability": [8, 9], "power_limit_w": 500.0,
        "default_power_limit_w": 700.0, "max_sm_clock_hz": 1.98e9, "max_memory_clock_hz": 2.619e9,
        "slowdown_temperature_c": 87.0, "ecc": True, "corrected_errors": 0, "uncorrected_errors": 2, "mig": False,
        "persistence": False, "clocks_need_root": True, "energy_j": 12345.678, "power_w": 421.5,
        "sm_clock_hz": 1.41e9, "temperature_c": 71.0, "temperature_margin_c": 16.0,
        "events": 0x24, "thermal_slowdown_s": 1.5, "power_slowdown_s": 0.25,
    }  # fmt: skip
    assert not any(reason for _, reason in found.values())


@pytest.mark.parametrize(
    ("code", "words"),
    [(NOT_SUPPORTED, "Not Supported"), (4242, "stand-in")],
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
        ("7", "nvmlDeviceGetHandleByIndex: Invalid Argument"),
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
    assert "Shared Library Not Found" in nvml(NAME, driver="none")
    assert "Driver Not Loaded" in nvml(NAME, {"rc.nvmlInitWithFlags": 9})


VISIBLE = """
    from lorameter.machine.nvml import visible_gpus
    report([
        [one.entry, one.name.value, one.board.value, one.power_limit_w.value, one.name.reason]
        for one in visible_gpus().value
    ])
"""
FIRST = ["First", "GPU-aaaa1111-0000-0000-0000-000000000000", 700.0, ""]
SECOND = ["Second", "GPU-aaaa2222-0000-0000-0000-000000000000", 400.0, ""]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [[0, *FIRST], [1, *SECOND]]),
        ("MIG-bbbb,0", [["MIG-bbbb", "Second MIG 1g.10gb", *SECOND[1:]], [0, *FIRST]]),
        ("", []),
        ("7", [[7, None, None, None, "nvmlDeviceGetHandleByIndex: Invalid Argument"]]),
    ],
)
def test_each_visible_gpu_is_known_by_any_of_its_names(nvml, visible, expected):
    """A MIG instance has its own name, and its parent GPU gives the power limit."""
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert nvml(VISIBLE, {**MIG, "1.limit": 400000}, **variables) == expected


SITES = """
    import dataclasses
    from lorameter.errors import UsageError
    from lorameter.machine import provenance
    from lorameter.run.workers.local import LocalExecutor
    from lorameter.run.sites import gpus
    provenance._torch_cuda = lambda: "13.0"
    gpus.share_cpus = lambda cpus, sites, requested: [[0]] * sites  # however many this machine has
    machine = provenance.probe_machine()
    try:
        hosts = gpus.local_sites(("0", "1"), machine, mixed=MIXED)
        facts = [LocalExecutor(host=host).facts() for host in hosts.values()]
        report([[one.machine.device_name, one.settings["gpu"]["power_limit_w"]] for one in facts])
    except UsageError as refused:
        report(str(refused))
"""


def test_sites_of_different_gpus_are_refused(nvml):
    """The error has name and power limit; where mixing is allowed each site knows its own GPU."""
    uuids = {"CUDA_VISIBLE_DEVICES": "GPU-aaaa2,GPU-aaaa1"}
    answers = {**TWO, "1.limit": 400000}
    refused = nvml(SITES.replace("MIXED", "False"), answers, **uuids)
    assert "GPUs of different kinds (First at 700 W, Second at 400 W)" in refused
    assert nvml(SITES.replace("MIXED", "True"), answers, **uuids) == [["Second", 400.0], ["First", 700.0]]


GIB = 2**30
FIND_NEIGHBOURS = """
    import os
    from lorameter.machine.nvml import find_neighbours, open_device
    with open(os.environ["FAKE_NVML"], "a") as file:
        file.write("0.processes=" + {listed} + "\\n")
    found = find_neighbours(open_device().value, generations={generations})
    report({{name: [reading.value, reading.reason] for name, reading in found.items()}})
"""
THIS_PROCESS = 'f"{os.getpid()}:1073741824"'


def find_neighbours(listed, generations=0):
    return FIND_NEIGHBOURS.format(listed=listed, generations=generations)


def test_a_process_that_is_alone_has_no_neighbours(nvml):
    """No memory is hidden."""
    found = nvml(find_neighbours(THIS_PROCESS), {"0.used": GIB})
    assert found == {
        "others": [0, ""], "others_bytes": [0, ""], "hidden_bytes": [0, ""],
    }  # fmt: skip


def test_others_are_counted_and_their_memory_added(nvml):
    """Process 1 does not belong to the run."""
    found = nvml(find_neighbours(THIS_PROCESS + ' + ",1:5000"'), {"0.used": GIB + 5000})
    assert found["others"] == [1, ""]
    assert found["others_bytes"] == [5000, ""]


def test_processes_of_the_same_run_are_not_neighbours(nvml):
    """Trials that take turns run concurrently and share an ancestor two generations up."""
    sibling = 'f"{os.getppid()}:7,{os.getpid()}:1073741824"'
    assert nvml(find_neighbours(sibling, generations=0))["others"][0] == 1
    assert nvml(find_neighbours(sibling, generations=1))["others"][0] == 0


def test_process_numbers_of_another_container_are_unknown(nvml):
    """Foreign process ids cannot be distinguished from this process's own, so that the values are unknown and not
    zero."""
    found = nvml(find_neighbours('"999999999:5000,999999998:6000"'), {"0.used": 11000})
    for name in ("others", "others_bytes"):
        value, reason = found[name]
        assert value is None
        assert "do not exist in this container" in reason


def test_memory_without_a_listed_process_shows_hidden_processes(nvml):
    """The list is empty although 3 GiB are in use."""
    found = nvml(find_neighbours('""'), {"0.used": 3 * GIB})
    assert found["hidden_bytes"] == [3 * GIB, ""]


def test_energy_is_the_difference():
    """The energy is in joules."""
    assert energy_between(Reading(value=1000.0), Reading(value=1900.5), 3.0) == Reading(value=900.5)


@pytest.mark.parametrize(
    ("first", "last", "seconds", "words"),
    [
        (Reading(value=5000.0), Reading(value=12.0), 3.0, "went back from 5000 to 12"),
        (Reading(value=1.0), Reading(value=2.0), 0.3, "0.30 s were measured"),
        (Reading(value=1.0), Reading(value=1.0), 3.0, "stayed at"),
        (missing_reading("not offered"), Reading(value=2.0), 3.0, "not offered"),
        (Reading(value=1.0), missing_reading("GPU lost"), 3.0, "GPU lost"),
    ],
)
def test_unusable_energy_readings_give_no_energy(first, last, seconds, words):
    """A reset, too few counter updates, a constant counter and a missing reading give no energy."""
    found = energy_between(first, last, seconds)
    assert found.value is None
    assert words in found.reason
