"""The whole way from a `Reading` through nvidia-ml-py to the driver's C interface, with a library that we script."""

from __future__ import annotations

import textwrap

import pytest

from tests.machine.two_cards import MIG, TWO

NOT_SUPPORTED, NO_PERMISSION, GPU_IS_LOST = 3, 4, 15
SAMPLE = """
    import dataclasses
    from harness.machine.nvml import open_device
    device = open_device().value
    facts, sample = device.facts(), device.sample()
    tell({
        one.name: [getattr(told, one.name).value, getattr(told, one.name).reason]
        for told in (facts, sample) for one in dataclasses.fields(told)
    })
"""
NAME = """
    from harness.machine.nvml import open_device
    found = open_device()
    tell(found.reason if found.value is None else [found.value.facts().name.value, found.value.sliced])
"""


def test_a_card_tells_everything_in_base_units(nvml):
    """Watts, joules, hertz, degrees, seconds and words; no reason stands beside a value."""
    told = nvml(
        SAMPLE,
        {
            "0.name": "Test card", "0.uuid": "GPU-1", "driver": "580.1", "0.power": 421500, "0.energy": 12345678,
            "0.limit": 500000, "0.sm_clock": 1410, "0.temperature": 71, "0.reasons": 0x24, "0.uncorrected": 2,
            "0.thermal_ns": 1500000000, "0.power_ns": 250000000, "0.persistence": 0,
        },
    )  # fmt: skip
    assert {name: value for name, (value, _) in told.items()} == {
        "name": "Test card", "uuid": "GPU-1", "driver": "580.1", "power_limit_w": 500.0,
        "default_power_limit_w": 700.0, "max_sm_clock_hz": 1.98e9, "max_memory_clock_hz": 2.619e9,
        "slowdown_temperature_c": 87.0, "ecc": True, "corrected_errors": 0, "uncorrected_errors": 2, "mig": False,
        "persistence": False, "clocks_need_root": True, "energy_j": 12345.678, "power_w": 421.5,
        "sm_clock_hz": 1.41e9, "memory_clock_hz": 2.619e9, "temperature_c": 71.0, "temperature_margin_c": 16.0,
        "events": ["sw_power_cap", "sw_thermal_slowdown"], "thermal_slowdown_s": 1.5, "power_slowdown_s": 0.25,
    }  # fmt: skip
    assert not any(reason for _, reason in told.values())


@pytest.mark.parametrize(
    ("code", "words"),
    [(NOT_SUPPORTED, "does not offer it"), (NO_PERMISSION, "not permitted"), (GPU_IS_LOST, "no longer answers"),
     (4242, "stand-in")],
)  # fmt: skip
def test_a_counter_that_cannot_be_read_is_missing_with_its_reason(nvml, code, words):
    """Never an exception and never a zero, and everything else is still there."""
    refused = {
        "nvmlDeviceGetTotalEnergyConsumption": "energy_j", "nvmlDeviceGetPowerUsage": "power_w",
        "nvmlDeviceGetEccMode": "ecc", "nvmlDeviceGetTotalEccErrors": "uncorrected_errors",
        "nvmlDeviceGetViolationStatus": "thermal_slowdown_s", "nvmlDeviceGetPersistenceMode": "persistence",
    }  # fmt: skip
    told = nvml(SAMPLE, {f"rc.{function}": code for function in refused})
    for function, name in refused.items():
        value, reason = told[name]
        assert value is None
        assert reason.startswith(f"{function}: ")
        assert words in reason
    assert told["sm_clock_hz"][0] == 1.755e9


def test_a_name_that_is_no_text_is_missing(nvml):
    """The binding fails to decode it, which is no error of NVML's, and everything else is still there."""
    told = nvml(SAMPLE, {"0.name": "Card \udcff\udcfe"})
    value, reason = told["name"]
    assert value is None
    assert reason.startswith("nvmlDeviceGetName: UnicodeDecodeError: ")
    assert told["sm_clock_hz"] == [1.755e9, ""]


@pytest.mark.parametrize(
    ("breakage", "name", "words"),
    [
        ("def fail(*_): raise OSError(5, 'it is gone')\n    pynvml.nvmlDeviceGetPowerUsage = fail", "power_w",
         "nvmlDeviceGetPowerUsage: OSError: [Errno 5] it is gone"),
        ("pynvml.nvmlDeviceGetViolationStatus = lambda *_: 7", "thermal_slowdown_s",
         "nvmlDeviceGetViolationStatus: AttributeError: 'int' object has no attribute 'violationTime'"),
        ("pynvml.nvmlDeviceGetEccMode = lambda *_: []", "ecc",
         "nvmlDeviceGetEccMode: IndexError: list index out of range"),
        ("del pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN", "slowdown_temperature_c",
         "nvmlDeviceGetTemperatureThreshold: the installed nvidia-ml-py does not know "
         "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN"),
        ("del pynvml.nvmlDeviceGetPersistenceMode", "persistence",
         "nvmlDeviceGetPersistenceMode: the installed nvidia-ml-py does not know nvmlDeviceGetPersistenceMode"),
    ],
)  # fmt: skip
def test_an_error_of_the_binding_is_a_reason_too(nvml, breakage, name, words):
    """Whatever it raises, and whatever it has lost or changed: never an exception and never a zero."""
    told = nvml(f"    import pynvml\n    {breakage}\n{SAMPLE}")
    assert told[name] == [None, words]
    assert told["sm_clock_hz"] == [1.755e9, ""]


def test_a_binding_that_cannot_be_imported_is_a_machine_without_a_card(nvml, tmp_path):
    """Another package of its name may do anything at its import."""
    (tmp_path / "pynvml.py").write_text("raise AttributeError('not what you think')\n")
    lines = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n" + textwrap.dedent(NAME)
    assert nvml(lines) == "nvidia-ml-py cannot be imported: AttributeError: not what you think"


def test_an_old_driver_is_asked_by_the_old_names(nvml):
    """Throttle reasons were not yet events, and its memory includes what it reserves."""
    told = nvml(SAMPLE, {"0.reasons": 0x40, "rc.nvmlDeviceGetTemperatureThreshold": NOT_SUPPORTED}, driver="old")
    assert told["events"] == [["hw_thermal_slowdown"], ""]
    assert "driver is too old" in told["temperature_margin_c"][1]
    memory = """
        from harness.machine.nvml import open_device
        tell(open_device().value.memory().value.used)
    """
    answers = {"0.used": 1000, "0.reserved": 50}
    assert nvml(memory, answers, driver="old") == 1050
    assert nvml(memory, answers) == 1000


def test_the_distance_to_the_slow_down_comes_without_a_threshold_too(nvml):
    """Newer cards give the distance only."""
    told = nvml(SAMPLE, {"rc.nvmlDeviceGetTemperatureThreshold": NOT_SUPPORTED, "0.margin": 7})
    assert told["temperature_margin_c"] == [7.0, ""]
    assert told["slowdown_temperature_c"][0] is None


@pytest.mark.parametrize(
    ("visible", "answer"),
    [
        (None, ["First", False]), ("0", ["First", False]), ("1,0", ["Second", False]), (" 1 ", ["Second", False]),
        ("GPU-aaaa2222-0000-0000-0000-000000000000", ["Second", False]), ("GPU-aaaa2", ["Second", False]),
        ("", "CUDA_VISIBLE_DEVICES hides every device"), ("-1", "CUDA_VISIBLE_DEVICES hides every device"),
        ("1,1", "CUDA_VISIBLE_DEVICES hides every device"),
        ("GPU-aaaa", "2 devices have a UUID that begins with GPU-aaaa"),
        ("7", "nvmlDeviceGetHandleByIndex: there is no such device"),
        ("GPU-cccc", "nvmlDeviceGetHandleByUUID: there is no such device"),
    ],
)  # fmt: skip
def test_the_card_is_the_one_that_cuda_will_use(nvml, visible, answer):
    """By index, by UUID or its beginning; the first of several; none where the variable hides all."""
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert nvml(NAME, TWO, **variables) == answer


@pytest.mark.parametrize("visible", ["MIG-bbbb", "1"])
def test_the_energy_of_a_shared_card_is_nobodys(nvml, visible):
    """Power and energy are the whole card's; clocks and heat are told, as they are those of this part too."""
    told = nvml(SAMPLE, MIG, CUDA_VISIBLE_DEVICES=visible)
    for name in ("energy_j", "power_w"):
        assert told[name] == [None, "the counter is the whole card's, and other MIG instances share the card"]
    assert told["sm_clock_hz"][0] == 1.755e9
    assert told["name"][0] == ("Second MIG 1g.10gb" if visible.startswith("MIG") else "Second")


def test_a_uuid_goes_before_the_environment(nvml):
    """What torch says of the device it uses is right, whatever the environment's numbers mean."""
    lines = """
        from harness.machine.cards import card_names
        from harness.machine.nvml import open_device
        uuid = "GPU-aaaa2222-0000-0000-0000-000000000000"
        tell([open_device(uuid).value.facts().name.value, card_names().value])
    """
    assert nvml(lines, TWO, CUDA_VISIBLE_DEVICES="0") == ["Second", ["First", "Second"]]


def test_a_machine_without_a_driver_says_so(nvml):
    """The library is not there, or it is there and does not come up."""
    assert "no NVIDIA driver is installed" in nvml(NAME, driver="none")
    assert "not loaded" in nvml(NAME, {"rc.nvmlInitWithFlags": 9})


def test_torch_is_not_needed(nvml):
    """The parent of a run asks NVML too, and stays light."""
    lines = """
        import sys
        from harness.machine.nvml import open_device
        open_device().value.sample()
        tell(sorted({"torch", "numpy"} & set(sys.modules)))
    """
    assert nvml(lines) == []


def test_the_machine_of_a_run_is_known_by_the_same_binding(nvml):
    """Name, memory and driver of the device that a worker will use, and what is free on it now."""
    lines = """
        from harness.machine import provenance
        provenance._torch_cuda = lambda: "13.0"
        machine = provenance.probe_machine()
        tell([machine.kind, machine.device_memory_bytes, machine.driver, provenance.free_device_memory()])
    """
    answers = TWO | {"1.total": 1000, "1.used": 400, "1.reserved": 50}
    assert nvml(lines, answers, CUDA_VISIBLE_DEVICES="1") == ["Second", 1000, "575.51", 550]
    kind, *others = nvml(lines, answers, CUDA_VISIBLE_DEVICES="-1")
    assert kind == "cpu"
    assert others == [None, None, None]


def test_the_compute_capability_is_told_without_cuda(nvml):
    """Of the card with NVML's own number, or why not."""
    lines = """
        from harness.machine.nvml import compute_capability
        tell([compute_capability(1).value, compute_capability(7).reason])
    """
    assert nvml(lines, TWO) == [[9, 9], "nvmlDeviceGetHandleByIndex: there is no such device"]


@pytest.mark.parametrize(
    ("answers", "code", "name", "standing"),
    [
        ({"0.energy": 5}, 0, "energy", "good"), ({"0.uncorrected": 1}, 4, "ECC", "unfit"),
        ({"0.reasons": 0x40}, 4, "throttling", "unfit"), ({"0.persistence": 0}, 0, "persistence", "bad"),
        ({"0.limit": 300000}, 0, "power limit", "bad"), ({"0.used": 60 << 30}, 4, "other processes", "unfit"),
        ({"0.processes": "1:300000000", "0.used": 300000000}, 0, "other processes", "bad"),
    ],
)  # fmt: skip
def test_the_doctor_looks_at_the_card(nvml, answers, code, name, standing):
    """From the command down to the driver's interface, with the exit code."""
    lines = """
        import contextlib, dataclasses, importlib, io
        from harness.cli import main
        from harness.machine.reading import Reading
        looking = importlib.import_module("harness.machine.doctor.survey")
        found = dataclasses.replace(looking.system_facts(), load=Reading(value=0.0))  # whatever else is at work
        looking.system_facts = lambda: found
        looking.cannot_load = lambda library: None  # CUDA's own driver, of which there is no stand-in
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = main(["doctor", "--json"])
        tell([code, {check["name"]: check["standing"] for check in json.loads(out.getvalue())["checks"]}])
    """
    found, checks = nvml(lines, answers)
    assert found == code
    assert checks[name] == standing
