"""Tests that each fault is found for the right reason and that the healthy control passes."""

import dataclasses

import pytest
from negative_controls.catalogue import CONTROLS
from negative_controls.control import Verifier

HERE = tuple(control for control in CONTROLS if control.needs_cuda is None)
ON_CUDA = tuple(control for control in CONTROLS if control.needs_cuda is not None)
SHARED = Verifier(CONTROLS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("control", HERE, ids=lambda control: control.name)
def test_control(control):
    """The fault is found with its reason; the healthy control passes."""
    assert SHARED.failures(control) == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("control", ON_CUDA, ids=lambda control: control.name)
def test_control_on_cuda(control):
    """On a GPU the controls are judged by kernels; a CPU can judge some only by their inputs."""
    assert SHARED.failures(control) == []


def test_a_control_fails_without_its_fault():
    """A control fails if its faulty run is healthy, its reason lacks the words, or its healthy run fails."""
    sound = next(control for control in CONTROLS if control.name == "eager attention")
    passed = " ".join(SHARED.failures(dataclasses.replace(sound, fault=sound.healthy)))
    assert "the faulty run is active" in passed
    assert "its reason lacks 'forward: 2 eager" in passed
    assert "the healthy run is fallback" in " ".join(SHARED.failures(dataclasses.replace(sound, healthy=sound.fault)))
