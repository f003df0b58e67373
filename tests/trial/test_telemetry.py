"""Tests of the telemetry around the commands of a trial."""

from __future__ import annotations

import pytest

from lorameter.records.record import PartialRecord
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import COMMANDS, TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload
from lorameter.trial.telemetry import TrialTelemetry


class FakeTelemetry:
    """A `Telemetry` that reports an energy if configured."""

    def __init__(self, phase, device, *, energy, generations):
        self.values = {f"device_energy_{phase}_j": 900.0} if energy else {f"host_load_{phase}": 1.0}

    def begin(self):
        pass

    def end(self):
        return self.values

    def notice(self):
        return None


@pytest.fixture
def make_telemetry(monkeypatch):
    """A function that makes the telemetry of a trial on a device; each of its steps trains 10 tokens."""
    monkeypatch.setattr("lorameter.trial.telemetry.Telemetry", FakeTelemetry)
    monkeypatch.setattr("lorameter.trial.telemetry.ENERGY_STRETCH_S", 0.02)

    def make(*measures, device="cuda", **ranks):
        request = TrialRequest(
            trial="r0-a", variant=LoraVariant(name="a"), role="variant", replicate=0, seed=0, workload=Workload(),
            protocol=Protocol(), interleaving="lockstep", measures=measures, device=device, threads=1, tokens_path="",
            scratch="", log_path="",
        )  # fmt: skip
        steps = []

        return TrialTelemetry(request, lambda: steps.append(1), lambda: 10 * len(steps), **ranks), steps

    return make


@pytest.mark.parametrize(("measures", "device"), [(("steps", "requests"), "cuda"), (("peaks",), "cpu")])
def test_without_an_energy_counter_of_its_own_a_trial_takes_no_steps(make_telemetry, measures, device):
    """With turns, the GPU's counter would include the energy of other trials; a CPU has no counter."""
    telemetry, steps = make_telemetry(*measures, device=device)
    assert "energy_steps" not in telemetry.around(COMMANDS["turn"], PartialRecord).values
    telemetry.around(COMMANDS["finish_training"], PartialRecord)
    assert steps == []


def test_an_isolated_trial_takes_steps_for_its_energy(make_telemetry):
    """The steps follow the command, and the counts are those of the steps between the readings."""
    telemetry, steps = make_telemetry("peaks", "merged")
    fragment = telemetry.around(COMMANDS["finish_training"], lambda: PartialRecord(memory={"adapter_bytes": 1}))
    assert len(steps) >= 1
    assert fragment.values["energy_steps"] == len(steps)
    assert fragment.values["energy_tokens"] == 10 * len(steps)
    assert fragment.memory == {"adapter_bytes": 1}


def test_all_ranks_take_the_same_steps_for_energy(make_telemetry):
    """The first rank decides on the number of steps."""
    decisions = iter([True, True, True, False])
    telemetry, steps = make_telemetry("peaks", agree=lambda own: next(decisions))
    assert telemetry.around(COMMANDS["finish_training"], PartialRecord).values["energy_steps"] == len(steps) == 3
