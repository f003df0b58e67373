"""Tests of `lorameter doctor`: every finding has a remedy, and a machine is unfit only where no measurement is
possible."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lorameter import cli
from lorameter.machine.doctor import OPTIONAL, REQUIRED, Survey, examine, is_fit
from lorameter.machine.reading import Reading, missing_reading

GIB = 2**30


def given(value):
    return Reading(value=value)


SYSTEM = {
    "cpus": given(8), "quota_cpus": missing_reading("no limit"), "governor": given("performance"),
    "turbo": given(False),
    "huge_pages": given("madvise"), "numa_nodes": given(1), "load": given(0.1), "memory_bytes": given(64 * GIB),
    "memory_available_bytes": given(60 * GIB), "swap_bytes": given(0), "swap_used_bytes": given(0),
    "container": missing_reading("none"),
}  # fmt: skip
GPU = {
    "name": given("Card"), "power_limit_w": given(700.0), "default_power_limit_w": given(700.0), "ecc": given(True),
    "corrected_errors": given(0), "uncorrected_errors": given(0), "persistence": given(True),
    "clocks_need_root": given(False),
    "energy_j": given(5.0), "temperature_margin_c": given(52.0), "events": given(1),
    "thermal_slowdown_s": given(0.0),
    "sliced": given(False),
}  # fmt: skip
TELEMETRY = {
    "host_watched_survey_s": 1.0, "host_cpu_stall_survey_s": 0.0, "host_steal_survey_s": 0.0, "host_busy_survey_s": 1.0,
    "host_quota_stall_survey_s": 0.0, "host_quota_used_survey_s": 1.0,
}  # fmt: skip


@pytest.fixture
def quiet_machine(machine):
    """The facts of a quiet machine without a GPU."""
    return Survey(
        machine=dataclasses.replace(machine, cpus=8), system=SYSTEM,
        packages=dict.fromkeys((*REQUIRED, *OPTIONAL), "1.0"), telemetry=TELEMETRY, missing={},
        no_peaks="", gpu=missing_reading("no driver"), runs=Path("/runs"), locks=given(True), root=False,
    )  # fmt: skip


def on_gpu(survey, **changes):
    """A function that returns the facts of the same machine with a GPU and the given changes."""
    gpu = {name: changes.get(name, value) for name, value in GPU.items()}
    machine = dataclasses.replace(
        survey.machine, device="cuda", device_name="Card", device_memory_bytes=80 * GIB, cuda="13.0", driver="580"
    )
    return dataclasses.replace(survey, machine=machine, gpu=given(gpu))


def by_name(survey):
    return {check.name: check for check in examine(survey)}


def test_a_quiet_machine_is_fit_and_has_no_remedies(quiet_machine):
    """A quiet machine is fit and has no remedies, with and without a GPU."""
    for survey in (quiet_machine, on_gpu(quiet_machine)):
        checks = examine(survey)
        assert is_fit(checks)
        assert {check.grade for check in checks} == {"good"}
        assert not any(check.remedy for check in checks)


def test_a_gpu_that_no_program_can_use_is_unfit(quiet_machine):
    """A container can have NVML without CUDA: nvidia-smi lists the GPU, but every trial would crash."""
    survey = dataclasses.replace(on_gpu(quiet_machine), lacks_driver="libcuda.so.1: cannot open shared object file")
    check = by_name(survey)["device"]
    assert (check.grade, is_fit(examine(survey))) == ("unfit", False)
    assert "libcuda.so.1: cannot open" in check.found
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in check.remedy


@pytest.mark.parametrize(
    ("name", "grade", "changes"),
    [
        ("load", "bad", {"load": given(3.5)}),
        ("governor", "bad", {"governor": given("powersave")}),
        ("turbo", "note", {"turbo": given(True)}),
        ("huge pages", "note", {"huge_pages": given("always")}),
        ("memory nodes", "bad", {"numa_nodes": given(2)}),
        ("swap", "note", {"swap_bytes": given(GIB)}),
        ("swap", "bad", {"swap_bytes": given(GIB), "swap_used_bytes": given(4096)}),
        ("CPU quota", "bad", {"quota_cpus": given(1.5)}),
        ("threads", "unfit", {"quota_cpus": given(0.5)}),
        ("memory", "unfit", {"memory_available_bytes": given(200 * 2**20)}),
        ("container", "note", {"container": given("/.dockerenv is there")}),
    ],
)
def test_disturbances_of_a_measurement_on_the_host(quiet_machine, name, grade, changes):
    """Each disturbance has a remedy; only one that prevents every trial makes the machine unfit."""
    survey = dataclasses.replace(quiet_machine, system=SYSTEM | changes)
    check = by_name(survey)[name]
    assert check.grade == grade
    assert check.remedy
    assert is_fit(examine(survey)) is (grade != "unfit")


@pytest.mark.parametrize(
    ("load", "stalled_s", "grade"),
    [(3.5, 0.0, "bad"), (4.0, 0.9, "bad"), (15.2, 0.9, "unfit"), (15.2, None, "unfit"), (15.2, 0.0, "bad")],
)
def test_a_machine_without_a_free_cpu_is_unfit(quiet_machine, load, stalled_s, grade):
    """A load above the number of CPUs makes the machine unfit, unless no process waited for a CPU, as after work that
    has ended."""
    telemetry = {name: value for name, value in TELEMETRY.items() if name != "host_cpu_stall_survey_s"}
    if stalled_s is not None:
        telemetry["host_cpu_stall_survey_s"] = stalled_s
    survey = dataclasses.replace(
        quiet_machine,
        machine=dataclasses.replace(quiet_machine.machine, cpus=4),
        system=SYSTEM | {"load": given(load)},
        telemetry=telemetry,
    )
    assert by_name(survey)["load"].grade == grade
    assert is_fit(examine(survey)) is (grade != "unfit")


@pytest.mark.parametrize(
    ("name", "grade", "changes"),
    [
        ("cpu-contention", "bad", {"host_cpu_stall_survey_s": 0.9}),
        ("stolen", "bad", {"host_steal_survey_s": 0.9}),
        ("throttled", "unfit", {"device_samples_survey": 2.0, "device_throttled_samples_survey": 2.0}),
        ("gpu-shared", "bad", {"device_others_survey": 1.0, "device_others_survey_bytes": GIB / 4}),
        ("gpu-shared", "unfit", {"device_others_survey": 2.0, "device_others_survey_bytes": 20.0 * GIB}),
        ("unaccounted-gpu-memory", "bad", {"device_hidden_survey_bytes": 60.0 * GIB}),
    ],
)
def test_disturbances_during_the_survey_are_judged_as_in_a_trial(quiet_machine, name, grade, changes):
    """Only a disturbance that would make every trial invalid makes the machine unfit."""
    survey = dataclasses.replace(quiet_machine, telemetry=TELEMETRY | changes)
    check = by_name(survey)[name]
    assert check.grade == grade
    assert check.remedy
    assert is_fit(examine(survey)) is (grade != "unfit")


@pytest.mark.parametrize(
    ("name", "grade", "changes"),
    [
        ("persistence", "bad", {"persistence": given(False)}),
        ("power limit", "bad", {"power_limit_w": given(400.0)}),
        ("clock lock", "note", {"clocks_need_root": given(True)}),
        ("MIG", "note", {"sliced": given(True)}),
        ("heat", "bad", {"temperature_margin_c": given(2.0)}),
        ("ECC", "unfit", {"uncorrected_errors": given(3)}),
    ],
)  # fmt: skip
def test_disturbances_of_a_measurement_on_a_gpu(quiet_machine, name, grade, changes):
    """Each disturbance of a GPU has a remedy."""
    survey = on_gpu(quiet_machine, **changes)
    check = by_name(survey)[name]
    assert check.grade == grade
    assert check.remedy
    assert is_fit(examine(survey)) is (grade != "unfit")


def test_missing_packages_make_a_machine_unfit_and_missing_extras_do_not(quiet_machine):
    """The remedy is the command that installs them."""
    lacking = dataclasses.replace(quiet_machine, packages=quiet_machine.packages | {"peft": None})
    assert by_name(lacking)["packages"].grade == "unfit"
    assert by_name(lacking)["packages"].remedy == "pip install peft"
    extra = dataclasses.replace(quiet_machine, packages=quiet_machine.packages | {"gguf": None})
    assert by_name(extra)["gguf"].grade == "note"
    assert is_fit(examine(extra))


@pytest.mark.parametrize(("change", "code"), [({}, 0), ({"no_peaks": "not here"}, 4)])
def test_the_command_exits_by_its_verdict(quiet_machine, monkeypatch, capsys, change, code):
    """The output is one JSON document with a schema; the exit code is 0 if fit and 4 if unfit."""
    monkeypatch.setattr("lorameter.commands.setup.survey", lambda runs: dataclasses.replace(quiet_machine, **change))
    assert cli.main(["doctor", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 2
    assert document["fit"] is (code == 0)
    assert {"about", "name", "grade", "found", "remedy"} == set(document["checks"][0])
    assert cli.main(["doctor"]) == code
    assert "This machine is" in capsys.readouterr().out
