"""Each fault is found for the right reason, and the healthy control passes."""

import dataclasses

import pytest
from negative_controls.catalogue import CONTROLS
from negative_controls.control import run_control, small

from kernels_check.judges.paths import REQUIREMENTS

SOUND = next(control for control in CONTROLS if control.name == "eager attention")


HERE = [control for control in CONTROLS if control.needs_cuda is None]
ON_CUDA = [control for control in CONTROLS if control.needs_cuda is not None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("control", HERE, ids=lambda control: control.name)
def test_control(control):
    """The fault is found with its reason; the healthy control passes."""
    outcome = run_control(control)
    assert outcome.held, outcome.failure


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("control", ON_CUDA, ids=lambda control: control.name)
def test_control_on_cuda(control):
    """What a CPU can only judge by its inputs."""
    outcome = run_control(control)
    assert outcome.held, outcome.failure


def test_names_are_unique_and_paths_are_known():
    """A control is found by its name, and judges a path of the contract with a value it accepts."""
    assert len({control.name for control in CONTROLS}) == len(CONTROLS)
    for control in CONTROLS:
        assert REQUIREMENTS[control.path].problem(control.required) is None, control.name
        assert control.words, control.name


def test_a_control_without_a_fault_fails():
    """The outcome says that nothing was found."""
    outcome = run_control(dataclasses.replace(SOUND, fault=SOUND.healthy))
    assert outcome.held is False
    assert outcome.failure.startswith("the faulty run is active; its reason lacks 'forward: 2 eager")


def test_a_control_caught_for_another_reason_fails():
    """The right status is not enough."""
    outcome = run_control(dataclasses.replace(SOUND, words=("the moon",)))
    assert outcome.held is False
    assert "its reason lacks 'the moon'" in outcome.failure
    assert run_control(dataclasses.replace(SOUND, not_words=("2 eager",))).held is False


def test_a_control_whose_healthy_run_fails_does_not_hold():
    """A check that always fails would find every fault."""
    outcome = run_control(dataclasses.replace(SOUND, healthy=SOUND.fault))
    assert outcome.held is False
    assert "the healthy run is fallback" in outcome.failure


def test_a_warning_must_be_the_faults_own():
    """Where the reason alone names the fault, that of the healthy control may not, and the run itself is active."""
    warned = dataclasses.replace(SOUND, fault=SOUND.healthy, words=("2 attention layers",), caught_by="reason")
    assert "the healthy run is given the same warning" in run_control(warned).failure
    failed = dataclasses.replace(SOUND, caught_by="reason")
    assert "the faulty run is fallback, although what was required ran" in run_control(failed).failure


def test_an_exception_is_a_control_that_failed():
    """With its text, and without stopping the others."""
    outcome = run_control(dataclasses.replace(SOUND, fault=small(dtype="no_dtype")))
    assert outcome.held is False
    assert "no_dtype" in outcome.failure


def test_a_control_for_cuda_is_skipped_with_its_reason(monkeypatch):
    """Neither held nor failed where there is no GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = run_control(dataclasses.replace(SOUND, needs_cuda="only there"))
    assert outcome.held is None
    assert outcome.failure == "needs a CUDA device: only there"
