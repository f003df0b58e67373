"""Tests of the steps of a training as its observer receives them."""

import pytest
import torch

from lorameter.attach.observer import ErrorGuard, ObserverReply, TrainingInfo, weak_reference
from lorameter.attach.steps import Steps, make_watch


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16))


def training_of(model):
    return TrainingInfo(
        source="loop", model=weak_reference(model), planned_steps=None, trainable_parameters=1, total_parameters=1,
        accumulation=1,
    )  # fmt: skip


class PatientObserver:
    """An observer that accepts late reports; it records the reports and their times."""

    def __init__(self):
        self.readings, self.phases, self.errors = [], [], []

    def begin(self, training):
        return ObserverReply(flush_interval_s=3600.0)

    def step(self, reading):
        self.readings.append(reading)
        return ObserverReply(flush_interval_s=3600.0)

    def phase(self, phase):
        self.phases.append((phase, len(self.readings)))

    def end(self, error, *, seen=True):
        self.errors.append((error, len(self.readings)))


def test_steps_before_a_failure_of_the_meter_are_reported(model, capfd):
    """An error of the meter in a later step loses no earlier results."""
    observer = PatientObserver()
    training = training_of(model)
    steps = Steps(observer, training, torch.device("cpu"), ErrorGuard())
    steps.begin()
    for _ in range(3):
        steps.end_step()
    assert len(observer.readings) == 1
    steps._guard.run(lambda: 1 / 0)
    assert len(observer.readings) == 3
    ((error, readings),) = observer.errors
    assert readings == 3
    assert "ZeroDivisionError" in str(error)
    assert "has stopped" in capfd.readouterr().err


def test_a_meter_does_not_wait_for_other_ranks():
    """Other ranks may watch another step, and waiting for them would hang."""
    model = torch.nn.Linear(2, 2)
    with (watched := make_watch(model, {"ranks.base": True, "mode": "train"})):
        model(torch.ones(1, 2)).sum().backward()
    assert {check.path for check in watched.checks if check.required is not None} == {"mode"}
