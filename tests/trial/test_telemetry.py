"""Readings stand around what is timed, energy is an isolated trial's, and nothing else of a trial changes."""

from __future__ import annotations

from typing import ClassVar

import pytest

from lorameter.records.record import Notice, PartialRecord
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import COMMANDS, TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.telemetry import TrialTelemetry


class Recorded:
    """A watch that says what it was asked, and gives an energy where it was made for one."""

    asked: ClassVar[list[str]] = []

    def __init__(self, phase, device, *, energy, generations):
        self.phase, self.device, self.energy = phase, device, energy

    def begin(self):
        self.asked.append(f"begin {self.phase}")

    def look(self):
        self.asked.append(f"look {self.phase}")

    def end(self):
        self.asked.append(f"end {self.phase}")
        return {f"device_energy_{self.phase}_j": 900.0} if self.energy else {f"host_load_{self.phase}": 1.0}

    def notice(self):
        return Notice(code="not-measured", message="m", remedy="r") if self.device == "cuda" else None


@pytest.fixture
def surroundings(monkeypatch):
    """A function that makes the surroundings of a trial on a device, of which each step trains 10 tokens."""
    Recorded.asked = []
    monkeypatch.setattr("lorameter.trial.telemetry.Telemetry", Recorded)
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
            Recorded.asked.append("step")

        return TrialTelemetry(request, step, lambda: 10 * len(steps), **ranks), steps

    return make


def turn():
    Recorded.asked.append("call")
    return PartialRecord(samples={"step_time_s": (0.1, 0.1), "turn_tokens": (30.0,)}, values={"threads": 1.0})


def test_readings_stand_around_what_is_timed(surroundings):
    """Before and after, each phase by its own watch; the command's own values stay."""
    around, _ = surroundings("steps", "requests")
    fragment = around.around(COMMANDS["turn"], turn)
    assert fragment.values == {"threads": 1.0, "host_load_train": 1.0}
    around.around(COMMANDS["request"], PartialRecord)
    around.around(COMMANDS["open_ended"], PartialRecord)
    generate = ["begin generate", "end generate"]
    assert Recorded.asked == ["begin train", "call", "end train", *generate, *generate]


@pytest.mark.parametrize("command", ["build", "verify", "warm_up", "begin_generate", "merge", "close"])
def test_what_is_not_timed_is_not_watched(surroundings, command):
    """Its time is in no result."""
    around, _ = surroundings("steps", "peaks")
    assert around.around(COMMANDS[command], turn) == turn()
    assert set(Recorded.asked) == {"call"}


def test_trials_that_take_turns_have_no_energy(surroundings):
    """The GPU's counter would hold that of the others."""
    around, steps = surroundings("steps", "requests")
    assert "energy_steps" not in around.around(COMMANDS["turn"], turn).values
    around.around(COMMANDS["finish_training"], PartialRecord)
    assert steps == []


def test_a_solo_trial_takes_steps_for_its_energy_when_its_peaks_are_read(surroundings):
    """After the command, and the counts are those of the steps between the readings."""
    around, steps = surroundings("peaks", "merged")
    fragment = around.around(COMMANDS["finish_training"], lambda: PartialRecord(memory={"adapter_bytes": 1}))
    assert len(steps) >= 1
    assert Recorded.asked[0] == "begin train"
    assert Recorded.asked[-1] == "end train"
    assert fragment.values["energy_steps"] == len(steps)
    assert fragment.values["energy_tokens"] == 10 * len(steps)
    assert fragment.memory == {"adapter_bytes": 1}


def test_ranks_take_as_many_steps_for_their_energy_whatever_their_clocks_say(surroundings):
    """One decides for all."""
    decisions = iter([True, True, True, False])
    around, steps = surroundings("peaks", agree=lambda own: next(decisions))
    assert around.around(COMMANDS["finish_training"], PartialRecord).values["energy_steps"] == len(steps) == 3


def test_a_cpu_has_no_energy_counter(surroundings):
    """So no step is taken for it, and no notice says so."""
    around, steps = surroundings("peaks", device="cpu")
    assert around.around(COMMANDS["finish_training"], PartialRecord) == PartialRecord()
    assert steps == []
