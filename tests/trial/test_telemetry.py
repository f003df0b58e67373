"""Telemetry around the commands of a trial."""

from __future__ import annotations

from typing import ClassVar

import pytest

from lorameter.records.record import Notice, PartialRecord
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import COMMANDS, TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.telemetry import TrialTelemetry


class FakeTelemetry:
    """A `Telemetry` that records its calls, and measures an energy if asked to."""

    calls: ClassVar[list[str]] = []

    def __init__(self, phase, device, *, energy, generations):
        self.phase, self.device, self.energy = phase, device, energy

    def begin(self):
        self.calls.append(f"begin {self.phase}")

    def look(self):
        self.calls.append(f"look {self.phase}")

    def end(self):
        self.calls.append(f"end {self.phase}")
        return {f"device_energy_{self.phase}_j": 900.0} if self.energy else {f"host_load_{self.phase}": 1.0}

    def notice(self):
        return Notice(code="not-measured", message="m", remedy="r") if self.device == "cuda" else None


@pytest.fixture
def make_telemetry(monkeypatch):
    """A function that makes the telemetry of a trial on a device, each step of which trains 10 tokens."""
    FakeTelemetry.calls = []
    monkeypatch.setattr("lorameter.trial.telemetry.Telemetry", FakeTelemetry)
    monkeypatch.setattr("lorameter.trial.telemetry.ENERGY_STRETCH_S", 0.02)

    def make(*measures, device="cuda", **ranks):
        request = TrialRequest(
            trial="r0-a", variant=LoraVariant(name="a"), role="variant", replicate=0, seed=0, workload=Workload(),
            protocol=Protocol(), interleaving="lockstep", measures=measures, device=device, threads=1, tokens_path="",
            scratch="", log_path="",
        )  # fmt: skip
        steps = []

        def step():
            steps.append(1)
            FakeTelemetry.calls.append("step")

        return TrialTelemetry(request, step, lambda: 10 * len(steps), **ranks), steps

    return make


def turn():
    FakeTelemetry.calls.append("call")
    return PartialRecord(samples={"step_time_s": (0.1, 0.1), "turn_tokens": (30.0,)}, values={"threads": 1.0})


def test_timed_commands_are_enclosed_by_readings(make_telemetry):
    """Before and after it, by the telemetry of its phase; the command's own values are kept."""
    telemetry, _ = make_telemetry("steps", "requests")
    fragment = telemetry.around(COMMANDS["turn"], turn)
    assert fragment.values == {"threads": 1.0, "host_load_train": 1.0}
    telemetry.around(COMMANDS["request"], PartialRecord)
    telemetry.around(COMMANDS["open_ended"], PartialRecord)
    generate = ["begin generate", "end generate"]
    assert FakeTelemetry.calls == ["begin train", "call", "end train", *generate, *generate]


def test_a_command_that_is_not_timed_has_no_readings(make_telemetry):
    """As a warm-up."""
    telemetry, _ = make_telemetry("steps", "peaks")
    assert telemetry.around(COMMANDS["warm_up"], turn) == turn()
    assert set(FakeTelemetry.calls) == {"call"}


@pytest.mark.parametrize(("measures", "device"), [(("steps", "requests"), "cuda"), (("peaks",), "cpu")])
def test_without_an_energy_counter_of_its_own_a_trial_takes_no_steps(make_telemetry, measures, device):
    """Where trials take turns, the GPU's counter would include the energy of the others; a CPU has none."""
    telemetry, steps = make_telemetry(*measures, device=device)
    assert "energy_steps" not in telemetry.around(COMMANDS["turn"], turn).values
    telemetry.around(COMMANDS["finish_training"], PartialRecord)
    assert steps == []


def test_an_isolated_trial_takes_steps_for_its_energy(make_telemetry):
    """After the command; the counts are those of the steps between the readings."""
    telemetry, steps = make_telemetry("peaks", "merged")
    fragment = telemetry.around(COMMANDS["finish_training"], lambda: PartialRecord(memory={"adapter_bytes": 1}))
    assert len(steps) >= 1
    assert FakeTelemetry.calls[0] == "begin train"
    assert FakeTelemetry.calls[-1] == "end train"
    assert fragment.values["energy_steps"] == len(steps)
    assert fragment.values["energy_tokens"] == 10 * len(steps)
    assert fragment.memory == {"adapter_bytes": 1}


def test_all_ranks_take_the_same_steps_for_energy(make_telemetry):
    """The first rank decides."""
    decisions = iter([True, True, True, False])
    telemetry, steps = make_telemetry("peaks", agree=lambda own: next(decisions))
    assert telemetry.around(COMMANDS["finish_training"], PartialRecord).values["energy_steps"] == len(steps) == 3
