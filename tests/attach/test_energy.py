"""Tests of the energy of a script's training: the GPU's counter over the periods of pure training."""

import pytest

from lorameter.attach import measures as module
from lorameter.attach.measures import Energy
from lorameter.attach.observer import StepReading
from lorameter.machine.reading import Reading


class Gpu:
    """A GPU whose counter shows 100 W."""

    def __init__(self, clock):
        self._clock = clock

    def energy_j(self):
        return Reading(value=1000.0 + 100.0 * self._clock[0])


@pytest.fixture
def clock():
    """The seconds of a clock that the test advances."""
    return [50.0]


@pytest.fixture
def gpu(clock, monkeypatch):
    made = Gpu(clock)
    monkeypatch.setattr(module, "open_torch_gpu", lambda device: Reading(value=made))
    return made


def reading(tokens=10):
    return StepReading(number=1, step_time_s=1.0, cpu_time_s=1.0, real_tokens=tokens)


def train(energy, clock, seconds, steps=2, tokens=10):
    energy.begin()
    for _ in range(steps):
        energy.step(reading(tokens))
    clock[0] += seconds


def test_periods_add_up_without_the_time_between_them(gpu, clock):
    """Energy, steps and tokens of the periods add up without the time between them; reading a current period does not
    change it."""
    energy = Energy("cuda:0", lambda: clock[0])
    assert energy.values() == {}
    train(energy, clock, 20.0)
    assert energy.values() == energy.values() == {
        "device_energy_train_j": 2000.0, "energy_steps": 2, "energy_tokens": 20,
    }  # fmt: skip
    energy.end()
    clock[0] += 500.0  # an evaluation
    assert energy.values()["device_energy_train_j"] == 2000.0
    train(energy, clock, 30.0, steps=3)
    energy.end()
    energy.end()
    assert energy.values() == {"device_energy_train_j": 5000.0, "energy_steps": 5, "energy_tokens": 50}
