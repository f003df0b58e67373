"""Each sabotage is caught for the right reason, by either instrument, and its untouched twin passes."""

import dataclasses

import pytest

from kernels_check.controls.catalogue import CONTROLS
from kernels_check.controls.control import run_control, small
from kernels_check.judges.paths import REQUIREMENTS

SOUND = next(control for control in CONTROLS if control.name == "eager attention")


def marks_of(control, instrument):
    """What either instrument sees is tried with the spy; with the profiler `make proof-long` tries it, too."""
    return [pytest.mark.selftest] if instrument == "profile" and "spy" in control.instruments else []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("control", "instrument"),
    [pytest.param(c, i, id=f"{c.name}-{i}", marks=marks_of(c, i)) for c in CONTROLS for i in c.instruments],
)
def test_control(control, instrument):
    """The sabotage is caught with its reason; the twin passes."""
    outcome = run_control(control, instrument)
    if outcome.held is None:
        pytest.skip(outcome.fault)
    assert outcome.held, outcome.fault


def test_names_are_unique_and_paths_are_known():
    """A control is found by its name, and judges a path of the contract with a value it accepts."""
    assert len({control.name for control in CONTROLS}) == len(CONTROLS)
    for control in CONTROLS:
        assert REQUIREMENTS[control.path].problem(control.required) is None, control.name
        assert control.words, control.name


def test_a_control_without_sabotage_fails():
    """A twin in place of the broken run is not caught, and the outcome says so."""
    outcome = run_control(dataclasses.replace(SOUND, sabotage=SOUND.twin), "spy")
    assert outcome.held is False
    assert outcome.fault.startswith("the sabotage is active; its reason lacks 'forward: 2 eager")


def test_a_control_caught_for_another_reason_fails():
    """The right status is not enough."""
    outcome = run_control(dataclasses.replace(SOUND, words=("the moon",)), "spy")
    assert outcome.held is False
    assert "its reason lacks 'the moon'" in outcome.fault
    assert run_control(dataclasses.replace(SOUND, not_words=("2 eager",)), "spy").held is False


def test_a_control_whose_twin_fails_does_not_hold():
    """A check that always fails would catch every sabotage."""
    outcome = run_control(dataclasses.replace(SOUND, twin=SOUND.sabotage), "spy")
    assert outcome.held is False
    assert "the untouched twin is fallback" in outcome.fault


def test_a_warning_must_be_the_sabotages_own():
    """Where the reason alone tells, the twin's may not say the same, and the run itself stays active."""
    warned = dataclasses.replace(SOUND, sabotage=SOUND.twin, words=("2 attention layers",), caught_by="reason")
    assert "the untouched twin is given the same warning" in run_control(warned, "spy").fault
    failed = dataclasses.replace(SOUND, caught_by="reason")
    assert "the sabotage is fallback, although what was required ran" in run_control(failed, "spy").fault


def test_an_exception_is_a_control_that_failed():
    """With its text, and without stopping the others."""
    outcome = run_control(dataclasses.replace(SOUND, sabotage=small(dtype="no_dtype")), "spy")
    assert outcome.held is False
    assert "no_dtype" in outcome.fault


def test_a_control_for_cuda_is_skipped_with_its_reason(monkeypatch):
    """Neither held nor failed where there is no GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = run_control(dataclasses.replace(SOUND, needs_cuda="only there"), "spy")
    assert outcome.held is None
    assert outcome.fault == "needs a CUDA device: only there"
